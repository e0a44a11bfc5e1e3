"""The kit for those who write an adapter: it passes what is rolled back, and names what is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.plans import PLANS
from autolrs_plugin.testing import RollbackError, check_rollback
from tests.autolrs.integrations import task, with_accelerate, with_lightning, with_trainer


def job(counter: Path | None = None, max_steps: int = 9) -> dict[str, Any]:
    """Train a small network with dropout and momentum; a step may count itself in a file, which nobody rolls back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = [(torch.randn(4, 8), torch.randn(4, 1)) for _ in range(5)]
    kept = []

    def train_step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        kept.append(float(loss))
        if counter is not None:
            counter.write_text(str(int(counter.read_text()) + 1))
        return loss

    settings: dict[str, Any] = {"max_steps": max_steps, "lr_range": (1e-4, 1e-1), "progress": False}
    AutoLRS(model, optimizer, train_step=train_step, train_data=data, **settings).run()
    out = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.rand(3)}
    return out if counter is None else {**out, "steps": [int(counter.read_text())]}


def test_what_is_rolled_back_passes() -> None:
    check_rollback(job)
    assert PLANS["staged"].__name__ == "staged_plan"


def test_what_is_not_rolled_back_is_named(tmp_path: Path) -> None:
    counter = tmp_path / "steps"

    def run() -> dict[str, Any]:
        counter.write_text("0")
        return job(counter)

    with pytest.raises(RollbackError, match=r"^with probes, \['steps'\]\[0\] of what run"):
        check_rollback(run)
    assert PLANS["staged"].__name__ == "staged_plan"


def test_a_run_without_a_search_or_too_short_for_one_is_refused() -> None:
    with pytest.raises(ValueError, match="no tuner in its default mode"):
        check_rollback(dict)
    with pytest.raises(ValueError, match="max_steps=3 is too short; give at least 4"):
        check_rollback(lambda: job(max_steps=3))


def test_of_several_processes_only_the_first_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [0, 1]
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: ranks.pop(0))
    with pytest.raises(ValueError, match="no tuner in its default mode"):
        check_rollback(dict)
    check_rollback(dict)


@pytest.mark.parametrize("adapter", [with_trainer.run, with_accelerate.run, with_lightning.run])
def test_every_adapter_passes(adapter: Callable[..., task.Outcome], tmp_path: Path) -> None:
    def run() -> dict[str, Any]:
        outcome = adapter(tmp_path / str(len(list(tmp_path.iterdir()))), {})
        return {"bits": outcome.bits, "random": outcome.random, "trained_on": outcome.trained_on}

    check_rollback(run)
