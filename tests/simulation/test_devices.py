"""Step times against figures worked out by hand."""

import math
from dataclasses import replace

import pytest

from vllm_sarathi.core.types import StepShape, chunk_work
from vllm_sarathi.simulation.devices.roofline import (
    ATTENTION_SHARE,
    BANDWIDTH_SHARE,
    COMPUTE_SHARE,
    DEVICES,
    DOUBLING_LAYER_S,
    ETHERNET_BYTES_PER_S,
    ETHERNET_LATENCY_S,
    KERNELS_PER_LAYER,
    KV_SHARE,
    LAYER_S,
    LINK_SHARE,
    SHARED_LAYER_S,
    Roofline,
    device,
)
from vllm_sarathi.simulation.layers import Experts
from vllm_sarathi.simulation.models import MODELS, model_shape

MISTRAL = MODELS["mistral-7b"]
A100 = DEVICES["a100"]
DECODE = StepShape(32, 32, 32 * 4096, 0.0, 32)
"""The paper's yardstick for a strict SLO: a decode step of batch 32 at 4k context (section 5)."""


def test_all_that_the_issue_names_is_there() -> None:
    assert {"a100", "a40", "h100", "h200", "l4", "b200", "b300"} == set(DEVICES)
    assert device("A100") is A100
    assert {
        "mistral-7b", "yi-34b", "llama2-70b", "falcon-180b", "llama-3.1-8b", "llama-3.1-70b", "qwen3-32b"
    } <= set(MODELS)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "billions", "kv_kib"),
    [
        ("mistral-7b", 7.24, 128),
        ("yi-34b", 34.39, 240),
        ("llama2-70b", 68.98, 320),
        ("falcon-180b", 178.6, 160),
        ("llama-3.1-8b", 8.03, 128),
        ("llama-3.1-70b", 70.55, 320),
        ("qwen3-32b", 32.76, 256),
    ],
)
def test_shapes_have_their_models_published_number_of_weights(
    name: str, billions: float, kv_kib: float
) -> None:
    shape = model_shape(name)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.002)
    assert shape.kv_bytes_per_token == kv_kib * 1024


def test_a_decode_step_is_the_reading_of_weights_and_cache() -> None:
    weights = (32 * MISTRAL.layer_parameters + 32000 * 4096) * 2 / (2.039e12 * BANDWIDTH_SHARE)
    cache = 32 * 4096 * 131072 / (2.039e12 * KV_SHARE)
    kernels = 32 * (KERNELS_PER_LAYER * 2e-6 + LAYER_S)
    activations = 32 * 32 * 2 * (12 * 4096 + 3 * 14336) / (2.039e12 * BANDWIDTH_SHARE)
    expected = weights + cache + kernels + activations
    assert Roofline(MISTRAL, A100).stage_s(DECODE) == pytest.approx(expected, rel=1e-9)
    # The paper's strict SLO for this deployment is 0.1 s, five times this step.
    assert expected == pytest.approx(0.1 / 5, rel=0.35)


def test_a_large_chunk_is_bound_by_compute() -> None:
    chunk = StepShape(2048, 0, 0, chunk_work(0, 2048), 1)
    linear = 2 * 32 * MISTRAL.layer_parameters * 2048 / (312e12 * COMPUTE_SHARE)
    attention = 4 * 32 * 32 * 128 * 2048 * 1024 / (312e12 * ATTENTION_SHARE)
    rest = 2048 * 32 * 2 * (12 * 4096 + 3 * 14336) / (2.039e12 * BANDWIDTH_SHARE)
    expected = linear + attention + rest + 32 * (KERNELS_PER_LAYER * 2e-6 + LAYER_S)
    assert Roofline(MISTRAL, A100).stage_s(chunk) == pytest.approx(expected, rel=1e-9)


def test_a_token_too_many_costs_a_tile() -> None:
    times = Roofline(MISTRAL, A100)

    def seconds(tokens: int) -> float:
        return times.stage_s(StepShape(tokens, 0, 0, 0.0, 1))

    tile_s = 2 * 32 * MISTRAL.layer_parameters * 128 / (312e12 * COMPUTE_SHARE)
    assert seconds(513) - seconds(512) > 0.99 * tile_s
    assert seconds(640) - seconds(513) < 0.1 * tile_s
    # Below the knee of the roofline the weights' own reading hides it.
    assert seconds(65) - seconds(64) < 0.01 * tile_s


def test_a_long_prefix_is_at_least_read() -> None:
    times = Roofline(MISTRAL, A100)
    few = StepShape(1, 0, 0, chunk_work(100_000, 1), 1)
    read_s = 100_000 * 131072 / (2.039e12 * KV_SHARE)
    assert times.stage_s(few, 100_000) - times.stage_s(replace(few, prefill_work=0.0)) == pytest.approx(
        read_s
    )


