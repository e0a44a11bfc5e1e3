"""Telemetry in the real scheduler: what it writes, what it survives, and that nothing of it reaches the engine."""

import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_sarathi import SarathiConfig
from vllm_sarathi.benchmark.profile.trace import read_step_trace
from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.core.controller import StepController
from vllm_sarathi.core.figures import ClassGaps, Queues, TokenWait
from vllm_sarathi.core.steptime.margin import CAUTION, STALE_CAUTION
from vllm_sarathi.core.types import Reason, StepRecord, StepShape
from vllm_sarathi.engine import metrics, plugin, telemetry
from vllm_sarathi.engine.telemetry import Telemetry
from vllm_sarathi.engine.trace_file import StepTraceFile
from vllm_sarathi.engine.vllm.internals import logger
from vllm_sarathi.testing.modelled import ModelledEngine


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What our logger says."""
    said: list[str] = []

    def handle(record: logging.LogRecord) -> None:
        said.append(record.getMessage())

    monkeypatch.setattr(logger, "handle", handle)
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(logger, "_cache", {})
    return said


def shown(folder: Path) -> str:
    """Return what a server shows at /metrics of the engines that use this folder."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
    return generate_latest(registry).decode()


def record(
    measured_s: float = 0.1, decodes: int = 8, chunk: int = 32, predicted_s: float = 0.09
) -> StepRecord:
    shape = StepShape(decodes + chunk, decodes, 500 * decodes, 16.0 * chunk, decodes + (chunk > 0))
    return StepRecord(shape, 48, Reason.SLO if chunk else Reason.NONE, predicted_s, measured_s, 1.0)


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "sarathi-telemetry"]


def test_each_step_of_the_scheduler_is_a_line_of_the_trace(make_config: Any, tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    engine = ModelledEngine(make_config(SarathiConfig(tbt_slo_ms=100, step_trace=str(file))))
    engine.add("a", 20, max_tokens=30)
    for _ in range(5):
        engine.step()
    engine.add("b", 100, max_tokens=5)
    engine.add("c", 100, max_tokens=5)
    steps = 5 + engine.drain()
    assert engine.scheduler.faults.total == 0
    engine.scheduler.shutdown()
    traced = read_step_trace(file)
    assert len(traced) == steps
    assert sum(step.shape.tokens for step in traced) == 20 + 29 + 2 * (100 + 4)
    assert {step.slo_s for step in traced} == {0.1}
    assert any(step.hybrid and step.running == 2 for step in traced)
    assert traced[0].predicted_s is None
    assert traced[-1].predicted_s is not None
    engine.scheduler.shutdown()  # again: nothing more
    assert len(read_step_trace(file)) == steps


def test_a_scheduler_that_nobody_watches_has_no_thread(make_config: Any) -> None:
    before = len(threads())
    engine = ModelledEngine(make_config(SarathiConfig(tbt_slo_ms=100)))
    assert engine.scheduler.telemetry is None
    assert len(threads()) == before


def test_a_telemetry_that_nobody_holds_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "TICK_S", 0.01)
    held = Telemetry(StepController(SarathiConfig()))
    thread, ref = held._thread, weakref.ref(held)
    assert thread.is_alive()
    del held
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    assert ref() is None


def test_a_trace_holds_the_steps_from_its_start_to_its_end(tmp_path: Path) -> None:
    """The thread looks once a second: what it finds may be older than the trace, or younger."""
    watched = Telemetry(StepController(SarathiConfig()), log=False)
    trace = StepTraceFile(tmp_path / "steps.jsonl")
    for running, of in ((1, None), (2, trace), (3, trace), (4, None)):
        watched.trace = of
        watched.note(record(), running, 0)
    watched.close()
    assert [step.running for step in read_step_trace(trace.path)] == [2, 3]


