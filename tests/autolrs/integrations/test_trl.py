"""TRL's trainers on a tiny Llama: SFT and DPO with LoRA, GRPO with a reward."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import (  # type: ignore[attr-defined]  # it imports them when they are asked for
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

from autolrs_plugin.integrations.transformers import AutoLRSCallback
from autolrs_plugin.training.lr import ReplayLR
from autolrs_plugin.training.snapshot import JobState
from autolrs_plugin.training.tree import Copier
from tests.autolrs.integrations import task
from tests.autolrs.jobs import bits
from tests.autolrs.scripted import script

pytestmark = pytest.mark.slow

TEXTS = [f"the number after {i} is {i + 1}, and before it {i - 1}" for i in range(40)]
COMMON: dict[str, Any] = {
    "max_steps": task.STEPS,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_steps": 4,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", "<pad>", *alphabet])}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")


def sft(folder: Path, callbacks: list[Any], **options: Any) -> SFTTrainer:
    data = Dataset.from_list([{"prompt": text[:20], "completion": text[20:]} for text in TEXTS])
    args = SFTConfig(str(folder), gradient_accumulation_steps=2, max_length=48, **COMMON, **options)
    assert args.bf16
    assert args.gradient_checkpointing
    return SFTTrainer(
        llama(),
        args,
        train_dataset=data.select(range(32)),
        eval_dataset=data.select(range(32, 40)),
        processing_class=tokenizer(),
        peft_config=lora(),
        callbacks=callbacks,
    )


def dpo(folder: Path, callbacks: list[Any], **options: Any) -> DPOTrainer:
    rows = [{"prompt": text[:20], "chosen": text[20:], "rejected": text[:19:-1]} for text in TEXTS]
    data = Dataset.from_list(rows)
    return DPOTrainer(
        llama(),
        args=DPOConfig(str(folder), max_length=48, **COMMON, **options),
        train_dataset=data.select(range(32)),
        eval_dataset=data.select(range(32, 40)),
        processing_class=tokenizer(),
        peft_config=lora(),
        callbacks=callbacks,
    )


def vowels(completions: list[str], **_: Any) -> list[float | None]:
    return [sum(c in "aeiou" for c in text) / 8 for text in completions]


def grpo(folder: Path, callbacks: list[Any], **options: Any) -> GRPOTrainer:
    data = Dataset.from_list([{"prompt": text[:10]} for text in TEXTS])
    args = GRPOConfig(
        str(folder),
        num_generations=2,
        max_completion_length=8,
        per_device_eval_batch_size=2,
        **COMMON,
        **options,
    )
    return GRPOTrainer(
        llama(),
        vowels,
        args=args,
        train_dataset=data.select(range(32)),
        eval_dataset=data.select(range(32, 34)),
        processing_class=tokenizer(),
        peft_config=lora(),
        callbacks=callbacks,
    )


def outcome(trainer: Any) -> tuple[dict[str, bytes], list[dict[str, Any]], Any]:
    """Return the adapter's bits, what was logged and the state of the generators."""
    weights = {n: bits(p) for n, p in trainer.model.named_parameters() if p.requires_grad}
    times = ("runtime", "per_second", "step_time", "total_flos")
    logs = [task.without_times(entry, times) for entry in trainer.state.log_history]
    return weights, json.loads(json.dumps(logs)), task.random_state()


@pytest.mark.parametrize(
    ("build", "settings"),
    [(sft, {}), (dpo, {}), (grpo, {"metric": "eval_reward"})],
    ids=["sft", "dpo", "grpo"],
)
def test_a_run_with_probes_is_the_run_without(build: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    task.seed_everything()
    trainer = build(tmp_path, [])
    trainer.create_optimizer()
    trainer.lr_scheduler = ReplayLR(trainer.optimizer, task.RATES)
    trainer.train()
    without = outcome(trainer)
    task.seed_everything()
    with script(task.PROBING):
        tuner = AutoLRSCallback(task.RANGE, progress=False, **settings)
        trainer = build(tmp_path, [tuner])
        trainer.train()
    assert tuner.ledger.search.steps == 15
    assert tuner.schedule.lrs == task.RATES
    tuned = outcome(trainer)
    assert tuned[1] == without[1]
    assert tuned[2] == without[2]
    assert tuned[0] == without[0]


def test_only_the_adapter_is_in_a_snapshot(tmp_path: Path) -> None:
    trainer: Any = sft(tmp_path, [])
    job = JobState(trainer.model, trainer.create_optimizer())
    kept = job.capture(Copier())["parameters"]
    assert kept
    assert all("lora_" in name for name in kept)
    assert sum(copy.data.numel() for copy in kept.values()) < 0.1 * sum(
        p.numel() for p in trainer.model.parameters()
    )


def test_a_search_by_the_reward(tmp_path: Path) -> None:
    """The loss of GRPO, which begins at 0 and means nothing, ends no probe."""
    tuner = AutoLRSCallback(
        (1e-5, 1e-1), metric="eval_reward", search_budget=1.0, eval_cost_steps=0, progress=False
    )
    trainer = grpo(tmp_path, [tuner])
    trainer.args.max_steps = 48
    trainer.train()
    assert len(tuner.schedule) == 48
    judged = [c.val_loss for stage in tuner.stages for c in stage.candidates if c.val_loss is not None]
    assert judged
    assert all(-8 <= reward <= 0 for reward in judged)  # a reward counts the other way round


def test_a_loss_that_is_no_progress_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"GRPOTrainer: its training loss is no measure of progress; give .* metric"
    ):
        grpo(tmp_path, [AutoLRSCallback(task.RANGE)])
