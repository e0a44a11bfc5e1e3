"""The engine's memory: what it keeps and when, and that a bad cache costs one warning."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.core.devices import Loop, roofline
from vllm_sarathi import SarathiConfig
from vllm_sarathi.core.config import CONFIG_KEY, ConfigCarrier
from vllm_sarathi.core.controller import StepController
from vllm_sarathi.core.figures import Queues
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.engine import telemetry
from vllm_sarathi.engine.memory import CalibrationMemory, calibration_key, open_memory
from vllm_sarathi.engine.telemetry import Telemetry, open_telemetry
from vllm_sarathi.engine.vllm.internals import installed_version
from vllm_sarathi.testing.modelled import ModelledEngine

KEY = {"model": "m"}


def working(folder: Path) -> tuple[Loop, Telemetry]:
    """Return a loop on a device, and the telemetry that looks after its memory."""
    loop = Loop(StepController(SarathiConfig(tbt_slo_ms=150)), roofline(), prompt_tokens=100_000)
    watched = Telemetry(loop.controller, log=False, memory=CalibrationMemory(folder, KEY))
    observe = loop.controller.observe

    def noted(record: Any) -> None:
        observe(record)
        watched.note(record, 9, 0)

    loop.controller.observe = noted  # type: ignore[method-assign]
    return loop, watched


def test_what_one_run_learns_the_next_one_knows(tmp_path: Path) -> None:
    loop, watched = working(tmp_path)
    loop.run(100)
    watched.close()
    model = StepTimeModel()
    CalibrationMemory(tmp_path, KEY).load(model)
    shape = loop.shape(200)
    assert model.predict(shape) == pytest.approx(roofline()(shape), rel=0.05)


def test_it_is_kept_while_there_is_work_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(telemetry, "SAVE_EVERY_S", 0.0)
    loop, watched = working(tmp_path)
    loop.run(100)
    watched.flush()
    assert len(list(tmp_path.iterdir())) == 1
    watched.close()


def test_a_few_steps_are_not_worth_keeping(tmp_path: Path) -> None:
    loop, watched = working(tmp_path)
    loop.run(5)
    watched.close()
    assert not list(tmp_path.iterdir())


def test_a_broken_file_costs_one_warning_and_is_replaced(tmp_path: Path, warned: list[str]) -> None:
    loop, watched = working(tmp_path)
    loop.run(100)
    watched.close()
    [path] = tmp_path.iterdir()
    path.write_text("{")
    memory, model = CalibrationMemory(tmp_path, KEY), StepTimeModel()
    memory.load(model)
    assert not model.steps
    assert len(warned) == 1
    assert warned[0].startswith(f"Starting without calibration: {path}: is not valid JSON")
    memory.save(loop.controller.model.to_mapping())
    CalibrationMemory(tmp_path, KEY).load(model)
    assert model.steps
    assert len(warned) == 1


def test_a_folder_that_cannot_be_written_to_costs_one_warning(tmp_path: Path, warned: list[str]) -> None:
    # A file stands where the folder should be: that stops even a user who may write everywhere.
    (tmp_path / "taken").write_text("")
    loop, watched = working(tmp_path / "taken")
    for _ in range(3):
        loop.run(100)
        assert watched._memory is not None
        watched._memory.save(loop.controller.model.to_mapping())
    watched.close()
    assert warned == [f"What is learnt is not kept: {tmp_path / 'taken'} cannot be written to (File exists)."]


def test_only_what_learns_and_may_remember_has_a_memory(make_config: Any, tmp_path: Path) -> None:
    def memory_of(**settings: Any) -> CalibrationMemory | None:
        config = SarathiConfig(**settings)
        return open_memory(make_config(config), config, StepTimeModel())

    memory = memory_of(calibration_dir=str(tmp_path))
    assert memory is not None
    assert memory.folder == tmp_path
    assert memory_of(calibration_dir="none") is None
    assert memory_of(token_budget=64) is None


def test_an_engine_without_log_or_trace_has_a_telemetry_for_its_memory(
    make_config: Any, tmp_path: Path
) -> None:
    config = SarathiConfig(calibration_dir=str(tmp_path))
    watched = open_telemetry(
        make_config(config),
        config,
        StepController(config),
        log=False,
        faults=lambda: 0,
        queues=lambda: Queues(0, {}),
        most_tokens=2048,
    )
    assert watched is not None
    watched.close()


def test_the_key_tells_deployments_apart(make_config: Any, model_folder: Path) -> None:
    plain, other = make_config(SarathiConfig()), make_config(SarathiConfig(), "pipeline")
    key = calibration_key(plain)
    assert key["model"] == str(model_folder)
    assert key["dtype"] == "torch.float32"
    assert key["vllm"] == installed_version()
    assert calibration_key(make_config(SarathiConfig(tbt_slo_ms=9))) == key
    assert {k for k, v in calibration_key(other).items() if v != key[k]} == {"pipeline_parallel_size"}


def test_the_ranks_of_a_data_parallel_deployment_share_a_key(make_config: Any) -> None:
    ranks = [copy.deepcopy(make_config(SarathiConfig())) for _ in range(2)]
    for number, rank in enumerate(ranks):  # as vLLM's engine cores note which they are
        rank.parallel_config.data_parallel_size = 2
        rank.parallel_config.data_parallel_rank = rank.parallel_config.data_parallel_index = number
    key = calibration_key(ranks[0])
    assert calibration_key(ranks[1]) == key
    assert calibration_key(make_config(SarathiConfig())) != key


def test_a_simulation_remembers_nothing(make_config: Any, tmp_path: Path) -> None:
    config = make_config(SarathiConfig(calibration_dir=str(tmp_path)))
    engine = ModelledEngine(config)
    assert engine.scheduler.config == SarathiConfig(calibration_dir="none")
    assert engine.scheduler.telemetry is None
    ours = config.additional_config[CONFIG_KEY]
    assert isinstance(ours, ConfigCarrier)
    assert ours.config == replace(SarathiConfig(), calibration_dir=str(tmp_path))  # the caller's is as it was