def test_the_thread_writes_without_being_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(telemetry, "TICK_S", 0.01)
    file = tmp_path / "steps.jsonl"
    watched = Telemetry(StepController(SarathiConfig()), log=False, trace=StepTraceFile(file))
    watched.note(record(), 8, 0)
    written = threading.Event()
    for _ in range(1000):
        if file.exists() and file.stat().st_size:
            break
        written.wait(0.01)
    assert len(read_step_trace(file)) == 1
    watched.close()


def test_the_log_line(logged: list[str]) -> None:
    watched = Telemetry(StepController(SarathiConfig(tbt_slo_ms=150)))
    for measured_s in (0.1, 0.2, float("nan"), 0.0, -1.0):
        watched.note(record(measured_s), running=9, waiting=3)
    watched.flush()
    assert not logged  # not yet time
    watched.close()
    assert logged == [
        "Sarathi: 9 running, 3 waiting, 2 steps, budget P50 48 tokens, 50.0% of 16 gaps within 150 ms, "
        "prediction error P50 32.5%, P90 50.5%"
    ]


def test_a_gap_with_a_preemption_in_it_is_in_every_figure(
    logged: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path))
    watched = Telemetry(StepController(SarathiConfig(tbt_slo_ms=150)))
    watched.note(
        record(0.1), 8, 0, (), (), (TokenWait("default", 0.7, 0.15), TokenWait("default", 9.0, None))
    )
    watched.close()
    assert "88.9% of 9 gaps within 150 ms" in logged[0]
    page = shown(tmp_path)
    name = 'vllm_sarathi_time_between_tokens_slo_ratio_bucket{engine="0",le='
    for line in (
        'vllm_sarathi_gaps_total{engine="0",slo_class="default"} 9.0',
        'vllm_sarathi_gaps_kept_total{engine="0",slo_class="default"} 8.0',
        f'{name}"3.0",slo_class="default"}} 8.0',
        f'{name}"5.0",slo_class="default"}} 9.0',
        f'{name}"+Inf",slo_class="default"}} 9.0',
    ):
        assert line in page


def test_nothing_is_said_while_there_is_no_work(logged: list[str]) -> None:
    watched = Telemetry(StepController(SarathiConfig()))
    watched.tell()
    watched.close()
    assert not logged


def test_an_slo_that_cannot_be_kept_is_in_the_log_once_and_in_the_metrics(
    logged: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path))
    watched = Telemetry(StepController(SarathiConfig(tbt_slo_ms=10)), rank=1)
    for _ in range(3):
        for _ in range(20):
            watched.note(record(0.04, chunk=0), running=8, waiting=0)
        watched.flush()
        watched.tell()
    watched.close()
    advice = [said for said in logged if "cannot be kept" in said]
    assert len(advice) == 1
    # 40 ms, and the caution of a model that knows nothing of prompts, which grows while there are none.
    needed_ms = int(advice[0].partition("--tbt-slo-ms ")[2].split()[0])
    assert 40 * (1 + CAUTION) <= needed_ms <= 40 * (1 + CAUTION + STALE_CAUTION) + 1
    page = shown(tmp_path)
    for line in (
        'vllm_sarathi_slo_unattainable{engine="1",slo_class="default"} 1.0',
        'vllm_sarathi_tbt_slo_seconds{engine="1"} 0.01',
        'vllm_sarathi_gaps_total{engine="1",slo_class="default"} 480.0',
        'vllm_sarathi_gaps_kept_total{engine="1",slo_class="default"} 0.0',
        'vllm_sarathi_time_between_tokens_slo_ratio_bucket{engine="1",le="5.0",slo_class="default"} 480.0',
        'vllm_sarathi_time_between_tokens_slo_ratio_bucket{engine="1",le="3.0",slo_class="default"} 0.0',
        'vllm_sarathi_decode_step_seconds{engine="1"} 0.04',
    ):
        assert line in page


