"""Fitting the live workloads to a device: known answers of the factors, and a measurement of known speeds."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.benchmark.fake_vllm import FAKE
from vllm_sarathi.benchmark.common.progress import Stages
from vllm_sarathi.benchmark.live import probe, server
from vllm_sarathi.benchmark.live.arrivals import draw_arrivals
from vllm_sarathi.benchmark.live.contenders import STATIC_BUDGETS, default_contenders
from vllm_sarathi.benchmark.live.probe import find_scale, kv_tokens, measure
from vllm_sarathi.benchmark.live.scale import (
    AS_WRITTEN,
    REFERENCE_DECODE_STEP_S,
    REFERENCE_READING_TOKENS_PER_S,
    Scale,
    Speeds,
)
from vllm_sarathi.benchmark.live.server import MAX_MODEL_LEN, serve
from vllm_sarathi.simulation.workloads.live import LIVE_WORKLOADS
from vllm_sarathi.simulation.workloads.registry import live_named


def scale(reading: float, decode: float, context: int = 131072, kv: int | None = None) -> Scale:
    """Of a device by its speed of prefill and the length of its decode steps, as multiples of the reference's."""
    return Scale.of(
        Speeds(REFERENCE_READING_TOKENS_PER_S * reading, REFERENCE_DECODE_STEP_S * decode, context, kv)
    )


DEVICES = {
    "the reference": scale(1, 1),
    "slow": scale(0.22, 1.7),
    "a GPU": scale(20, 0.5),
    "a GPU, little memory": scale(20, 0.5, kv=32768),
    "a GPU, a small model": scale(200, 0.5, context=8192),
    "a short context": scale(1, 1, context=512),
}
each_device = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)


# --- Known answers ---


def test_the_reference_is_loaded_as_written() -> None:
    same = scale(1, 1)
    assert (same.times, same.prompts, same.requests, same.load) == (1, 1, 1, 1)
    assert [same.workload(each) for each in LIVE_WORKLOADS] == list(LIVE_WORKLOADS)
    assert same.server_flags == []


def test_twice_as_slow_means_slos_twice_as_long_and_half_the_rates() -> None:
    slow = scale(0.5, 2)
    assert slow.slo_ms(250) == 500
    mix = slow.workload(live_named("mix"))
    assert mix.rate_per_s == 0.5
    assert (mix.kinds, mix.requests) == (live_named("mix").kinds, live_named("mix").requests)
    assert [each.label for each in default_contenders(False, slow)] == [
        each.label for each in default_contenders(False)
    ]
    written, scaled = draw_arrivals(live_named("mix"), 0), draw_arrivals(mix, 0)
    assert [each.prompt_tokens for each in scaled] == [each.prompt_tokens for each in written]
    assert [each.at_s for each in scaled] == pytest.approx([2 * each.at_s for each in written], abs=2e-3)


def test_a_device_that_reads_slowly_keeps_lengths_whatever_its_decode_steps() -> None:
    assert (scale(0.22, 1.7).prompts, scale(0.22, 1.7).times) == (1, 4.55)
    assert scale(0.22, 0.5).times == 4.55


def test_a_device_that_reads_much_faster_than_it_decodes_gets_longer_prompts_rather_than_a_blink() -> None:
    gpu = scale(20, 0.5)
    assert (gpu.prompts, gpu.times, gpu.load) == (10, 0.5, 1)
    assert gpu.slo_ms(250) == 125
    long = gpu.workload(live_named("long"))
    assert long.kinds[0].prompt_tokens == (7000, 20000)
    assert long.kinds[0].output_tokens == live_named("long").kinds[0].output_tokens
    assert long.rate_per_s == pytest.approx(0.6)
    assert long.requests == 52  # it lasts as long as on the reference
    assert gpu.server_flags == ["--max-model-len=40960"]
    budgets = [each.token_budget for each in default_contenders(False, gpu) if each.token_budget]
    assert budgets == [10 * each for each in STATIC_BUDGETS]


def test_prompts_grow_no_longer_than_there_is_room() -> None:
    assert scale(20, 0.5, context=16384).prompts == 4
    assert scale(20, 0.5, kv=4 * 8192).prompts == 2
    assert scale(20, 0.5, kv=100).prompts == 1
    assert scale(1000, 1).prompts == 16
    assert scale(1, 1, context=1024).prompts == 0.25
    with pytest.raises(RuntimeError, match="the model takes 255 tokens"):
        scale(1, 1, context=255)


def test_where_decode_steps_would_fill_the_slo_the_load_is_less_and_it_says_so() -> None:
    small = scale(200, 0.6, context=8192)
    assert (small.prompts, small.times, small.load) == (2, 0.4, 0.025)
    assert "its load is 2% of the reference's" in small.sentence
    assert "load" not in scale(20, 0.5).sentence
    assert scale(20, 0.5, context=4 * 4096).load == pytest.approx(0.2 / (0.5 / 1.5), abs=1e-3)


def test_a_fast_device_gets_more_requests_but_not_without_end() -> None:
    assert scale(1000, 0.02).requests == 10
    assert scale(0.1, 10).requests == 1


# --- What holds on every device ---


