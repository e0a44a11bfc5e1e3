"""Simulated against live: the calibration on steps whose times are known, the rows, and one run for real."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_sarathi.benchmark.live.arrivals import Arrival
from vllm_sarathi.benchmark.live.reference_model import tiny_model
from vllm_sarathi.benchmark.live.streams import Delivery, StreamRecord
from vllm_sarathi.benchmark.profile import simulator as validate
from vllm_sarathi.benchmark.profile.simulator import (
    LONE_REQUESTS,
    METRICS,
    REPLICAS,
    Calibration,
    calibration_arrivals,
    calibration_of,
    errors_of,
    metric_rows,
    server_flags,
    simulated,
)
from vllm_sarathi.cli import app
from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.core.step_trace import TracedStep
from vllm_sarathi.core.steptime.features import SCALES
from vllm_sarathi.core.types import StepShape, chunk_work
from vllm_sarathi.engine.offline import config_folder
from vllm_sarathi.simulation.calibrated import CalibratedTimes, StepFit, fit_steps
from vllm_sarathi.simulation.deployment import cpu_deployment, scheduler_choice
from vllm_sarathi.simulation.workloads.live import Kind, LiveWorkload


def true_s(shape: StepShape) -> float:
    """A device: 40 ms, 0.4 ms a token, 1 us a token of context, 2e-7 s a pair of tokens."""
    return 0.04 + 4e-4 * shape.tokens + 1e-6 * shape.decode_context_tokens + 2e-7 * shape.prefill_work


def traced(shape: StepShape, measured_s: float) -> TracedStep:
    return TracedStep(0.0, shape, 2048, "fixed", None, measured_s, None, 1, 0)


def random_steps(count: int, noise: float, seed: int = 0) -> list[TracedStep]:
    """Return steps as they happen: many decodes, some prompts among them; one in fifty has a hiccup."""
    rng = random.Random(seed)
    steps = []
    for i in range(count):
        decodes = rng.randrange(1, 12)
        prefill = 0 if i % 8 else int(2 ** rng.uniform(4, 11))
        shape = StepShape(
            decodes + prefill, decodes, 150 * decodes, chunk_work(0, prefill), decodes + bool(prefill)
        )
        scatter = rng.gauss(1.0, noise) * (2.0 if noise and rng.random() < 0.02 else 1.0)
        steps.append(traced(shape, true_s(shape) * scatter))
    return steps


def test_the_fit_finds_the_device_and_its_scatter() -> None:
    fit, ratios = fit_steps(random_steps(1500, 0.05))
    for step in random_steps(200, 0.0, seed=1):
        assert fit.predict(step.shape) == pytest.approx(true_s(step.shape), rel=0.05)
    for work in (True, False):
        assert np.median(ratios[work]) == pytest.approx(1.0, abs=0.03)
        assert np.percentile(ratios[work], 99) > 1.5  # the hiccups are not forgotten
    assert (len(ratios[True]), len(ratios[False])) == (188, 1312)


def test_drawn_steps_scatter_as_the_measured_ones_did() -> None:
    shape = StepShape(4, 4, 600, 0.0, 4)
    model = StepFit((0.05, *[0.0] * (len(SCALES) - 1)))
    times = CalibratedTimes(model, {False: (0.9, 1.1), True: (3.0,)}, seed=1)
    drawn = {round(times.stage_s(shape), 6) for _ in range(50)}
    assert drawn == {0.045, 0.055}
    assert times.stage_s(replace(shape, prefill_work=10.0)) == pytest.approx(0.15)
    again = [CalibratedTimes(model, {False: (0.9, 1.1), True: ()}, seed=1).stage_s(shape) for _ in range(3)]
    assert len(set(again)) == 1


@pytest.mark.parametrize("steps", [random_steps(8, 0.0), [s for s in random_steps(200, 0.0) if s.hybrid]])
def test_too_few_steps_are_no_calibration(steps: list[TracedStep]) -> None:
    with pytest.raises(RuntimeError, match="too few"):
        fit_steps(steps)


def client(ttft_s: float, error: str | None = None) -> StreamRecord:
    times = accumulate([0.05], initial=ttft_s)
    return StreamRecord("r", 0.0, tuple(Delivery(t, 1) for t in times), "", 9, 2, error)


def test_what_is_outside_the_engine_is_what_the_lone_requests_lose() -> None:
    alone = [StepShape(16 + 16 * i, 0, 0, chunk_work(0, 16 + 16 * i), 1) for i in range(LONE_REQUESTS)]
    steps = [
        step
        for shape in alone
        for step in (traced(shape, true_s(shape)), *random_steps(7, 0.0, shape.tokens)[1:])
    ]
    records = [client(true_s(shape) + 0.012) for shape in alone]
    measured = calibration_of(steps, [*records, *[client(9.0)] * 20])
    assert measured.outside_s == pytest.approx(0.012)
    with pytest.raises(RuntimeError, match="1 requests of the calibration failed; the first: HTTP 500"):
        calibration_of(steps, [*records, client(0.1, "HTTP 500")])


def test_the_calibration_is_of_other_requests_than_those_compared(tmp_path: Path) -> None:
    first = calibration_arrivals()
    assert first == calibration_arrivals()
    assert [a.at_s for a in first] == sorted(a.at_s for a in first)
    compared = parse(model(tmp_path)).loads[0].arrivals
    shared = {(a.prompt_tokens, a.output_tokens) for a in first} & {
        (a.prompt_tokens, a.output_tokens) for a in compared
    }
    assert len(shared) < 5


def model(folder: Path) -> str:
    return str(config_folder(folder / "model", max_position_embeddings=8192))


def parse(served: str, **changes: Any) -> validate.Comparison:
    values: dict[str, Any] = {
        "model": served, "workload": "validation", "schedulers": ("default", "sarathi"), "tbt_slo_ms": 250.0,
        "requests": None, "rate_qps": None, "seeds": 1, "trace": None, "trace_format": "csv",
        "too_long": "refuse", "time_scale": 1.0, "out": Path(served).parent / "out",
    }  # fmt: skip
    return validate.parse_comparison(**(values | changes))


def test_a_simulated_client_waits_for_the_engine_and_the_way(tmp_path: Path) -> None:
    fit = StepFit((0.05, *[0.0] * (len(SCALES) - 1)))
    place = cpu_deployment(model(tmp_path), fit, {True: (1.0,), False: (1.0,)}, 1)
    figures = simulated(place, scheduler_choice("default"), [Arrival(0.0, 100, 5)], 0.02, 0)
    assert figures["ttft_ms"]["mean"] == pytest.approx(70.0)
    assert figures["gap_ms"]["p50"] == pytest.approx(50.0)
    assert figures["output_tokens_per_s"] == pytest.approx(5 / 0.27)


def figures(gap: float, ttft: float, tokens: float) -> dict[str, Any]:
    return {
        "gap_ms": {"p50": gap, "p99": 2 * gap},
        "ttft_ms": {"mean": ttft, "p90": 3 * ttft},
        "output_tokens_per_s": tokens,
    }


def test_rows_have_the_published_fields_and_errors_relative_to_the_live_run() -> None:
    rows = metric_rows(
        "sarathi", [figures(9.0, 90.0, 40.0), figures(11.0, 110.0, 44.0)], [figures(8.0, 125.0, 42.0)]
    )
    assert [set(row) for row in rows] == [{"scheduler", "metric", "simulated", "live", "relative_error"}] * 5
    assert [row["metric"] for row in rows] == [name for name, _, _ in METRICS]
    assert [row["relative_error"] for row in rows] == pytest.approx([0.25, 0.25, 0.2, 0.2, 0.0])
    assert errors_of(rows) == pytest.approx((0.2, 0.25))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("default", ["--scheduler", "default", "--max-num-batched-tokens", "2048"]),
        ("default@160", ["--scheduler", "default", "--max-num-batched-tokens", "160"]),
        (
            "sarathi",
            ["--scheduler", "sarathi", "--max-num-batched-tokens", "2048", "--tbt-slo-ms", "250.0",
             "--calibration-dir", "none"],
        ),
        (
            "orca@64",
            ["--scheduler", "orca", "--max-num-batched-tokens", "2048", "--token-budget", "64",
             "--calibration-dir", "none"],
        ),
    ],
)  # fmt: skip
def test_the_server_is_told_what_the_simulator_is(tmp_path: Path, name: str, flags: list[str]) -> None:
    [choice] = parse(model(tmp_path), schedulers=(name,)).choices
    assert server_flags(choice) == flags


def test_loads_of_a_trace_and_of_other_rates(tmp_path: Path) -> None:
    trace = tmp_path / "mine.csv"
    trace.write_text(
        "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i},{10 + i},4\n" for i in range(20))
    )
    asked = parse(model(tmp_path), trace=trace, requests=8, seeds=2, time_scale=2.0)
    assert [load.name for load in asked.loads] == ["mine-0", "mine-1"]
    assert [a.prompt_tokens for a in asked.loads[1].arrivals] == list(range(18, 26))
    assert [a.at_s for a in asked.loads[1].arrivals] == pytest.approx([0.5 * i for i in range(8)])
    faster = parse(model(tmp_path), rate_qps=4.0, requests=10).loads[0].arrivals
    slower = parse(model(tmp_path), rate_qps=1.0, requests=10).loads[0].arrivals
    assert [4 * a.at_s for a in faster] == pytest.approx([a.at_s for a in slower], abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "./nowhere"], "unknown model './nowhere'"),
        (["--workload", "validatoin"], "did you mean 'validation'?"),
        (["--schedulers", "orka"], "did you mean 'orca'?"),
        (["--requests", "1"], "--requests 1: must be"),
        (["--rate", "0"], "--rate 0.0: must be"),
        (["--seeds", "0"], "--seeds 0: must be"),
        (["--tbt-slo-ms", "0"], "--tbt-slo-ms 0.0: must be"),
        (["--trace", "nowhere.csv"], "cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_before_a_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(validate, "validate", lambda *_: pytest.fail("it ran"))
    whole = ["validate", "--model", model(tmp_path), "--out", str(tmp_path / "out"), *arguments]
    done = CliRunner().invoke(app, whole)
    assert done.exit_code == 1
    assert said in re.sub(r"\s+", " ", done.output)


def test_requests_that_fail_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = parse(model(tmp_path), requests=4)
    monkeypatch.setattr(validate, "_serve_loads", lambda *_: None)
    monkeypatch.setattr(validate, "read_result", lambda *_: [client(0.1), client(0.1, "HTTP 500")])
    with pytest.raises(RuntimeError, match="default: 1 requests failed; the first: HTTP 500"):
        validate._serve(asked.choices[0], asked.loads, tmp_path, None)  # type: ignore[arg-type]


def test_a_config_error_is_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names none"):
        parse(model(tmp_path), schedulers=())


@pytest.mark.slow
def test_a_real_comparison_makes_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tiny model: whether the errors are small is for `vllm-sarathi validate` on a quiet machine to say."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    small = LiveWorkload("calibration", "few", (Kind(1.0, (16, 300), (20, 40)),), requests=10, rate_per_s=5.0)
    monkeypatch.setattr(validate, "CALIBRATION", small)
    monkeypatch.setattr(validate, "LONE_GAP_S", 0.3)
    seen: list[Calibration] = []

    def noted(steps: Sequence[TracedStep], records: Sequence[StreamRecord]) -> Calibration:
        seen.append(calibration_of(steps, records))
        return seen[-1]

    monkeypatch.setattr(validate, "calibration_of", noted)
    tiny_model(tmp_path / "tiny")
    whole = [
        "validate",
        "--model",
        str(tmp_path / "tiny"),
        "--out",
        str(tmp_path / "out"),
        "--schedulers",
        "prefill-first",
    ]
    done = CliRunner().invoke(
        app, [*whole, "--requests", "6", "--rate", "4", "--json", str(tmp_path / "rows.json")]
    )
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["scheduler"] for row in rows} == {"prefill-first"}
    assert len(rows) == len(METRICS)
    assert all(row["live"] > 0 and row["simulated"] > 0 for row in rows)
    [measured] = seen
    assert 0 <= measured.outside_s < 1
    assert "simulated against live: median error" in done.output
    assert REPLICAS > 1
