"""What every adapter must keep: a run with probes is, bit for bit, the run without, in its framework's own loop."""

import functools
import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autolrs_plugin import AutoLRS
from autolrs_plugin.training.finding_only import FoundError, finding_only
from autolrs_plugin.training.lr import GroupRates
from tests.autolrs.integrations import task, with_accelerate, with_lightning, with_trainer
from tests.autolrs.scripted import script

Run = Callable[..., task.Outcome]

FRAMEWORKS: dict[str, Run] = {
    "transformers": with_trainer.run,
    "accelerate": with_accelerate.run,
    "lightning": with_lightning.run,
    "lightning-manual": with_lightning.run_manual,
}


@pytest.fixture(params=FRAMEWORKS)
def run(request: pytest.FixtureRequest) -> Run:
    parameters = request.node.callspec.params
    accumulate = parameters.get("accumulate", parameters.get("options", {}).get("accumulate"))
    if request.param == "lightning-manual" and accumulate == 2:
        pytest.skip("with manual optimisation there is no accumulation")
    return FRAMEWORKS[request.param]


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2}, {"noise": 0.3}], ids=["plain", "accumulate", "noise"]
)
def test_a_run_with_probes_is_the_run_without(run: Run, options: dict[str, Any], tmp_path: Path) -> None:
    without = run(tmp_path / "without", None, replay=task.RATES, **options)
    with script(task.PROBING):
        tuned = run(tmp_path / "tuned", {}, **options)
    assert tuned.search_steps == 15
    assert tuned.schedule == task.RATES
    assert tuned.steps == without.steps == task.STEPS
    assert tuned.trained_on == without.trained_on
    assert len(tuned.trained_on) == task.STEPS * task.BATCH
    assert tuned.rates == without.rates
    assert tuned.logs == without.logs
    assert tuned.random == without.random
    assert tuned.bits == without.bits


def test_only_a_rate_is_found_where_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    with finding_only(1.0), pytest.raises(FoundError) as ended:
        run(tmp_path, {})
    assert task.RANGE[0] <= ended.value.finding.lr <= task.RANGE[1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_run_that_has_begun_is_not_resumed_to_find_a_rate(run: Run, tmp_path: Path) -> None:
    with script(task.PROBING):
        run(tmp_path, {}, stop_at=2)
    with (
        finding_only(1.0),
        pytest.raises(RuntimeError, match="a rate is found before the first step of a run"),
    ):
        run(tmp_path, {}, resume=2)


def test_every_group_has_its_ratio_and_the_logs_have_the_rate_in_use(run: Run, tmp_path: Path) -> None:
    with script(task.PROBING):
        outcome = run(tmp_path, {})
    assert [rates[0] for rates in outcome.rates] == list(task.RATES)
    assert [rates[1] for rates in outcome.rates] == pytest.approx([lr / 10 for lr in task.RATES])
    logged = [entry["learning_rate"] for entry in outcome.logs if "learning_rate" in entry]
    assert logged in ([], list(task.RATES))  # a loop of one's own logs what it likes


def test_no_snapshot_is_held_outside_of_a_search(run: Run, tmp_path: Path) -> None:
    gc.collect()
    gc.freeze()  # what there is already is not looked through at each step
    try:
        with script(task.PROBING):
            outcome = run(tmp_path, {}, count=True)
        assert set(outcome.snapshots) == {0}
        assert task.snapshots_alive() == 0
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("own", ["generator", "sampler"])
@pytest.mark.parametrize("framework", ["accelerate", "lightning"])
def test_what_a_loader_shuffles_by_is_rolled_back(framework: str, own: str, tmp_path: Path) -> None:
    run = FRAMEWORKS[framework]
    without = run(tmp_path / "without", None, replay=task.RATES, own=own)
    with script(task.PROBING):
        tuned = run(tmp_path / "tuned", {}, own=own)
    assert tuned.trained_on == without.trained_on
    assert tuned.bits == without.bits


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_was_stopped_anywhere_ends_on_the_same_bits(
    run: Run, accumulate: int, tmp_path: Path
) -> None:
    with script(task.PROBING):
        whole = run(tmp_path / "whole", {}, accumulate=accumulate)
        # Where in an accumulation a run is stopped makes no difference: it is stopped between two steps.
        for step in range(1, task.STEPS, 1 if accumulate == 1 else 3):
            shutil.rmtree(tmp_path / "part", ignore_errors=True)
            part = run(tmp_path / "part", {}, accumulate=accumulate, stop_at=step)
            assert part.steps == len(part.schedule) == step
            resumed = run(tmp_path / "part", {}, accumulate=accumulate, resume=step)
            assert resumed.schedule == task.RATES
            assert resumed.search_steps == whole.search_steps
            assert resumed.trained_on == whole.trained_on
            assert resumed.bits == whole.bits


@pytest.mark.parametrize(
    ("mode", "steps", "accumulate"), [("once", 160, 1), ("once", 160, 2), ("paper", 60, 1)]
)
def test_the_schedule_is_that_of_the_plain_loop(
    run: Run, mode: str, steps: int, accumulate: int, tmp_path: Path
) -> None:
    plain = plain_schedule(mode, steps, accumulate)
    assert plain.search_steps > 0
    settings = {"mode": mode, "seed": 3}
    outcome = run(tmp_path, settings, steps=steps, accumulate=accumulate, dropout=0.0, seedable=False)
    assert outcome.schedule == plain.schedule
    assert outcome.search_steps == plain.search_steps
    assert outcome.trained_on == plain.trained_on
    assert outcome.bits == plain.bits


@functools.cache
def plain_schedule(mode: str, steps: int, accumulate: int) -> task.Outcome:
    """Return what comes of the same task in a plain loop."""
    model = task.Net(dropout=0.0)
    optimizer = task.make_optimizer(model)
    GroupRates(optimizer).set(0.1)
    data, judge = task.Pictures(), task.validation()
    loader = torch.utils.data.DataLoader(data, batch_size=task.BATCH // accumulate, shuffle=True)

    def micro_batches() -> Any:
        batches = iter(loader)
        while chunk := [batch for batch in (next(batches, None) for _ in range(accumulate)) if batch]:
            yield chunk

    def train_step(batches: Any) -> torch.Tensor:
        losses = []
        for batch in batches:
            loss = model(**batch)["loss"] / accumulate
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        return sum(losses)

    def validate() -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return model(**judge)["loss"]

    tuner = AutoLRS(
        model,
        optimizer,
        max_steps=steps,
        lr_range=task.RANGE,
        train_step=train_step,
        train_data=micro_batches,
        validate=validate,
        mode=mode,
        seed=3,
        progress=False,
    )
    task.seed_everything()
    tuner.run()
    outcome = task.Outcome(task.all_bits(model, optimizer), model.trained_on(), steps)
    outcome.take_over(tuner)
    return outcome
