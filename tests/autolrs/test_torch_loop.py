"""AutoLRS on plain PyTorch loops: what it trains is, bit for bit, what a plain loop with its schedule trains."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.training.lr import GroupRates, ReplayLR
from autolrs_plugin.training.snapshot import JobState
from tests.autolrs.jobs import Job, batch_step, loader
from tests.autolrs.scripted import PROBING, RATES, script

RANGE: dict[str, Any] = {"max_steps": 7, "lr_range": (1e-3, 1.0), "progress": False}


def with_own_generator(job: Job) -> DataLoader:
    return loader(job, generator=torch.Generator().manual_seed(3))


def drawn_lazily(job: Job) -> DataLoader:
    sampler = RandomSampler(range(48), replacement=True, num_samples=40, generator=torch.Generator())
    return loader(job, shuffle=False, sampler=sampler)


def workers(job: Job) -> DataLoader:
    return loader(job, num_workers=1)


def persistent_workers(job: Job) -> DataLoader:
    """Without noise: generators inside a persistent worker are out of reach."""
    data = TensorDataset(job.inputs, job.targets)
    return DataLoader(data, batch_size=16, shuffle=True, num_workers=1, persistent_workers=True)


def listed(job: Job) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(job.inputs.split(16), job.targets.split(16), strict=True))


def function(job: Job) -> Callable[[], Any]:
    def epoch() -> Any:
        for i in torch.randperm(64).split(16):
            yield job.inputs[i] + torch.randn(()), job.targets[i]

    return epoch


SOURCES = [loader, with_own_generator, drawn_lazily, workers, persistent_workers, listed, function]


def trained_plainly(job: Job, source: Any, rates: tuple[float, ...] = RATES) -> dict[str, bytes]:
    """Train in the loop that a user would write."""
    step, left, group_rates = batch_step(job), list(rates), GroupRates(job.optimizer)
    while left:
        for batch in source() if callable(source) else source:
            if not left:
                break
            group_rates.set(left.pop(0))
            step(batch)
    return job.bits()


@pytest.mark.parametrize("keep", ["host", "device", "disk"])
@pytest.mark.parametrize("make_source", SOURCES, ids=lambda f: f.__name__)
def test_the_run_is_the_plain_loop_with_its_schedule(make_source: Any, keep: str) -> None:
    if keep != "host" and make_source in (workers, persistent_workers):
        pytest.skip("slow, and the place makes no difference to it")
    seed_everything()
    job = Job("adam")
    plain = trained_plainly(job, make_source(job))
    seed_everything()
    job = Job("adam")
    source = make_source(job)
    with script():
        tuner = AutoLRS(
            job.model,
            job.optimizer,
            train_step=batch_step(job),
            validate=job.validate,
            train_data=source,
            keep=keep,
            **RANGE,
        )
    assert tuner.run().lrs == RATES
    assert job.bits() == plain


def seed_everything() -> None:
    random.seed(0)
    np.random.seed(0)


@pytest.mark.parametrize("name", ["momentum", "adamw", "lion"])
def test_a_step_that_draws_at_random_needs_no_data(name: str) -> None:
    plain = Job(name, micro_batches=2)
    rates = GroupRates(plain.optimizer)
    for lr in RATES:
        rates.set(lr)
        plain.step()
    job = Job(name, micro_batches=2)
    with script():
        AutoLRS(job.model, job.optimizer, train_step=job.step, validate=job.validate, **RANGE).run()
    assert job.bits() == plain.bits()


class Reader:
    """A stream with a position, as a stateful loader or a tokenised file has."""

    def __init__(self) -> None:
        self.position = 0
        self.read: list[int] = []

    def next(self) -> int:
        self.position = (self.position + 5) % 64
        self.read.append(self.position)
        return self.position

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def reading_step(job: Job, reader: Reader) -> Callable[[], float]:
    def step() -> float:
        i = torch.arange(reader.next(), reader.position + 16) % 64
        return batch_step(job)((job.inputs[i], job.targets[i])).item()

    return step


def test_a_stream_with_a_position_is_rewound() -> None:
    plain, reader = Job(), Reader()
    step, rates = reading_step(plain, reader), GroupRates(plain.optimizer)
    for lr in RATES:
        rates.set(lr)
        step()
    job, rewound = Job(), Reader()
    with script():
        AutoLRS(
            job.model,
            job.optimizer,
            train_step=reading_step(job, rewound),
            validate=job.validate,
            data=rewound,
            **RANGE,
        ).run()
    assert job.bits() == plain.bits()
    assert rewound.position == reader.position


def test_a_hidden_iterator_is_refused() -> None:
    job = Job()
    batches = iter(listed(job) * 9)
    with pytest.raises(
        ValueError, match=r"train_step: from the same state it gave the losses .* Give the batches"
    ):
        AutoLRS(job.model, job.optimizer, train_step=lambda: batch_step(job)(next(batches)), **RANGE)


def test_every_step_has_the_rate_that_was_asked_for() -> None:
    """Also the first one after a restore, which brings back the rate that was kept."""
    job, seen = Job(), []

    def step() -> torch.Tensor:
        seen.append([group["lr"] for group in job.optimizer.param_groups])
        return job.step()

    job.optimizer.param_groups[1]["lr"] = 0.02
    with script():
        tuner = AutoLRS(job.model, job.optimizer, train_step=step, validate=job.validate, **RANGE)
    seen.clear()
    tuner.run()
    wanted = [lr for action in PROBING if isinstance(action, Probe | Train) for lr in action.lrs]
    assert [lrs[0] for lrs in seen] == wanted
    assert [lrs[1] for lrs in seen] == pytest.approx([0.2 * lr for lr in wanted])


def test_probes_of_one_draw_see_the_same_batches_and_others_do_not() -> None:
    job, seen = Job(), []

    def step(batch: Any) -> float:
        seen.append(tuple(batch[1].tolist()))
        return 1.0

    probes = [Probe(0, i, (0.1,) * 6, 9.0, evaluate=False, draw=d) for i, d in enumerate((0, 0, 1))]
    for source in (loader(job), listed(job), function(job), persistent_workers(job)):
        seen.clear()
        with script([Snapshot(), *probes, Restore(), Train(0, (0.1,) * 6)]):
            AutoLRS(job.model, job.optimizer, train_step=step, train_data=source, **RANGE).run()
        first, second, third, run = (seen[i : i + 6] for i in range(0, 24, 6))
        assert first == second
        assert len({tuple(first), tuple(third), tuple(run)}) == 3


def test_a_probe_ends_with_a_loss_that_is_too_high_or_with_two_that_are_not_finite() -> None:
    nan = math.nan
    for values, taken in (
        ([1.0, 5.1, 1.0], 2),
        ([nan, nan, 1.0], 2),
        ([1.0, nan, 1.0], 3),
        ([5.0, 5.0, 5.0], 3),
    ):
        job, left = Job(), list(values)
        with script([Snapshot(), Probe(0, 0, (0.1,) * 3, 5.0, evaluate=True), Restore(), Train(0, (0.1,))]):
            tuner = AutoLRS(
                job.model, job.optimizer, train_step=lambda b, left=left: left.pop(0), validate=lambda: 1.0,
                train_data=[0], **RANGE,
            )  # fmt: skip
        tuner.tell(tuner.perform(tuner.next_action()))
        result = tuner.perform(tuner.next_action())
        assert len(result.losses) == taken
        assert (result.val_loss is None) == (taken == 2)


def test_evaluating_changes_nothing() -> None:
    job = Job()

    def validate() -> torch.Tensor:
        job.model.eval()  # and never back
        torch.manual_seed(0)
        random.seed(0)
        return torch.ones(1)

    with script([Evaluate(0)]):
        tuner = AutoLRS(job.model, job.optimizer, train_step=job.step, validate=validate, **RANGE)
    state = torch.get_rng_state(), random.getstate()
    tuner.run()
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert all(module.training for module in job.model.modules())


@pytest.mark.parametrize("driven", [False, True])
def test_fingerprints_of_everything_are_taken_where_there_are_probes(
    driven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cost the more the more objects a job has; most states are kept before a piece of the run alone."""
    taken: list[int] = []
    digests = JobState.digests

    def counted(state: JobState) -> dict[str, str]:
        taken.append(1)
        return digests(state)

    monkeypatch.setattr(JobState, "digests", counted)
    pieces: list[Action] = [action for step in range(3) for action in (Snapshot(), Train(step, (0.1,)))]
    search: list[Action] = [
        Snapshot(),
        *(Probe(0, i, (0.1,), float("inf"), evaluate=False) for i in range(3)),
        Restore(),
    ]
    job = Job()
    with script([*pieces, *search, Train(3, (0.1,) * 4)]):
        tuner = AutoLRS(job.model, job.optimizer, train_step=batch_step(job), train_data=loader(job), **RANGE)
        while driven and not isinstance(action := tuner.next_action(), Done):
            tuner.tell(tuner.perform(action))
        if not driven:
            tuner.run()
    # Of what there was, after the first probe, and after the search; who drives may change things after any action.
    assert len(taken) == 3 + 3 * driven


