"""What AutoLRS adds to the steps of a loop, outside of searches: in each framework, and in the plain loop.

Measured within one run, as a share: the time inside of its hooks, without the actions that they carry out (snapshots,
probes, restores, evaluations and the decisions after them), over the time of the whole run without these. In the plain
loop, which is all its own, the time outside of train_step stands for that of the hooks. Of several runs, the median.
The model is a small Llama.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from autolrs_plugin.integrations.torch_loop import AutoLRS
from autolrs_plugin.training.metering import metered_by

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
    """Adds up the time in methods that call each other: each moment counts for the innermost of them.

    Attributes:
        seconds: by owner: `adapter`, `action` or `step`.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("adapter", "action", "step"), 0.0)
        self._owners: list[str] = []
        self._since = 0.0

    @contextmanager
    def owning(self, owner: str) -> Iterator[None]:
        """Inside, time is `owner`'s; within an action all is the action's."""
        self._switch(self._owners + ["action" if "action" in self._owners else owner])
        try:
            yield
        finally:
            self._switch(self._owners[:-1])

    def owned(self, owner: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method whose time is `owner`'s."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.owning(owner):
                return method(*args, **kwargs)

        return timed

    def _switch(self, owners: list[str]) -> None:
        now = time.perf_counter()
        if self._owners:
            self.seconds[self._owners[-1]] += now - self._since
        self._owners, self._since = owners, now


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
    tuner.on_step_begin, tuner.on_step_end = (
        clock.owned("adapter", method) for method in (tuner.on_step_begin, tuner.on_step_end)
    )
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
        setattr(tuner, name, clock.owned("adapter", getattr(tuner, name)))
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    quiet: dict[str, Any] = dict.fromkeys(off, False)
    loader = torch.utils.data.DataLoader(rows(), batch_size=BATCH, shuffle=True)
    Trainer(max_steps=steps, accelerator="cpu", callbacks=[tuner], **quiet).fit(Module(), loader)


def in_accelerate(steps: int, clock: Clock) -> None:
    """Train in a loop on an Accelerator."""
    from accelerate import Accelerator

    from autolrs_plugin.integrations.accelerate import AutoLRS as OnAccelerator

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
    tuner = OnAccelerator(accelerator, model, optimizer, loader, train_step, **options)
    step = 0
    while step < steps:
        for batch in loader:
            if step < steps:
                tuner.step(batch)
                step += 1


def in_plain_loop(steps: int, clock: Clock) -> None:
    """Train in the loop of AutoLRS itself."""
    model, batches = llama(), torch.utils.data.default_collate(rows())["input_ids"].split(BATCH)
    optimizer = torch.optim.AdamW(model.parameters())

    def train_step(batch: torch.Tensor) -> torch.Tensor:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()  # its graph is freed in here, a part of the step as in every loop

    tuner = AutoLRS(
        model,
        optimizer,
        max_steps=steps,
        lr_range=LR_RANGE,
        train_step=clock.owned("step", train_step),
        train_data=list(batches),
        progress=False,
    )
    clock.owned("adapter", tuner.run)()


ADAPTERS = {
    "plain loop": in_plain_loop,
    "transformers": in_transformers,
    "lightning": in_lightning,
    "accelerate": in_accelerate,
}


def measure(adapter: str, steps: int) -> Overhead:
    """Return what AutoLRS adds to each of `steps` steps.

    Raises:
        ModuleNotFoundError: the framework is not installed.
    """
    clock = Clock()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(), metered_by(clock):
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        ADAPTERS[adapter](steps, clock)
        wall_s = time.perf_counter() - started - clock.seconds["action"]
    return Overhead(adapter, steps, wall_s / steps * 1e3, clock.seconds["adapter"] / steps * 1e6)


def median_of(adapter: str, steps: int, runs: int) -> Overhead:
    """Return the measurement whose share is the median of several runs."""
    return sorted((measure(adapter, steps) for _ in range(runs)), key=lambda m: m.share)[runs // 2]


def rows_of(measured: list[Overhead]) -> list[dict[str, Any]]:
    """Return the measurements as rows of a result file."""
    return [{**asdict(m), "share": m.share} for m in measured]


def overhead_table(measured: list[Overhead]) -> Table:
    """Return the measurements as a table."""
    table = Table("adapter", "steps", "a step, ms", "added to it, µs", "share")
    for m in measured:
        table.add_row(m.adapter, str(m.steps), f"{m.step_ms:.2f}", f"{m.added_us:.0f}", f"{m.share:.2%}")
    return table
