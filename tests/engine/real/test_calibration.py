"""The memory of a real engine: what one leaves the next one finds, and what `vllm-sarathi profile` leaves, too."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.engine.real.engines import SETTINGS, RealEngine, buildable_after_numba, prompt
from tests.engine.real.test_python_use import build, closing
from vllm_sarathi import SarathiConfig
from vllm_sarathi.benchmark.profile.device import HELD_OUT_LEVELS, HELD_OUT_STEPS
from vllm_sarathi.benchmark.profile.trace import read_step_trace
from vllm_sarathi.cli import app
from vllm_sarathi.core.steptime.store import calibration_file
from vllm_sarathi.core.types import StepShape, chunk_work
from vllm_sarathi.engine.memory import calibration_key

pytestmark = pytest.mark.slow

SHAPES = [StepShape(4 + c, 4, 400, chunk_work(100, c), 4 + (c > 0)) for c in (0, 16, 100)]


def scene(engine: RealEngine) -> None:
    for i in range(4):
        engine.add(f"stream{i}", prompt(i, 20), max_tokens=60)
    engine.step(10)
    for i in range(4):
        engine.add(f"long{i}", prompt(10 + i, 300))


def test_what_one_engine_learns_the_next_one_starts_with(tiny: Path, tmp_path: Path) -> None:
    trace = tmp_path / "steps.jsonl"
    config = SarathiConfig(tbt_slo_ms=50, calibration_dir=str(tmp_path / "kept"), step_trace=str(trace))
    with closing(build(tiny, **config.engine_args())) as llm:
        engine = RealEngine(llm, SETTINGS["max_num_batched_tokens"])
        assert not engine.scheduler.controller.model.steps
        steps = sum(
            bool(step.scheduled) for step in engine.play(scene).steps
        )  # not the look that finds nothing
        learnt = engine.scheduler.controller.model
        assert not (tmp_path / "kept").exists()
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert len(read_step_trace(trace)) == steps
    predicted = [learnt.predict(shape) for shape in SHAPES]
    assert all(seconds > 0 for seconds in predicted)
    with closing(build(tiny, **config.engine_args())) as llm:
        again = RealEngine(llm, None).scheduler.controller.model
        # A prior of fewer steps is smoothed more: on steps of a few milliseconds that is up to 5%.
        assert [again.predict(shape) for shape in SHAPES] == pytest.approx(predicted, rel=0.1)
    with closing(build(tiny, **{**config.engine_args(), "dtype": "bfloat16"})) as llm:
        assert not RealEngine(llm, None).scheduler.controller.model.steps


def test_a_profile_is_found_by_the_engine_that_serves(tiny: Path, tmp_path: Path) -> None:
    flags = ["--dtype=float32", "--enforce-eager", "--max-model-len=512", "--max-num-batched-tokens=512"]
    flags += ["--max-num-seqs=8", "--num-gpu-blocks-override=128", "--block-size=32"]
    ours = ["--model", str(tiny), "--out", str(tmp_path / "out"), "--calibration-dir", str(tmp_path / "kept")]
    with buildable_after_numba():
        done = CliRunner().invoke(app, ["profile", *ours, *flags])
    assert done.exit_code == 0, done.output
    assert f"{HELD_OUT_STEPS * len(HELD_OUT_LEVELS)} held out" in done.output
    assert "all hybrid" in done.output
    assert (tmp_path / "out" / "profile.png").read_bytes().startswith(b"\x89PNG")
    config = SarathiConfig(calibration_dir=str(tmp_path / "kept"))
    with closing(build(tiny, max_num_seqs=8, **config.engine_args())) as llm:
        kept = calibration_file(tmp_path / "kept", calibration_key(llm.llm_engine.vllm_config))
        assert [kept] == list((tmp_path / "kept").iterdir())
        assert RealEngine(llm, None).scheduler.controller.model.steps == 1


def test_a_profile_of_no_model_or_with_a_wrong_flag_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["profile", "--model", str(tmp_path), "--no-such-flag"])
    assert done.exit_code == 2
    done = CliRunner().invoke(app, ["profile", "--model", str(tmp_path), "--calibration-dir", ""])
    assert done.exit_code == 2