def test_a_user_drives_it() -> None:
    plain = Job()
    with script():
        AutoLRS(plain.model, plain.optimizer, train_step=plain.step, validate=plain.validate, **RANGE).run()
    job = Job()
    with script():
        tuner = AutoLRS(job.model, job.optimizer, validation=True, **RANGE)
    while not isinstance(action := tuner.next_action(), Done):
        if isinstance(action, Train):
            losses = []
            for lr in action.lrs:
                tuner.set_lr(lr)
                losses.append(job.step().item())
            tuner.tell(Result(losses=tuple(losses)))
        elif isinstance(action, Evaluate):
            tuner.tell(Result(val_loss=job.validate()))
        elif isinstance(action, Probe):
            tuner.restore()
            for lr in action.lrs:
                tuner.set_lr(lr)
                loss = job.step().item()
            tuner.tell(Result(losses=(loss,) * len(action.lrs), val_loss=job.validate()))
        else:
            tuner.tell(tuner.perform(action))
    assert job.bits() == plain.bits()
    assert tuner.ledger.train.seconds > 0  # filled in
    assert isinstance(tuner.next_action(), Done)


@pytest.mark.parametrize("mode", ["staged", "once", "paper"])
def test_a_whole_search_and_its_replay(mode: str, tmp_path: Path) -> None:
    """The schedule of a searched run, replayed by torch's own means in a plain loop, gives bitwise its weights."""
    job = Job("adam", seed=3)
    tuner = AutoLRS(
        job.model,
        job.optimizer,
        max_steps=120,
        lr_range=(1e-5, 1.0),
        train_step=batch_step(job),
        validate=job.validate,
        train_data=loader(job),
        count_tokens=lambda batch: len(batch[1]),
        mode=mode,
        progress=False,
    )
    seed_everything()
    schedule = tuner.run()
    assert len(schedule) == 120
    assert tuner.ledger.search.steps > 0
    assert tuner.ledger.train.tokens == 120 * 16
    assert tuner.losses[-1] < tuner.losses[0]

    again = Job("adam", seed=3)
    scheduler = tuner.scheduler(again.optimizer)
    assert isinstance(scheduler, ReplayLR)
    step, steps = batch_step(again), 0
    seed_everything()
    while steps < 120:
        for batch in loader(again):
            step(batch)
            steps += 1
            if steps == 120:
                break
            scheduler.step()
    assert {k: v for k, v in again.bits().items() if "initial_lr" not in k} == job.bits()
    tuner.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[1:4] == b"PNG"