def test_errors_of_ours_are_counted_in_the_metrics_even_where_no_step_is_planned(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path))
    engine = ModelledEngine(make_config(SarathiConfig(tbt_slo_ms=100)), log_stats=True)
    monkeypatch.setattr(engine.scheduler.controller, "plan", lambda view: 1 / 0)
    engine.add("a", 20, max_tokens=3)
    engine.drain()
    engine.scheduler.telemetry.flush()
    page = shown(tmp_path)
    assert engine.scheduler.faults.total > 0
    assert f'vllm_sarathi_faults_total{{engine="0"}} {float(engine.scheduler.faults.total)}' in page
    engine.scheduler.shutdown()


def test_first_tokens_are_compared_with_their_slo(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path))
    config = SarathiConfig(tbt_slo_ms=100, ttft_slo_ms=1000, prefill_order="deadline")
    engine = ModelledEngine(make_config(config), log_stats=True)
    engine.scheduler.wall_clock = lambda: 100.0
    engine.add("in time", 20, max_tokens=60, arrival_s=99.4)
    engine.step()
    engine.add(
        "late", 200, max_tokens=3, arrival_s=98.5
    )  # in several chunks, the last of which brings the token
    engine.drain()
    engine.scheduler.telemetry.flush()
    page = shown(tmp_path)
    name = "vllm_sarathi_time_to_first_token_slo_ratio"
    for line in (
        'vllm_sarathi_first_tokens_total{engine="0",slo_class="default"} 2.0',
        'vllm_sarathi_first_tokens_kept_total{engine="0",slo_class="default"} 1.0',
        f'{name}_bucket{{engine="0",le="0.5",slo_class="default"}} 0.0',
        f'{name}_bucket{{engine="0",le="0.75",slo_class="default"}} 1.0',
        f'{name}_bucket{{engine="0",le="1.5",slo_class="default"}} 2.0',
        f'{name}_sum{{engine="0",slo_class="default"}} 2.',
    ):
        assert any(shown_line.startswith(line) for shown_line in page.splitlines()), line
    engine.scheduler.shutdown()


def test_metrics_without_engines_are_empty(tmp_path: Path) -> None:
    assert "vllm_sarathi" not in shown(tmp_path)


def test_an_engine_whose_folder_is_gone_goes_on(
    monkeypatch: pytest.MonkeyPatch, warned: list[str], tmp_path: Path
) -> None:
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path / "elsewhere"))
    watched = Telemetry(StepController(SarathiConfig(tbt_slo_ms=10)), rank=3)
    watched.note(record(), 1, 0)
    watched.close()
    assert len(warned) == 1
    assert "engine 3 are not at /metrics" in warned[0]
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path / "folder"))
    watched = Telemetry(StepController(SarathiConfig(tbt_slo_ms=10)))
    (tmp_path / "folder").rmdir()
    watched.note(record(), 1, 0)
    watched.close()
    assert watched.figures.counters["steps", ""] == 1
    assert 'vllm_sarathi_steps_total{engine="0"} 1.0' in shown(tmp_path / "folder")


