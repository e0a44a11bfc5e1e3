"""AutoLRS on Ray: reports from inside Ray Train, and probes in parallel on actors that hold replicas.

Inside a `TorchTrainer`'s loop AutoLRS is used as under torchrun: rank 0 decides, the others follow. `TrainReports`
tells Ray of the run's own steps.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autolrs_plugin.core.actions import Action, Done, Evaluate, Restore, Result, Train
from autolrs_plugin.core.controller import Controller

try:
    from autolrs_plugin.integrations.ray_probes import RayProbes
except ImportError as error:
    raise ModuleNotFoundError(
        f"AutoLRS on Ray: needs ray ({error}): pip install 'vllm-sarathi[autolrs,ray]'", name="ray"
    ) from error

__all__ = ["SCHEDULE_FILE", "RayProbes", "TrainReports"]

SCHEDULE_FILE = "autolrs_schedule.json"


class TrainReports:
    """Reports the run's own steps to Ray Train, each exactly once, on every rank.

    Use it as `AutoLRS(observers=[TrainReports()])`. A report has `step` (from 1), `lr`, `loss` (the ranks' mean) and
    `search_steps`; steps of probes are never reported. Training that diverges may be taken back, so the steps of an
    action are reported when the next one begins. A validation loss goes with the step after which it was evaluated, as
    `val_loss`. The last report has a checkpoint with the schedule that was found.

    Ray's controller takes one report in RAY_TRAIN_HEALTH_CHECK_INTERVAL_S, two seconds by default, and every worker
    waits for that: where steps are shorter, set it lower in the driver's environment, or `every` higher.

    Args:
        save: writes the model, or what you like, into the folder of that checkpoint; called on rank 0.
        every: report each step whose number is a multiple of this; those with a validation loss, and the last, always.
    """

    def __init__(self, save: Callable[[Path], None] | None = None, every: int = 1) -> None:
        self._save, self._every = save, every
        self._waiting: list[dict[str, Any]] = []

    def on_action(self, action: Action, controller: Controller) -> None:
        """Report the steps that are certain now."""
        if isinstance(action, Restore):
            self._waiting.clear()
        elif not isinstance(action, Evaluate):
            self._report(controller if isinstance(action, Done) else None)

    def on_step(self, lr: float, loss: float) -> None:
        """Steps are reported action by action."""

    def on_result(self, action: Action, result: Result, controller: Controller) -> None:
        """Note the run's own steps and evaluations."""
        if isinstance(action, Train):
            spent = controller.ledger.search.steps
            for i, (lr, loss) in enumerate(
                zip(action.lrs, result.losses, strict=True), action.first_step + 1
            ):
                self._waiting.append({"step": i, "lr": lr, "loss": loss, "search_steps": spent})
        elif isinstance(action, Evaluate) and self._waiting:
            self._waiting[-1]["val_loss"] = result.val_loss

    def close(self) -> None:
        """Nothing is open."""

    def _report(self, ended: Controller | None) -> None:
        from ray import train  # here, so that RayProbes does without ray[train]

        for metrics in self._waiting[: -1 if ended is not None else None]:
            if metrics["step"] % self._every == 0 or "val_loss" in metrics:
                train.report(metrics)
        if ended is not None and self._waiting:
            with tempfile.TemporaryDirectory(prefix="autolrs-") as folder:
                checkpoint = None
                if train.get_context().get_world_rank() == 0:
                    ended.schedule.save(Path(folder) / SCHEDULE_FILE)
                    if self._save is not None:
                        self._save(Path(folder))
                    checkpoint = train.Checkpoint.from_directory(folder)
                train.report(self._waiting[-1], checkpoint=checkpoint)
        self._waiting.clear()
