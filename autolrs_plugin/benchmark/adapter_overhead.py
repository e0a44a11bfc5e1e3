"""What an adapter adds to the steps of a framework's own loop, outside of searches.

Measured within one run, as a share: the time inside of the adapter's hooks, without the actions that they carry out
(snapshots, probes, restores, evaluations and the decisions after them), over the time of the whole run without these.
The model is a small Llama.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table

from autolrs_plugin.training.hosted import HostedRun

LENGTH, BATCH, ROWS = 64, 8, 512
LR_RANGE = (1e-5, 1e-1)


@dataclass(frozen=True, slots=True)
class Overhead:
    """What was measured.

    Attributes:
        adapter: which.
        steps: steps of the run.
        step_ms: wall time of a step, the adapter's part included.
        added_us: the adapter's part of it.
    """

    adapter: str
    steps: int
    step_ms: float
    added_us: float

    @property
    def share(self) -> float:
        """The adapter's part of a step's time."""
        return self.added_us / 1000 / self.step_ms


class Clock:
    """Adds up the time spent in methods that call each other, each moment once."""

    def __init__(self) -> None:
        self.inside_s = self.actions_s = 0.0
        self._depth = 0

    def hook(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method whose time is the adapter's."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.inside_s += time.perf_counter() - started

        return timed

    def action(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method whose time is an action's."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.actions_s += time.perf_counter() - started

        return timed


def llama() -> Any:
    """Return a Llama of 0.4 million parameters; a step takes about 20 ms on a core."""
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds to import

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    build: Any = LlamaForCausalLM
    return build(config)


def rows() -> list[dict[str, torch.Tensor]]:
    """Return token ids, drawn at random: nothing is to be learnt here."""
    ids = torch.randint(0, 256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def in_transformers(steps: int, clock: Clock) -> None:
    """Train in a Trainer."""
    from transformers import Trainer, TrainingArguments

    from autolrs_plugin.integrations.transformers import AutoLRSCallback

    tuner: Any = AutoLRSCallback(LR_RANGE, progress=False)
    tuner.on_step_begin, tuner.on_step_end = clock.hook(tuner.on_step_begin), clock.hook(tuner.on_step_end)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "use_cpu": True,
        }
        args = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=BATCH, **options)
        Trainer(llama(), args, train_dataset=rows(), callbacks=[tuner]).train()


def in_lightning(steps: int, clock: Clock) -> None:
    """Train in a Lightning Trainer."""
    from lightning.pytorch import LightningModule, Trainer

    from autolrs_plugin.integrations.lightning import AutoLRSCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.llama = llama()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.llama(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    tuner: Any = AutoLRSCallback(LR_RANGE, progress=False)
    for name in ("on_train_batch_start", "on_train_batch_end"):
        setattr(tuner, name, clock.hook(getattr(tuner, name)))
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    quiet: dict[str, Any] = dict.fromkeys(off, False)
    loader = torch.utils.data.DataLoader(rows(), batch_size=BATCH, shuffle=True)
    Trainer(max_steps=steps, accelerator="cpu", callbacks=[tuner], **quiet).fit(Module(), loader)


def in_accelerate(steps: int, clock: Clock) -> None:
    """Train in a loop on an Accelerator."""
    from accelerate import Accelerator

    from autolrs_plugin.integrations.accelerate import AutoLRS

    accelerator, model = Accelerator(cpu=True), llama()
    loader = torch.utils.data.DataLoader(rows(), batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)

    def train_step(batch: Any) -> torch.Tensor:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    options: dict[str, Any] = {"max_steps": steps, "lr_range": LR_RANGE, "progress": False}
    tuner = AutoLRS(accelerator, model, optimizer, loader, train_step, **options)
    step = 0
    while step < steps:
        for batch in loader:
            if step < steps:
                tuner.step(batch)
                step += 1


ADAPTERS = {"transformers": in_transformers, "lightning": in_lightning, "accelerate": in_accelerate}


def measure(adapter: str, steps: int) -> Overhead:
    """Return what an adapter adds to each of `steps` steps.

    Raises:
        ModuleNotFoundError: its framework is not installed.
    """
    clock = Clock()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    timed: dict[str, Any] = {
        name: clock.hook(getattr(HostedRun, name)) for name in ("before_step", "after_step")
    }
    timed["_act"] = clock.action(HostedRun._act)
    with warnings.catch_warnings(), patch.multiple(HostedRun, **timed):
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        ADAPTERS[adapter](steps, clock)
        wall_s = time.perf_counter() - started - clock.actions_s
    added_s = clock.inside_s - clock.actions_s
    return Overhead(adapter, steps, wall_s / steps * 1e3, added_s / steps * 1e6)


def overhead_table(measured: list[Overhead]) -> Table:
    """Return the measurements as a table."""
    table = Table("adapter", "steps", "a step, ms", "added to it, µs", "share")
    for m in measured:
        table.add_row(m.adapter, str(m.steps), f"{m.step_ms:.2f}", f"{m.added_us:.0f}", f"{m.share:.2%}")
    return table