def test_a_server_started_by_another_has_a_folder_of_its_own(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from vllm_sarathi.core.figures import Figures\n"
        "from vllm_sarathi.engine.metrics import FOLDER_VARIABLE, FiguresFiles, serve_figures\n"
        "from prometheus_client import REGISTRY, generate_latest\n"
        "serve_figures()\n"
        "first = os.environ[FOLDER_VARIABLE]\n"
        "serve_figures()\n"
        "assert os.environ[FOLDER_VARIABLE] == first\n"
        "assert os.environ['VLLM_RAY_EXTRA_ENV_VARS_TO_COPY'] == 'MINE,' + FOLDER_VARIABLE\n"
        "figures = Figures()\n"
        "figures.count('steps', amount=7)\n"
        "FiguresFiles(Path(first), 0, 1).write(figures.samples(), 1.0)\n"
        "print(generate_latest(REGISTRY).decode())\n"
    )
    env = {
        **os.environ,
        metrics.FOLDER_VARIABLE: str(tmp_path),
        metrics.RAY_COPIES_VARIABLE: "MINE",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert 'vllm_sarathi_steps_total{engine="0"} 7.0' in done.stdout
    assert not list(tmp_path.iterdir())


def test_where_there_are_several_api_servers_the_engines_use_the_folder_that_they_share(
    tmp_path: Path,
) -> None:
    code = (
        "import os, sys\n"
        "from vllm_sarathi.engine.metrics import FOLDER_VARIABLE, serve_figures\n"
        "serve_figures()\n"
        "assert 'prometheus_client' not in sys.modules\n"  # nothing of ours is in between
        "assert os.environ['VLLM_RAY_EXTRA_ENV_VARS_TO_COPY'] == FOLDER_VARIABLE\n"
        "print(os.environ[FOLDER_VARIABLE])\n"
    )
    env = {**os.environ, metrics.SHARED_FOLDER_VARIABLE: str(tmp_path), metrics.RAY_COPIES_VARIABLE: ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path)


def test_what_the_loop_counts_is_shown_by_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path))
    queues = Queues(7, {"interactive": 2, "batch": 5})
    watched = Telemetry(StepController(SarathiConfig(tbt_slo_ms=10)), queues=lambda: queues)
    watched.count("refused_requests", "batch")
    watched.count("refused_requests", "batch")
    watched.count("relegated_requests")
    gaps = (ClassGaps("interactive", 3, 0.2), ClassGaps("batch", 5, 0.05))
    watched.note(record(0.1), 8, 0, gaps)
    watched.close()
    page = shown(tmp_path)
    for line in (
        'vllm_sarathi_refused_requests_total{engine="0",slo_class="batch"} 2.0',
        'vllm_sarathi_relegated_requests_total{engine="0",slo_class="default"} 1.0',
        'vllm_sarathi_waiting_requests{engine="0",slo_class="batch"} 5.0',
        'vllm_sarathi_running_requests{engine="0"} 7.0',
        'vllm_sarathi_gaps_kept_total{engine="0",slo_class="interactive"} 3.0',
        'vllm_sarathi_gaps_kept_total{engine="0",slo_class="batch"} 0.0',
    ):
        assert line in page


CLASSES: dict[str, Any] = {
    "classes": {
        "quick": {"tbt_slo_ms": 30},
        "plain": {},
        "slow": {"tbt_slo_ms": 200},
        "batch": {"batch": True},
    }
}


