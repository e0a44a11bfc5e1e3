"""Workloads: their published statistics, their seeds, their arrivals; traces and what is wrong with them."""

import gzip
import json
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.traces import read_trace, write_trace
from vllm_sarathi.simulation.workloads.lengths import (
    ARXIV,
    CHAT,
    bimodal_lengths,
    uniform_lengths,
    zipf_lengths,
)
from vllm_sarathi.simulation.workloads.registry import WORKLOADS, arrival_times, synthetic
from vllm_sarathi.simulation.workloads.requests import (
    PREFIX_TOKENS,
    SimulatedRequest,
    at_rate,
    prompt_token_ids,
)
from vllm_sarathi.simulation.workloads.streams import CLASSES

MANY = 20_000


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize(
    ("dataset", "prompt", "output", "longest"),
    [
        # Sarathi-Serve, table 2: median and P90 of prompts and answers; longer requests were left out.
        (CHAT, (1730, 5696, 2088), (415, 834, None), 8192),
        (ARXIV, (7059, 12985, 3638), (208, 371, None), 16384),
    ],
)
def test_datasets_have_their_published_statistics(
    dataset: object, prompt: tuple[int, int, int], output: tuple[int, int, None], longest: int
) -> None:
    prompts, outputs = dataset.draw(rng(), MANY)  # type: ignore[attr-defined]
    assert (prompts + outputs).max() <= longest
    assert min(prompts.min(), outputs.min()) >= 1
    assert np.median(prompts) == pytest.approx(prompt[0], rel=0.03)
    assert np.percentile(prompts, 90) == pytest.approx(prompt[1], rel=0.03)
    assert prompts.std() == pytest.approx(prompt[2], rel=0.03)
    assert np.median(outputs) == pytest.approx(output[0], rel=0.05)
    assert np.percentile(outputs, 90) == pytest.approx(output[1], rel=0.05)


def test_lengths_of_the_other_workloads() -> None:
    prompts, outputs = uniform_lengths(rng(), MANY)
    assert (prompts.min(), prompts.max(), outputs.min(), outputs.max()) == (64, 4096, 16, 512)
    assert prompts.mean() == pytest.approx(2080, rel=0.02)
    prompts, outputs = zipf_lengths(rng(), MANY)
    values, counts = np.unique(prompts, return_counts=True)
    # Frequency falls as 1 / rank: the first is ten times as frequent as the tenth.
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.3)
    assert (values[0], values[9]) == (32, 320)
    prompts, outputs = bimodal_lengths(rng(), MANY)
    assert (prompts >= 8000).mean() == pytest.approx(0.1, abs=0.01)
    assert not ((prompts > 500) & (prompts < 8000)).any()


def test_three_classes_with_their_slos() -> None:
    requests = synthetic("classes", 1.0, 4000, seed=1)
    for kind in CLASSES:
        mine = [r for r in requests if r.kind == kind.name]
        assert len(mine) / len(requests) == pytest.approx(kind.share, abs=0.03)
        assert {(r.tbt_slo_ms, r.ttft_slo_ms) for r in mine} == {(kind.tbt_slo_ms, kind.ttft_slo_ms)}
        assert all(kind.prompt[0] <= r.prompt_tokens <= kind.prompt[1] for r in mine)


@pytest.mark.parametrize("seed", [1, 101])
def test_mooncake_has_the_published_statistics_of_its_trace(seed: int) -> None:
    """arXiv 2407.00079, section 4: mean lengths, hits of a cache that never forgets, blocks that are used once."""
    requests = synthetic("mooncake", 6.6, 23_608, seed)
    assert np.mean([r.prompt_tokens for r in requests]) == pytest.approx(7590, rel=0.03)
    assert np.mean([r.output_tokens for r in requests]) == pytest.approx(182, rel=0.03)
    uses = Counter(block for r in requests for block in r.prefix)
    blocks = sum(uses.values())
    assert (blocks - len(uses)) / blocks == pytest.approx(0.5, abs=0.02)
    assert Counter(uses.values())[1] / len(uses) > 0.5
    assert max(uses.values()) / len(requests) == pytest.approx(0.6, abs=0.02)