@each_device
def test_offered_load_is_what_it_says(device: Scale) -> None:
    assert device.speeds is not None
    for written in LIVE_WORKLOADS:
        scaled = device.workload(written)

        def needs(workload: object, reading_tokens_per_s: float) -> float:
            mean = sum(kind.share * sum(kind.prompt_tokens) / 2 for kind in workload.kinds)  # type: ignore[attr-defined]
            return workload.rate_per_s * mean / reading_tokens_per_s  # type: ignore[attr-defined]

        here = needs(scaled, device.speeds.reading_tokens_per_s)
        there = needs(written, REFERENCE_READING_TOKENS_PER_S)
        assert here / there == pytest.approx(device.load, rel=0.02)


@each_device
def test_a_budget_takes_the_same_share_of_the_slo_as_on_the_reference(device: Scale) -> None:
    assert device.speeds is not None
    for tokens in STATIC_BUDGETS[2:]:
        here_ms = device.budget(tokens) / device.speeds.reading_tokens_per_s * 1e3
        there_ms = tokens / REFERENCE_READING_TOKENS_PER_S * 1e3
        share = (here_ms / device.slo_ms(250)) / (there_ms / 250)
        # A server takes no budget below its number of sequences: short contexts leave no smaller one.
        assert share == pytest.approx(device.load, rel=0.01) or device.prompts < 1 < share / device.load


@each_device
def test_the_strictest_slo_leaves_five_decode_steps_and_every_request_fits(device: Scale) -> None:
    assert device.speeds is not None
    assert device.slo_ms(150) >= 4.97 * device.speeds.decode_step_s * 1e3
    context = min(device.speeds.context_tokens, int(MAX_MODEL_LEN * device.prompts))
    for workload in LIVE_WORKLOADS:
        for kind in device.workload(workload).kinds:
            assert kind.prompt_tokens[1] + kind.output_tokens[1] <= context


def test_a_context_is_filled_and_the_shortest_that_is_taken_holds_every_request() -> None:
    assert scale(20, 0.5, context=30017).server_flags == ["--max-model-len=30017"]
    shortest = scale(1, 1, context=256)
    for workload in LIVE_WORKLOADS:
        for kind in shortest.workload(workload).kinds:
            assert kind.prompt_tokens[1] + kind.output_tokens[1] <= 256


@each_device
def test_it_comes_back_from_json(device: Scale) -> None:
    assert Scale.from_json(json.loads(json.dumps(device.to_json()))) == device


def test_workloads_as_written_stay_so() -> None:
    assert [AS_WRITTEN.workload(each) for each in LIVE_WORKLOADS] == list(LIVE_WORKLOADS)
    assert AS_WRITTEN.slo_ms(123.456) == 123.456
    assert AS_WRITTEN.about(LIVE_WORKLOADS, [250.0], 2000.0) is None


# --- Measured ---


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "vllm_command", lambda *_: FAKE)
    for name, value in {
        "FAKE_READING_TOKENS_PER_S": "10000",
        "FAKE_STEP_S": "0.01",
        "FAKE_CONTEXT": "8192",
        "FAKE_KV_BLOCKS": "4096",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("fake_device")
def test_known_speeds_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    answer_s = probe._answer_s

    def noting(client: object, prompt: int, output: int) -> float:
        asked.append(prompt)
        return answer_s(client, prompt, output)  # type: ignore[arg-type]

    monkeypatch.setattr(probe, "_answer_s", noting)
    with serve("m", log_path=tmp_path / "log") as up:
        speeds = measure(up.base_url)
    # 10,000 tokens/s, and a step of 10 ms for the one token that is answered.
    assert speeds.reading_tokens_per_s == pytest.approx(4000 / 0.41, rel=0.1)
    assert speeds.decode_step_s == pytest.approx(0.01, rel=0.2)
    assert (speeds.context_tokens, speeds.kv_tokens) == (8192, 65536)
    assert max(asked) == 4000  # as long as prompts will be


@pytest.mark.usefixtures("fake_device")
def test_a_resumed_run_keeps_the_scale_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stages(Console(quiet=True)) as stages:
        found = find_scale("m", tmp_path, False, stages)
        arguments = (tmp_path / "scale.server.log").read_text().splitlines()[0]
        assert arguments.endswith("--max-model-len=auto --scheduler default")
        monkeypatch.setenv("FAKE_STEP_S", "0.03")
        assert find_scale("m", tmp_path, True, stages) == found
        again = find_scale("m", tmp_path, False, stages)
        assert again.times > 1.5 * found.times
        monkeypatch.setenv("FAKE_STEP_S", "0.01")
        assert find_scale("m", tmp_path, True, stages) == again
        assert find_scale("another", tmp_path, True, stages).times < again.times / 1.5
        monkeypatch.setenv("FAKE_STEP_S", "0.03")
        (tmp_path / "scale.json").write_text("{}")
        assert find_scale("m", tmp_path, True, stages).times > 1.5 * found.times


@pytest.mark.usefixtures("fake_device")
def test_a_server_that_does_not_complete_is_told_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CONTEXT", "none")  # its answer breaks off
    with (
        Stages(Console(quiet=True)) as stages,
        pytest.raises(server.ServerError, match=r"--scale auto: the server gave no answer .*\n.*the end of"),
    ):
        find_scale("m", tmp_path, False, stages)
    assert not (tmp_path / "scale.json").exists()


def test_kv_tokens_are_those_of_all_engines_and_unknown_where_not_said() -> None:
    line = 'vllm:cache_config_info{block_size="128",engine="%d",num_gpu_blocks="%s"} 1.0\n'
    assert kv_tokens(line % (0, "100") + line % (1, "50")) == 128 * 150
    assert kv_tokens(line % (0, "None")) is None
    assert kv_tokens("") is None