def test_with_classes_each_is_judged_by_its_own_slo(
    logged: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The server's SLO, which binds nobody but the class that has none of its own, is no other class's."""
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path))
    config = SarathiConfig.from_mapping({"tbt_slo_ms": 35, "slo_classes": CLASSES})
    trace = StepTraceFile(tmp_path / "steps.jsonl")
    watched = Telemetry(StepController(config), trace=trace)
    for _ in range(20):
        watched.note(record(0.04, chunk=0), 8, 0, (ClassGaps("slow", 6, 0.2), ClassGaps("batch", 2, None)))
    watched.flush()
    watched.tell()
    assert logged == ["Sarathi: 8 running, 0 waiting, 20 steps, slow 100.0% of 120 gaps within 200 ms"]
    for _ in range(20):
        gaps = ClassGaps("quick", 2, 0.03), ClassGaps("plain", 1, 0.035), ClassGaps("slow", 5, 0.2)
        watched.note(record(0.04, chunk=0), 8, 0, (*gaps, ClassGaps("slow", 1, 0.3)))
    watched.flush()
    watched.tell()
    assert "plain 0.0% of 20 gaps within 35 ms, quick 0.0% of 40 gaps within 30 ms" in logged[1]
    assert "slow 100.0% of 120 gaps within their SLOs" in logged[1]
    quick, plain = logged[2:]
    assert quick.startswith("The SLO of 30 ms between tokens of class quick cannot be kept")
    assert "What would help: classes.quick.tbt_slo_ms 4" in quick
    assert plain.startswith("The SLO of 35 ms between tokens of class plain cannot be kept")
    assert "What would help: --tbt-slo-ms 4" in plain
    page = shown(tmp_path)
    for name, value in {"quick": 1.0, "plain": 1.0, "slow": 0.0, "batch": 0.0}.items():
        assert f'vllm_sarathi_slo_unattainable{{engine="0",slo_class="{name}"}} {value}' in page
    watched.close()
    assert [step.slo_s for step in read_step_trace(tmp_path / "steps.jsonl")] == [0.2] * 20 + [0.03] * 20


def test_what_is_of_the_last_seconds_ends_when_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path))
    watched = Telemetry(StepController(SarathiConfig(tbt_slo_ms=10)))
    for chunk in (0, 32):
        for _ in range(20):
            watched.note(record(0.04, chunk=chunk), 8, 0)
    watched.flush()
    watched.tell()
    medians = ("decode_step_seconds", "token_budget", "prediction_error_ratio")
    assert all(f"vllm_sarathi_{name}{{" in shown(tmp_path) for name in medians)
    assert 'vllm_sarathi_slo_unattainable{engine="0",slo_class="default"} 1.0' in shown(tmp_path)
    monkeypatch.setattr(telemetry, "WINDOW_S", 0.0)  # the ten seconds are over, and nothing has run
    watched.flush()
    assert not any(f"vllm_sarathi_{name}{{" in shown(tmp_path) for name in medians)
    assert 'vllm_sarathi_slo_unattainable{engine="0",slo_class="default"} 0.0' in shown(tmp_path)
    watched.close()


def test_the_headroom_of_an_idle_engine_is_that_of_an_empty_one(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path))
    engine = ModelledEngine(make_config(SarathiConfig(tbt_slo_ms=1000)), log_stats=True)
    engine.scheduler.clock = iter(x / 100 for x in range(10**6)).__next__
    telemetry = engine.scheduler.telemetry
    telemetry.tell()
    assert ("headroom_tokens_per_second", "") not in telemetry.figures.gauges  # nothing is known yet
    for i in range(4):
        engine.add(str(i), 60, max_tokens=20)
    engine.drain()
    telemetry.flush()
    telemetry.tell()
    telemetry.tell()
    # A step takes 10 ms whatever is in it: 100 steps a second, each as full as the engine lets it be.
    assert telemetry.figures.gauges["headroom_tokens_per_second", ""] == pytest.approx(25_600, rel=0.2)
    engine.scheduler.shutdown()


def test_batch_work_takes_no_headroom(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Night work that fills the device calls for no more replicas: it gives way to whoever has an SLO."""
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path))
    rooms = {}
    for slo_class in ("slow", "batch"):
        config = SarathiConfig.from_mapping({"slo_classes": CLASSES, "calibration_dir": "none"})
        engine = ModelledEngine(make_config(config), log_stats=True, num_blocks=400)
        engine.scheduler.clock = iter(x / 100 for x in range(10**6)).__next__
        watched = engine.scheduler.telemetry
        for i in range(60):
            engine.add(
                f"{i}",
                200,
                max_tokens=5,
                sampling={"extra_args": {"slo_class": slo_class, "slo_tenant": "a"}},
            )
        for _ in range(30):
            engine.step()
        watched.flush()
        monkeypatch.setattr(
            watched, "_window_since_s", time.monotonic() - 0.6
        )  # 30 steps, 3 times 10 ms each
        watched.tell()
        rooms[slo_class] = watched.figures.gauges["headroom_tokens_per_second", ""]
        counted = watched.figures.counters
        share = counted["batch_prefill_tokens", ""] / counted["prefill_tokens", ""]
        assert share == (slo_class == "batch")
        waiting = watched.figures.gauges["waiting_requests", slo_class]
        assert waiting > 0
        assert watched.figures.gauges["batch_waiting_requests", ""] == (
            waiting if slo_class == "batch" else 0
        )
        engine.scheduler.shutdown()
    assert rooms["slow"] < 5_000
    assert rooms["batch"] == pytest.approx(25_600, rel=0.1)  # as of an engine without any