def test_tensor_parallelism_shares_the_work_and_pays_two_reductions_a_layer() -> None:
    one, two = Roofline(MISTRAL, A100), Roofline(MISTRAL, A100, tensor_parallel=2)
    reductions = 2 * 32 * (12e-6 + 32 * 4096 * 2 / (300e9 * LINK_SHARE))
    reductions += 32 * (SHARED_LAYER_S + DOUBLING_LAYER_S)
    assert two.stage_s(DECODE) > one.stage_s(DECODE) / 2
    kernels = 32 * (KERNELS_PER_LAYER * 2e-6 + LAYER_S)
    shared = two.stage_s(DECODE) - reductions - kernels
    # Weights and cache are halved exactly; of the activations only the MLP's.
    assert shared == pytest.approx((one.stage_s(DECODE) - kernels) / 2, rel=0.02)


def test_between_machines_there_is_ethernet() -> None:
    shape, unit = MODELS["falcon-180b"], A100
    within = Roofline(shape, unit, 4, 2, devices_per_node=8)
    between = Roofline(shape, unit, 4, 2, devices_per_node=4)
    # Stages of four fit into a machine: only what is sent from stage to stage crosses.
    assert within.stage_s(DECODE) == between.stage_s(DECODE)
    sent = 512 * shape.hidden * 2 / (ETHERNET_BYTES_PER_S * LINK_SHARE)
    assert between.send_s(512) == pytest.approx(ETHERNET_LATENCY_S + sent)
    assert between.send_s(512) > 10 * within.send_s(512)
    # All eight in one stage have every reduction cross.
    assert Roofline(shape, unit, 8, 1, 4).stage_s(DECODE) > 1.5 * Roofline(shape, unit, 8, 1, 8).stage_s(
        DECODE
    )


def test_stages_share_the_layers() -> None:
    one, four = Roofline(MISTRAL, A100), Roofline(MISTRAL, A100, stages=4)
    assert 4 * four.stage_s(DECODE) == pytest.approx(one.stage_s(DECODE), rel=1e-9)


def test_few_kv_heads_are_repeated_not_split_beyond_one() -> None:
    shape = replace(MISTRAL, kv_heads=2)
    context = StepShape(1, 1, 1_000_000, 0.0, 1)
    bare = StepShape(1, 1, 0, 0.0, 1)

    def cache_s(ways: int) -> float:
        times = Roofline(shape, A100, ways)
        return times.stage_s(context) - times.stage_s(bare)

    assert cache_s(2) == pytest.approx(cache_s(1) / 2)
    assert cache_s(8) == pytest.approx(cache_s(2))


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_is_faster_with_less_to_do(name: str) -> None:
    times = Roofline(MISTRAL, DEVICES[name])
    seconds = [times.stage_s(StepShape(n, 0, 0, chunk_work(0, n), 1)) for n in (1, 256, 1024, 4096)]
    assert seconds == sorted(seconds)
    assert all(math.isfinite(s) and s > 0 for s in seconds)


def test_a_window_bounds_what_is_read_and_paired() -> None:
    windowed = replace(
        MISTRAL,
        described=tuple(
            replace(kind, attention=replace(kind.attention, window=1024))
            for kind in MISTRAL.kinds
            if kind.attention
        ),
    )
    times, whole = Roofline(windowed, A100), Roofline(MISTRAL, A100)
    assert whole.stage_s(DECODE) - times.stage_s(DECODE) == pytest.approx(
        32 * 3072 * 131072 / (2.039e12 * KV_SHARE)
    )
    chunk = StepShape(512, 0, 0, chunk_work(8192, 512), 1)
    pairs = chunk.prefill_work - 512 * 1024
    assert whole.stage_s(chunk) - times.stage_s(chunk) == pytest.approx(
        4 * 32 * 32 * 128 * pairs / (312e12 * ATTENTION_SHARE)
    )


def test_each_doubling_of_the_devices_waits_once_more() -> None:
    two, four = (Roofline(MISTRAL, A100, tensor_parallel=ways)._fixed_s for ways in (2, 4))
    assert four - two == pytest.approx(32 * DOUBLING_LAYER_S)


def test_experts_are_read_as_they_are_woken() -> None:
    experts = Experts(64, 2, 10_000_000, 0)
    kinds = tuple(replace(kind, experts=experts, mlp_parameters=0) for kind in MISTRAL.kinds)
    times = Roofline(replace(MISTRAL, described=kinds), A100)
    floors = [times._floor_s(tokens) - times._dense_floor_s for tokens in (1, 10_000)]
    assert floors == pytest.approx([32 * n * 2e7 / (2.039e12 * BANDWIDTH_SHARE) for n in (2, 64)])
    even, uneven = (replace(MISTRAL, described=kinds, skew=skew) for skew in (0.0, 1.2))
    assert Roofline(uneven, A100)._floor_s(32) < Roofline(even, A100)._floor_s(32)
