"""The figures against closed forms."""

import pytest

from vllm_sarathi.benchmark.live.measures import percentiles_ms, summarise_streams
from vllm_sarathi.benchmark.live.streams import Delivery, StreamRecord


def stream(sent_s: float, *times_s: float, error: str | None = None, tokens_each: int = 1) -> StreamRecord:
    return StreamRecord(
        name="s",
        sent_s=sent_s,
        deliveries=tuple(Delivery(at_s, tokens_each) for at_s in times_s),
        text="",
        prompt_tokens=3,
        output_tokens=tokens_each * len(times_s),
        error=error,
    )


def test_percentiles_are_interpolated_linearly() -> None:
    # 0 .. 100 ms in steps of 1 ms: the p-th percentile is p.
    figures = percentiles_ms([k / 1e3 for k in range(101)], (50, 90, 99))
    assert figures == pytest.approx({"p50": 50.0, "p90": 90.0, "p99": 99.0})


def test_a_stall_shows_in_the_tail_and_not_in_the_median() -> None:
    # 98 gaps of 50 ms and 2 of 5 s: P99 lies between the two.
    times = [0.1]
    for gap in [0.05] * 49 + [5.0] + [0.05] * 49 + [5.0]:
        times.append(times[-1] + gap)
    gap_ms = summarise_streams([stream(0.0, *times)])["gap_ms"]
    assert gap_ms["p50"] == pytest.approx(50)
    assert gap_ms["p90"] == pytest.approx(50)
    assert gap_ms["p99"] == pytest.approx(5000)
    assert gap_ms["max"] == pytest.approx(5000)


def test_all_fields_of_a_small_run() -> None:
    result = summarise_streams(
        [
            stream(1.0, 1.5, 1.6, 1.8, tokens_each=2),
            stream(2.0, 2.1, error="broke off"),
            stream(2.5, error="HTTP 400"),
        ]
    )
    assert result == {
        "gap_ms": pytest.approx({"p50": 150.0, "p90": 190.0, "p99": 199.0, "max": 200.0}),
        "ttft_ms": pytest.approx({"mean": 300.0, "p50": 300.0, "p90": 460.0, "p99": 496.0}),
        "requests": 3,
        "completed": 1,
        "output_tokens_per_s": pytest.approx(7 / (2.1 - 1.0)),
    }


def test_gaps_of_a_stream_that_failed_count() -> None:
    stalled = stream(0.0, 0.1, 9.1, error="broke off")
    assert summarise_streams([stalled])["gap_ms"]["max"] == pytest.approx(9000)


def test_a_run_without_tokens_has_no_figures_rather_than_zeros() -> None:
    result = summarise_streams([stream(0.0, error="HTTP 500")])
    assert set(result["gap_ms"].values()) == {None}
    assert set(result["ttft_ms"].values()) == {None}
    assert result["output_tokens_per_s"] == 0
