"""AutoLRS on a real Ray cluster: probes on actors, some of which are killed, and Ray Train."""

import functools
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Probe, Result, Train
from autolrs_plugin.core.schedule import Schedule
from autolrs_plugin.integrations import ray_probes
from autolrs_plugin.integrations.ray import SCHEDULE_FILE, RayProbes, TrainReports
from autolrs_plugin.training.signals import SIGNALS
from tests.autolrs.jobs import bits
from tests.autolrs.ray_job import broken, build
from tests.autolrs.scripted import script

ray = pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "max_steps": 240,
    "lr_range": (1e-5, 1.0),
    "progress": False,
    "parallel_probes": 2,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.02"  # so often may be reported
    # Workers must find the tests, too.
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=200 * 1024 * 1024, runtime_env=environment
    )
    yield
    ray.shutdown()


def searched(probes: RayProbes | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    job = build()
    tuner = AutoLRS(**job, probes=probes, **SETTINGS)
    schedule = tuner.run()
    stages = [stage.to_mapping() for stage in tuner.stages]
    return {"lrs": schedule.lrs, "losses": tuner.losses, "stages": stages, "weights": weights_of(job)}


@pytest.fixture(scope="module")
def one_by_one() -> dict[str, Any]:
    """The same search in one process."""
    return searched(None)


def test_where_probes_run_changes_no_decision_and_no_bit(one_by_one: dict[str, Any]) -> None:
    probes = RayProbes(build, actors=2)
    probes.start()
    assert len(probes.actors) == 2
    assert searched(probes) == one_by_one
    assert not probes.actors  # they are let go at the end


@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_actor_costs_its_probe_not_the_run(
    killed: int, one_by_one: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    probes = RayProbes(functools.partial(build, str(tmp_path), 0.2), actors=2)
    probes.start()
    ended = threading.Event()

    def kill() -> None:
        while len(list(tmp_path.iterdir())) < 2:  # until both are probing
            if ended.wait(0.02):
                return
        for actor in probes.actors[:killed]:
            ray.kill(actor)

    killer = threading.Thread(target=kill)
    killer.start()
    with caplog.at_level(logging.WARNING, "autolrs_plugin"):
        found = searched(probes)
    ended.set()
    killer.join()
    assert found == one_by_one
    assert caplog.text.count("an actor died") == killed


def test_a_signal_leaves_a_search_that_actors_carry_out(tmp_path: Path) -> None:
    """And what they come to of it is of no use to the search that is begun again later."""
    job, ended = build(), threading.Event()
    job["model"].stop = False

    def handler(number: int, frame: Any) -> None:
        job["model"].stop = True

    def ask() -> None:
        while not any(tmp_path.iterdir()):  # until one is probing
            if ended.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    asking = threading.Thread(target=ask)
    asking.start()
    probes = RayProbes(functools.partial(build, str(tmp_path), 0.05), actors=2)
    tuner = AutoLRS(**job, probes=probes, **SETTINGS)
    tuner.run()
    ended.set()
    asking.join()
    signal.signal(signal.SIGUSR1, before)
    assert job["model"].stop
    again = build()
    with script([Train(0, tuner.schedule.lrs)]):
        AutoLRS(**again, **SETTINGS).run()
    assert weights_of(job) == weights_of(again)
    assert tuner.stages[0].first_step > 0
    assert tuner.ledger.search.times > sum(len(stage.candidates) for stage in tuner.stages)


class Reference:
    """What an actor will have given."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Actor:
    """Gives the first byte of the state that a probe began from as its loss."""

    @property
    def probe(self) -> "Actor":
        return self

    def remote(self, number: int, state: Any, probe: Any, seed: int) -> Reference:
        return Reference({"losses": [float(state[0])]})


def test_what_was_begun_from_a_state_that_is_kept_no_more_is_of_no_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search that was left asks for the same probes again, from another state."""
    states, in_time = [b"\1"], [True]

    def wait(references: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        SIGNALS.asked = not in_time.pop(0) if in_time else False
        return references[-1:], references[:-1]

    there = SimpleNamespace(wait=wait, put=bytes, get=lambda reference: reference.value)
    monkeypatch.setattr(ray_probes, "ray", there)
    monkeypatch.setattr(SIGNALS, "asked", False)
    probes = RayProbes(build)
    monkeypatch.setattr(probes, "_actors", [Actor(), Actor()])
    probes.attach(lambda: states[-1])
    ahead = [Probe(0, index, (0.1,), float("inf"), evaluate=False) for index in (0, 1)]
    in_time[:] = [True, False]  # the second is done, and during the first a signal comes
    assert probes.probe(ahead, 0) == Result(stopped=True)
    states.append(b"\2")
    probes.forget()
    assert [probes.probe(ahead[i:], 0) for i in (0, 1)] == [Result(losses=(2.0,))] * 2
    states.append(b"\3")  # without word of it, the state is not sent again
    third = Probe(0, 2, (0.1,), float("inf"), evaluate=False)
    assert probes.probe([third], 0) == Result(losses=(2.0,))


def weights_of(job: dict[str, Any]) -> dict[str, bytes]:
    return {name: bits(value) for name, value in job["model"].state_dict().items()}


def test_without_room_probes_run_here(one_by_one: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "autolrs_plugin"):
        assert searched(RayProbes(build, cpus=64)) == one_by_one
    assert "0 of 2 actors could be had; probing one after the other in this process." in caplog.text


def test_what_the_job_raises_is_the_users() -> None:
    with pytest.raises(ArithmeticError, match="the data are not there"):
        searched(RayProbes(broken, actors=1))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="build: a dict cannot be called"):
        RayProbes({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="actors=0: must be at least 1"):
        RayProbes(build, actors=0)


def train_loop(config: dict[str, Any]) -> None:
    """One worker of a TorchTrainer, which notes every report that it makes."""
    from ray import train
    from ray.train.torch import prepare_data_loader, prepare_model

    rank = train.get_context().get_world_rank()
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    targets = inputs.argmax(1)
    model = prepare_model(nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = prepare_data_loader(DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True))

    def step(batch: Any) -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss

    def validate() -> torch.Tensor:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(inputs), targets)

    reports, report = [], train.report

    def noted(metrics: dict[str, Any], checkpoint: Any = None) -> None:
        reports.append(metrics)
        report(metrics, checkpoint=checkpoint)

    train.report = noted
    tuner = AutoLRS(
        model, optimizer, train_step=step, validate=validate, train_data=loader, max_steps=120,
        lr_range=(1e-4, 1.0), progress=False, observers=[TrainReports()],
    )  # fmt: skip
    tuner.run()
    told = {
        "reports": reports,
        "lrs": tuner.schedule.lrs,
        "losses": tuner.losses,
        "search": tuner.ledger.search.steps,
    }
    weights = [p.tolist() for p in model.parameters()]
    (Path(config["folder"]) / f"rank-{rank}.json").write_text(json.dumps({**told, "weights": weights}))


def test_ray_train_reports_each_real_step_once(tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path / "storage")),
    )
    result: Any = trainer.fit()
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["search"] > 0
    assert [report["step"] for report in first["reports"]] == list(range(1, 121))
    assert [report["lr"] for report in first["reports"]] == first["lrs"]
    assert [report["loss"] for report in first["reports"]] == first["losses"]
    assert sum("val_loss" in report for report in first["reports"]) == 5
    assert result.metrics == first["reports"][-1]
    with result.checkpoint.as_directory() as folder:
        assert list(Schedule.load(Path(folder) / SCHEDULE_FILE).lrs) == first["lrs"]