def test_a_turn_of_mooncake_repeats_what_was_said_before() -> None:
    requests = synthetic("mooncake", 1.0, 2000, seed=2)
    last_of = {r.prefix[:-1]: r for r in requests if r.prompt_tokens % PREFIX_TOKENS}
    repeated = 0
    for request in requests:
        assert len(request.prefix) == -(-request.prompt_tokens // PREFIX_TOKENS)
        assert request.prompt_tokens + request.output_tokens <= 32_768
        earlier = [
            last_of[request.prefix[:n]]
            for n in range(2, len(request.prefix))
            if request.prefix[:n] in last_of
        ]
        before = [r for r in earlier if r.arrival_s < request.arrival_s]
        repeated += bool(before)
        assert all(r.prompt_tokens + r.output_tokens <= request.prompt_tokens for r in before[-1:])
    assert repeated > 800


@pytest.mark.parametrize(("kind", "squared_variation"), [("poisson", 1.0), ("gamma", 4.0), ("fixed", 0.0)])
def test_arrivals_have_their_rate_and_their_burstiness(kind: str, squared_variation: float) -> None:
    times = arrival_times(kind, 5.0, MANY, rng())
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(squared_variation, rel=0.1, abs=1e-9)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_seed_decides_all_of_a_workload_and_the_rate_only_the_times(workload: str) -> None:
    np.random.seed(1)  # the global generator, which nobody may touch
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    one = synthetic(workload, 2.0, 50, seed=3)
    assert synthetic(workload, 2.0, 50, seed=3) == one
    assert synthetic(workload, 2.0, 50, seed=4) != one
    faster = synthetic(workload, 4.0, 50, seed=3)
    assert [(r.prompt_tokens, r.output_tokens) for r in faster] == [
        (r.prompt_tokens, r.output_tokens) for r in one
    ]
    assert [2 * r.arrival_s for r in faster] == pytest.approx([r.arrival_s for r in one])
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


def test_a_trace_at_another_rate_keeps_its_rhythm() -> None:
    requests = [SimulatedRequest(t, 1, 1) for t in (10.0, 11.0, 14.0)]
    assert [r.arrival_s for r in at_rate(requests, 2.0)] == pytest.approx([0.0, 0.25, 1.0])
    together = [SimulatedRequest(3.0, 1, 1)] * 2
    assert [r.arrival_s for r in at_rate(together, 2.0)] == [0.0, 0.5]


@pytest.mark.parametrize("arrivals", ["poisson", "gamma", "fixed"])
def test_a_rate_at_which_the_clock_would_not_see_a_step_is_refused(arrivals: str) -> None:
    said = r"--rate 1e-300: 20 requests would take \S+ s to arrive; at most 1e\+09 s can be simulated"
    with pytest.raises(ConfigError, match=said):
        synthetic("chat", 1e-300, 20, 0, arrivals)
    with pytest.raises(ConfigError, match=said):
        at_rate([SimulatedRequest(float(t), 1, 1) for t in range(20)], 1e-300)
    assert len(synthetic("chat", 1e-6, 20, 0, arrivals)) == 20


def test_equal_pieces_of_prefix_are_equal_tokens() -> None:
    first = prompt_token_ids(SimulatedRequest(0, 1200, 1, prefix=(1, 2, 3)), 0, True)
    second = prompt_token_ids(SimulatedRequest(0, 1500, 1, prefix=(1, 2, 9)), 1, True)
    own = prompt_token_ids(SimulatedRequest(0, 1200, 1), 2, True)
    assert (len(first), len(second), len(own)) == (1200, 1500, 1200)
    assert first[: 2 * PREFIX_TOKENS] == second[: 2 * PREFIX_TOKENS]
    assert not set(first[2 * PREFIX_TOKENS :]) & set(second[2 * PREFIX_TOKENS :])
    assert not set(own) & set(first + second)


# --- Traces ---

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:50.9951690,879,55
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_azures_columns(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "azure.csv", AZURE), "azure", 4096)
    assert [(r.prompt_tokens, r.output_tokens) for r in trace.requests] == [(374, 44), (396, 109), (879, 55)]
    assert [r.arrival_s for r in trace.requests] == pytest.approx([0.0, 4.314579, 4.314579], abs=1e-5)


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="a system without time zones of a process")
def test_azures_dates_with_and_without_a_zone_are_of_one_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its later traces leave the fraction out where it is 0; here, the local clock skips 2:00 to 3:00."""
    header = AZURE.splitlines()[0]
    days = ("01:59:59.500000", "02:00:00", "02:30:00.25", "03:00:00")
    for zone in ("+00:00", ""):
        rows = "".join(f"2024-03-10 {at}{zone},1,1\n" for at in days)
        monkeypatch.setenv("TZ", "America/New_York")
        time.tzset()
        try:
            trace = read_trace(write(tmp_path, "azure.csv", f"{header}\n{rows}"), "azure", 4096)
        finally:
            monkeypatch.undo()
            time.tzset()
        assert [r.arrival_s for r in trace.requests] == [0.0, 0.5, 1800.75, 3600.5]


def test_mooncakes_columns_and_its_shared_prefixes(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 27000, "input_length": 1200, "output_length": 52, "hash_ids": [46, 47, 48]},
        {"timestamp": 30500, "input_length": 700, "output_length": 5, "hash_ids": [46, 49]},
        {"timestamp": 30500, "input_length": 10, "output_length": 5},
    ]
    path = write(tmp_path, "moon.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + "\n")
    trace = read_trace(path, "mooncake", 4096, time_scale=2.0)
    assert [r.arrival_s for r in trace.requests] == pytest.approx([0.0, 1.75, 1.75])
    assert [r.prefix for r in trace.requests] == [(46, 47, 48), (46, 49), ()]


@pytest.mark.parametrize("name", ["own.csv", "own.jsonl"])
def test_our_own_columns_as_csv_and_as_json_lines(tmp_path: Path, name: str) -> None:
    rows = [
        {"arrival_s": 5.0, "prompt_tokens": 3, "output_tokens": 2},
        {"arrival_s": 6.5, "prompt_tokens": 4, "output_tokens": 1},
    ]
    if name.endswith(".csv"):
        text = "﻿prompt_tokens,output_tokens,arrival_s,else\n3,2,5.0,x\n4,1,6.5,y\n"  # with a byte order mark
    else:
        text = "\n".join(map(json.dumps, rows))
    trace = read_trace(write(tmp_path, name, text), "csv", 4096)
    assert trace.requests == (SimulatedRequest(0.0, 3, 2), SimulatedRequest(1.5, 4, 1))


OWN = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arrival_s,prompt_tokens\n0,1\n", "t.csv: has no column 'output_tokens'"),
        ("", "t.csv: has no column 'arrival_s'"),
        (OWN, "t.csv: holds no request that can be served (0 are too long)"),
        (OWN + "0,1,1\n-1,1,1\n", "t.csv, row 3: arrival_s '-1' must be a time of 0 or later"),
        (OWN + "nan,1,1\n", "t.csv, row 2: arrival_s 'nan' must be"),
        (OWN + "soon,1,1\n", "t.csv, row 2: arrival_s 'soon' is not a time"),
        (
            OWN + "5,1,1\n6,1,1\n4,1,1\n",
            "t.csv, row 4: arrives before the row above it; sort the trace by arrival_s",
        ),
        (OWN + "0,1,1\n1,0,1\n", "t.csv, row 3: prompt_tokens '0' must be a whole number of at least 1"),
        (OWN + "0,1,0\n", "t.csv, row 2: output_tokens '0' must be"),
        (OWN + "0,1.5,1\n", "t.csv, row 2: prompt_tokens '1.5' must be"),
        (OWN + "0,many,1\n", "t.csv, row 2: prompt_tokens 'many' is not a number"),
        (
            OWN + "1e12,1,1\n2.5e12,1,1\n",
            "t.csv, row 3: arrives 1.5e+12 s after the first; at most 1e+09 s can be simulated",
        ),
        (OWN + "0,1\n", "t.csv, row 2: output_tokens None is not a number"),
        (OWN + "0,1,1\n0,1,500,5\n", "t.csv, row 3: has 4 cells, more than the 3 columns"),
        (
            "arrival_s,prompt_tokens,output_tokens,prompt_tokens\n0,1,1,2\n",
            "t.csv: has 2 columns 'prompt_tokens'",
        ),
        (OWN + "0,1,1\n1,4000,97\n", "t.csv, row 3: 4000 + 97 tokens are more than the model's 4096"),
    ],
)
def test_what_is_wrong_with_a_trace_is_named_by_its_row(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_trace(write(tmp_path, "t.csv", text), "csv", 4096)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "row 2: is not valid JSON"),
        ("[]", "row 2: must be a JSON object"),
        ('{"timestamp": 9, "input_length": 1}', "row 2: has no column 'output_length'"),
        ('{"timestamp": 9, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}', "row 2: hash_ids"),
        (
            '{"timestamp": 9, "input_length": 1, "output_length": 1, "hash_ids": 5}',
            "row 2: hash_ids 5 must be",
        ),
    ],
)
def test_what_is_wrong_with_json_lines(tmp_path: Path, line: str, said: str) -> None:
    first = '{"timestamp": 0, "input_length": 1, "output_length": 1}\n'
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_trace(write(tmp_path, "t.jsonl", first + line), "mooncake", 4096)


def test_too_long_requests_are_counted_where_they_may_be_left_out(tmp_path: Path) -> None:
    text = OWN + "1,4000,97\n2,10,5\n3,9999,1\n4,4000,96\n"
    trace = read_trace(write(tmp_path, "t.csv", text), "csv", 4096, too_long="skip")
    assert trace.skipped == 2
    assert [r.prompt_tokens for r in trace.requests] == [10, 4000]
    assert [r.arrival_s for r in trace.requests] == [
        1.0,
        3.0,
    ]  # the first row's time is the start all the same


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "azur"}, "--trace-format 'azur': unknown; did you mean 'azure'?"),
        ({"too_long": "cut"}, "--too-long 'cut': unknown"),
        ({"time_scale": 0.0}, "--time-scale 0.0: must be a number above 0"),
        ({"time_scale": float("inf")}, "--time-scale inf: must be"),
    ],
)
def test_how_a_trace_is_read_is_checked_too(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    path = write(tmp_path, "t.csv", OWN + "0,1,1\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_trace(path, **{"kind": "csv", "max_tokens": 4096, **changes})  # type: ignore[arg-type]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv", "csv", 4096)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "binary.csv", "csv", 4096)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress((OWN + "0,1,1\n").encode()))
    with pytest.raises(ConfigError, match=r"--trace \S+t.csv.gz: is a compressed file, which is not read"):
        read_trace(tmp_path / "t.csv.gz", "csv", 4096)


@pytest.mark.parametrize(
    ("kind", "rate", "said"),
    [
        ("poison", 1.0, "did you mean 'poisson'?"),
        ("poisson", 0.0, "--rate 0.0: must be"),
        ("fixed", float("nan"), "--rate nan"),
    ],
)
def test_arrivals_out_of_range(kind: str, rate: float, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        arrival_times(kind, rate, 5, rng())


def test_what_was_generated_is_written_and_read_again(tmp_path: Path) -> None:
    requests = synthetic("mooncake", 2.0, 50, seed=5)
    path = tmp_path / "deep" / "mooncake.jsonl"
    write_trace(requests, path)
    first = json.loads(path.read_text().splitlines()[1])
    assert set(first) == {"timestamp", "input_length", "output_length", "hash_ids"}
    read = read_trace(path, "mooncake", 40_000).requests
    assert [(r.prompt_tokens, r.output_tokens, r.prefix) for r in read] == [
        (r.prompt_tokens, r.output_tokens, r.prefix) for r in requests
    ]
    assert [r.arrival_s for r in read] == pytest.approx([r.arrival_s for r in requests], abs=1e-3)