# The file.


def test_a_trace_of_full_size_makes_room(tmp_path: Path) -> None:
    file = StepTraceFile(tmp_path / "steps.jsonl", max_bytes=1000)
    for i in range(100):
        file.write([f"{i:03} {'x' * 45}\n"])
    kept = [(tmp_path / name).read_text().splitlines() for name in ("steps.jsonl.1", "steps.jsonl")]
    assert len(list(tmp_path.iterdir())) == 2
    numbers = [int(line[:3]) for lines in kept for line in lines]
    assert numbers == list(range(numbers[0], 100))
    assert 20 <= len(numbers) <= 40
    assert all(len("\n".join(lines)) <= 1000 for lines in kept)


def test_a_new_start_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for i in range(2):
        StepTraceFile(tmp_path / "steps.jsonl").write([f"{i}\n"])
    assert (tmp_path / "steps.jsonl").read_text() == "0\n1\n"


def test_a_full_disk_ends_the_trace_with_one_warning(warned: list[str]) -> None:
    file = StepTraceFile(Path("/dev/full"))
    for _ in range(3):
        file.write(["line\n"])
    assert warned == ["The step trace /dev/full ends here: it cannot be written (No space left on device)."]


def test_a_full_disk_does_not_end_the_engine(make_config: Any, warned: list[str]) -> None:
    engine = ModelledEngine(make_config(SarathiConfig(step_trace="/dev/full")))
    engine.add("a", 20)
    engine.drain()
    engine.scheduler.shutdown()
    assert engine.scheduler.faults.total == 0
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("path", "reason"), [("/nowhere/x.jsonl", "No such file"), ("/proc", "Is a directory")]
)
def test_a_trace_that_cannot_be_written_is_refused_before_a_model_loads(
    make_config: Any, path: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"--step-trace '{path}': cannot be written \({reason}"):
        plugin.check_before_load(make_config(SarathiConfig(step_trace=path)))


@pytest.mark.parametrize(
    ("size", "rank", "index", "name"),
    [
        (1, 0, 0, "steps.jsonl"),
        (2, 0, 0, "steps.0.jsonl"),
        (2, 1, 1, "steps.1.jsonl"),
        (1, 0, 1, "steps.1.jsonl"),
    ],
)
def test_each_data_parallel_engine_has_a_file_and_figures_of_its_own(
    make_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    size: int,
    rank: int,
    index: int,
    name: str,
) -> None:
    """Of a dense model vLLM has each engine think that it is the only one, and keeps its number as the index."""
    (tmp_path / "figures").mkdir()
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path / "figures"))
    config = make_config(SarathiConfig(step_trace=str(tmp_path / "steps.jsonl")), "pipeline")
    parallel = config.parallel_config
    parallel.data_parallel_size, parallel.data_parallel_rank, parallel.data_parallel_index = size, rank, index
    engine = ModelledEngine(config, log_stats=True)
    engine.add("a", 20)
    engine.drain()
    engine.scheduler.shutdown()
    assert [path.name for path in tmp_path.glob("*.jsonl")] == [name]
    assert f'vllm_sarathi_steps_total{{engine="{index}"}}' in shown(tmp_path / "figures")


@pytest.mark.parametrize(
    ("settings", "aim"),
    [
        ({"tbt_slo_ms": 50}, "at most 50 ms between two tokens, prefill order fcfs"),
        ({"token_budget": 256, "prefill_order": "sjf"}, "a budget of 256 tokens, prefill order sjf"),
        (
            {"slo_classes": {"classes": {"chat": {"ttft_slo_ms": 500}, "night": {"batch": True}}}},
            "SLOs of 2 classes, prompts by their SLOs",
        ),
    ],
)
def test_what_a_server_goes_by_is_told_as_it_is(settings: dict[str, Any], aim: str) -> None:
    assert telemetry.aim_of(SarathiConfig.from_mapping(settings)) == aim
