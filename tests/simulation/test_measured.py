"""Measured devices: step times against the package that they come from, and what is asked of it."""

import functools
import re
import sys
from typing import Any

import pytest

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.core.types import StepShape, chunk_work
from vllm_sarathi.simulation.deployment import deployment
from vllm_sarathi.simulation.devices import measured, package
from vllm_sarathi.simulation.devices.corrections import corrections_for
from vllm_sarathi.simulation.devices.measured import MeasuredTimes, kernels
from vllm_sarathi.simulation.devices.package import Spread
from vllm_sarathi.simulation.devices.roofline import DEVICES
from vllm_sarathi.simulation.placement import MeasuredDeployment, RooflineDeployment, memory_share

pytest.importorskip("aiconfigurator_core")

QWEN = ("Qwen/Qwen3-32B", "h100", Spread(4))
PLACES = [
    QWEN,
    ("meta-llama/Meta-Llama-3.1-8B", "h100", Spread()),
    ("meta-llama/Meta-Llama-3.1-70B", "h100", Spread(4, precision="fp8")),
    ("Qwen/Qwen3-30B-A3B", "h100", Spread()),
    ("openai/gpt-oss-120b", "h200", Spread()),
]


@functools.cache
def plain(place: tuple[str, str, Spread]) -> measured.Kernels:
    """Return kernels as the tables have them, with nothing corrected."""
    made = measured.Kernels(*place)
    made.corrections = corrections_for(made.place, {})
    return made


def times(place: tuple[str, str, Spread] = QWEN) -> MeasuredTimes:
    return MeasuredTimes(plain(place), place[2].stages)


def chunk(tokens: int, prefix: int = 0, decodes: int = 0, context: int = 0) -> StepShape:
    return StepShape(tokens + decodes, decodes, decodes * context, chunk_work(prefix, tokens), decodes + 1)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[0])
def test_decodes_alone_take_what_the_package_says(place: tuple[str, str, Spread]) -> None:
    mine, theirs = times(place), plain(place)._engine
    for decodes, context in ((1, 100), (8, 1000), (32, 4096), (136, 777), (256, 3001)):
        step = StepShape(decodes, decodes, decodes * context, 0.0, decodes)
        expected_ms = theirs.decode_step_latency(decodes, context, 0)
        # Entries that were disturbed when they were measured are not believed.
        assert 0.9 * expected_ms < mine.stage_s(step) * 1e3 < 1.003 * expected_ms


def test_decodes_run_in_the_next_captured_size() -> None:
    mine = times()
    nine, sixteen = (StepShape(n, n, n * 1000, 0.0, n) for n in (9, 16))
    attention_s = plain(QWEN).decode_attention_s
    assert mine.stage_s(nine) - attention_s(9, 9000) == mine.stage_s(sixteen) - attention_s(16, 16000)


def test_beyond_the_captured_sizes_a_step_takes_its_launches() -> None:
    made = measured.Kernels(*QWEN)
    assert made.sizes[-1] == 512
    assert made._at_least(512, 1e-4) == 1e-4
    assert made._at_least(513, 1e-4) == 64 * 12 * 5e-6
    assert made._at_least(513, 1.0) == 1.0


def test_a_disturbed_entry_is_not_believed() -> None:
    made = measured.Kernels(*QWEN)
    entries = {64: 1.0, 72: 5.0, 80: 2.0, 88: 2.1, 96: 2.2}
    found = [made._least_s(lambda size: [("x_gemm", entries[size], 0.0, "")], n)["gemm"] for n in (64, 72)]
    assert found == pytest.approx([1e-3, 2e-3])


def test_corrections_scale_and_add() -> None:
    made = measured.Kernels(*QWEN)
    parts = made.decode_parts_s(32)
    fitted = {
        "gemm hopper bfloat16": 2.0,
        "shared_layer_us": 10.0,
        "head_norm_us": 1.0,
        "whole_norm_us": 99.0,
    }
    corrected = corrections_for(made.place, fitted)
    added_s = 64 * 11e-6
    assert corrected.total_s(parts) == pytest.approx(sum(parts.values()) + parts["gemm"] + added_s)
    assert corrections_for(made.place).total_s(parts) > sum(parts.values())


def test_the_host_is_there_where_it_is_not_hidden() -> None:
    made = MeasuredTimes(kernels(*QWEN))
    assert made.host_s > 1e-5
    assert made.host_sequence_s > 1e-6


def test_older_experts_take_as_long_for_few_tokens_as_for_many() -> None:
    now = measured.Kernels("Qwen/Qwen3-235B-A22B-FP8", "h200", Spread(4))
    older = now.under((0, 13))
    few, many = (older.decode_parts_s(n) for n in (4, 128))
    assert few["moe"] == many["moe"] > 3 * now.decode_parts_s(4)["moe"]
    assert few["gemm"] == now.decode_parts_s(4)["gemm"]
    assert now.under((0, 14)).decode_parts_s(4) == now.decode_parts_s(4)
    dense = kernels(*QWEN)
    assert dense.under((0, 13)).decode_parts_s(4) == dense.decode_parts_s(4)


def test_queries_and_keys_were_normalised_one_after_the_other() -> None:
    shared, alone = (measured.Kernels("MiniMaxAI/MiniMax-M2.5", "b200", Spread(n)) for n in (2, 1))
    assert shared.under((0, 17)).decode_s(8, 8000) > shared.decode_s(8, 8000) + 1e-3
    assert shared.under((0, 18)).decode_s(8, 8000) == shared.decode_s(8, 8000)
    assert alone.under((0, 17)).decode_s(8, 8000) == alone.decode_s(8, 8000)


def test_the_kv_cache_is_what_the_checkpoint_states() -> None:
    """The package takes FP8 weights for an FP8 cache; vLLM's `auto` is the model's own type."""
    own, asked = (
        measured.Kernels("Qwen/Qwen3-235B-A22B-FP8", "h200", Spread(4, fp8_kv=fp8)) for fp8 in (False, True)
    )
    # 94 layers of keys and values, one KV head of 128 on each device.
    assert own.memory.kv_token == 2 * asked.memory.kv_token == 94 * 2 * 128 * 2
    assert own.attend_s(64, 8192) > 1.2 * asked.attend_s(64, 8192)
    assert (
        measured.Kernels("nvidia/MiniMax-M2.5-NVFP4", "b200", Spread(2)).memory.kv_token == 62 * 2 * 4 * 128
    )


def test_a_layers_reductions_are_counted_once() -> None:
    """Beside `tp_allreduce` the package has two more around the experts, which vLLM has not."""
    made = measured.Kernels("deepseek-ai/DeepSeek-V3", "h200", Spread(8, 1, True))
    assert len(made._twice) == 2
    theirs = made._engine.evaluate_context_ops([*made._shared_ops, *made._twice], 1, 512)
    twice_s = sum(part[1] for part in theirs if "dispatch" in part[0]) / 1e3
    assert twice_s > 1e-3
    assert sum(made.shared_parts_s(512).values()) < sum(part[1] for part in theirs) / 1e3 - 0.99 * twice_s


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[0])
def test_a_whole_prompt_beside_decodes_takes_what_the_package_says(place: tuple[str, str, Spread]) -> None:
    """Nothing is spread over chunks there, so the package's own sum is right."""
    mine, theirs = times(place), plain(place)._engine
    for tokens, decodes in ((480, 32), (1024, 1), (2048, 100), (700, 0)):
        expected_ms = theirs.mixed_step_latency(tokens, decodes, tokens, 0)
        assert 0.9 * expected_ms < mine.stage_s(chunk(tokens, 0, decodes, tokens)) * 1e3 < 1.005 * expected_ms


def test_a_chunk_costs_more_the_longer_its_prefix() -> None:
    mine, attention = times(), plain(QWEN)
    near, far, farther = (mine.stage_s(chunk(512, prefix)) for prefix in (0, 8192, 32768))
    assert 1.05 * near < far
    assert 1.2 * far < farther
    # The package's own sum gives the last chunk of a prompt the mean of all of them, at most.
    averaged_s = attention._engine.mixed_step_latency(512, 0, 32768 + 512, 0) / 1e3
    assert farther > 1.15 * averaged_s


def test_what_is_in_the_cache_is_read_and_not_computed() -> None:
    mine = times()
    cached = mine.stage_s(chunk(512, 8192))
    assert cached < 0.2 * mine.stage_s(chunk(8704))
    assert cached > mine.stage_s(chunk(512))


def test_chunks_of_one_length_are_asked_for_as_they_are() -> None:
    k = plain(QWEN)
    two = k.chunk_attention_s(2, 1024, 2 * chunk_work(4096, 512))
    parts = k._engine.evaluate_context_ops(k._chunk_ops, 2, 512, 4096)
    assert two == pytest.approx(sum(part[1] for part in parts) / 1e3)
    # Others count by their tokens and pairs: a short one beside a long one is not two long ones.
    unlike = k.chunk_attention_s(2, 1024, chunk_work(0, 1000) + chunk_work(4096, 24))
    assert k.chunk_attention_s(2, 1024, 2 * chunk_work(0, 512)) <= unlike < two


def test_a_step_of_several_chunks_shares_all_but_the_attention() -> None:
    mine = times()
    three = StepShape(600, 0, 0, 3 * chunk_work(0, 200), 3)
    assert mine.stage_s(three) < 0.65 * 3 * mine.stage_s(chunk(200))


def test_a_mixture_of_experts_is_concave_and_a_dense_model_is_not() -> None:
    """Each token of few wakes experts of its own; facts that the scheduler's own model has to learn."""
    experts, dense = kernels(*PLACES[3]), kernels(*PLACES[1])
    first, later = (experts.shared_s(64) - experts.shared_s(1), experts.shared_s(320) - experts.shared_s(257))
    assert first > 5 * later
    assert dense.shared_s(64) - dense.shared_s(1) < dense.shared_s(1088) - dense.shared_s(1024)


def test_latent_attention_is_found_inside_the_operator_that_has_it() -> None:
    """Of such models the package counts no operator as attention: one of them has its projections, too."""
    place = ("deepseek-ai/DeepSeek-V3", "h200", Spread(8, 1, True))
    mine = times(place)
    assert mine.stage_s(chunk(512, 65536)) > 1.1 * mine.stage_s(chunk(512))
    near, far = (StepShape(32, 32, 32 * context, 0.0, 32) for context in (1000, 16000))
    assert mine.stage_s(far) > 1.05 * mine.stage_s(near)


class Counting:
    """Kernels' engine, with a count of what it is asked."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.asked = engine, 0

    def __getattr__(self, name: str) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            self.asked += 1
            return getattr(self.engine, name)(*args, **kwargs)

        return ask


def test_decodes_whose_contexts_grow_are_looked_up_and_not_asked_for() -> None:
    k = measured.Kernels(*QWEN)
    mine, counting = MeasuredTimes(k), Counting(k._engine)
    k._engine = counting
    for step in range(5000):
        mine.stage_s(StepShape(64, 64, 64 * (1000 + step), 0.0, 64))
    # Two ends of each line between tabulated contexts, and all but the attention at the next captured sizes, once.
    assert counting.asked <= 1 + measured.LARGER_SIZES + 2 * (5000 / measured.CONTEXT_STEP_TOKENS + 2)


def test_stages_share_the_layers_and_send_what_they_have() -> None:
    one, two = times(), times((QWEN[0], QWEN[1], Spread(4, 2)))
    step = chunk(512, 0, 32, 1000)
    assert two.stages == 2
    assert 2 * two.stage_s(step) == pytest.approx(one.stage_s(step), rel=0.01)
    assert two.send_s(512) > 10 * two.send_s(1) > one.send_s(1) == 0.0


# --- Deployments ---


@pytest.mark.parametrize(
    ("name", "model", "spread"),
    [
        ("Qwen/Qwen3-32B/h100:tp4", "Qwen/Qwen3-32B", Spread(4)),
        ("qwen/qwen3-32b/4xH100", "Qwen/Qwen3-32B", Spread(4)),
        ("meta-llama/Llama-3.1-8B/h100", "meta-llama/Meta-Llama-3.1-8B", Spread()),
        (
            "meta-llama/Llama-3.1-8B-Instruct/h100:fp8",
            "meta-llama/Meta-Llama-3.1-8B",
            Spread(precision="fp8"),
        ),
        ("meta-llama/Llama-3.1-70B/h100:fp8tp4", "meta-llama/Meta-Llama-3.1-70B", Spread(4, 1, False, "fp8")),
        ("Qwen/Qwen3-30B-A3B/h100:tp2ep", "Qwen/Qwen3-30B-A3B", Spread(2, 1, True)),
        ("Qwen/Qwen3-30B-A3B/h100:tp2pp2", "Qwen/Qwen3-30B-A3B", Spread(2, 2)),
    ],
)
def test_hub_names_are_measured(name: str, model: str, spread: Spread) -> None:
    place = deployment(name)
    assert isinstance(place, MeasuredDeployment)
    assert place.kernels is kernels(model, "h100", spread)
    assert (place.tensor_parallel, place.stages) == (spread.tensor_parallel, spread.stages)
    assert place.source.kind == "measured"
    assert model in place.source.detail
    assert place.step_tokens == 8192


def test_the_kv_cache_knows_experts_latent_attention_and_fp8() -> None:
    dense = deployment("meta-llama/Llama-3.1-8B/h100")
    assert isinstance(dense, MeasuredDeployment)
    assert dense.kernels.memory.kv_token == 131072
    assert dense.kv_tokens == pytest.approx(0.9 * 80 * 2**30 / 131072 - 2 * 8.03e9 / 131072, rel=0.1)
    full, half = (deployment(f"meta-llama/Llama-3.1-70B/h100:{how}tp4") for how in ("", "fp8"))
    assert isinstance(full, MeasuredDeployment)
    assert isinstance(half, MeasuredDeployment)
    # Embeddings and the output stay as they are.
    assert half.kernels.memory.weights == pytest.approx(full.kernels.memory.weights / 2, rel=0.05)
    experts = deployment("Qwen/Qwen3-30B-A3B/h100")
    assert isinstance(experts, MeasuredDeployment)
    assert experts.kernels.memory.weights == pytest.approx(2 * 30.5e9, rel=0.03)
    latent = deployment("deepseek-ai/DeepSeek-V3/h200:tp8ep")
    assert isinstance(latent, MeasuredDeployment)
    # It is not split by heads.
    assert latent.kernels.memory.kv_token == pytest.approx(2 * 61 * (512 + 64), rel=0.01)
    asked = deployment("deepseek-ai/DeepSeek-V3/h200:tp8epkvfp8")
    assert asked.kv_tokens > 1.9 * latent.kv_tokens


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError) as refused:
        deployment("meta-llama/Llama-3.1-70B/h100")
    for piece in (f"{memory_share():.0%} of 85 GB", "141.1 GB of weights", "needs 42.9 GB", "tp2pp2"):
        assert piece in str(refused.value)


def test_a_fallback_to_other_frameworks_rows_is_said() -> None:
    latent = deployment("deepseek-ai/DeepSeek-V3/h200:tp8ep").source
    assert any("low-fidelity" in text and "mla_context_module" in text for text in latent.warnings)
    # The same tables are loaded for a model that does not use them.
    assert not deployment("Qwen/Qwen3-32B/h200:tp4").source.warnings
    assert latent.lines[1].startswith("warning: low-fidelity")


def test_estimates_are_told_from_measurements() -> None:
    static = deployment("nvidia/Llama-3.1-70B-Instruct-FP8/h100:tp4").source
    assert any("estimates" in text and "context_qkv_gemm" in text for text in static.warnings)


@pytest.mark.parametrize(
    "name", ["openai/gpt-oss-120b/a40:tp8", "Qwen/Qwen3-32B/l4:fp8tp8", "mistral-7b/a100:fp8"]
)
def test_experts_and_precisions_are_rooflines_where_there_are_no_tables(name: str) -> None:
    place = deployment(name)
    assert isinstance(place, RooflineDeployment)
    assert place.source.kind == "roofline"


def test_a_device_without_tables_is_a_roofline_and_says_why() -> None:
    place = deployment("Qwen/Qwen3-32B/l4:tp8")
    assert isinstance(place, RooflineDeployment)
    assert place.times().stage_s(chunk(512)) == deployment("qwen3-32b/l4:tp8").times().stage_s(chunk(512))
    assert place.source.lines[0].startswith("step times: roofline")
    assert "no tables of vLLM on l4: matrix products, attention" in place.source.lines[1]
    assert deployment("qwen3-32b/h100:tp4").source.warnings == ()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Qwen/Qwen3-32B/h100:tp3", "64 attention heads cannot be shared by 3"),
        ("Qwen/Qwen3-33B/h100", "did you mean 'Qwen/Qwen3-32B'?"),
        ("mistral-7b/a100:tp2ep", "'ep' distributes experts, and mistral-7b has none"),
        ("moonshotai/Kimi-K3/l4:tp8", "'attn_res_block_size' is not understood"),
        ("Qwen/Qwen3-32B/h100:", "must be MODEL/DEVICE"),
        ("Qwen/Qwen3-32B/h100:tp0", "tp and pp are at least 1"),
        ("Qwen/Qwen3-32B/h100:tp2pp0", "tp and pp are at least 1"),
        ("Qwen/Qwen3-32B/h100:tp8ep", "'ep' distributes experts, and Qwen/Qwen3-32B has none"),
        ("Qwen/Qwen3-32B/h100:skew1.2", "'skew' is of the loads of experts, and Qwen/Qwen3-32B has none"),
        ("Qwen/Qwen3-32B/h100:pp65", "65 stages for 64 layers"),
        (
            "Qwen/Qwen3-32B-FP8/b200:nvfp4",
            "is quantized already, and vLLM does not quantize it again to nvfp4",
        ),
        ("Qwen/Qwen3-32B/8xh100:tp2", "8 devices and tp2 contradict each other"),
    ],
)
def test_a_mistake_is_one_sentence(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        deployment(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Qwen/Qwen3-32B/h100:tp16", "a layer that devices of several machines share"),
        ("Qwen/Qwen3-32B/h100:tp8@4", "machines with 4 devices"),
        ("Qwen/Qwen3-30B-A3B/h100:tp4epskew2", "experts' loads of skew 0.0, 1.01, 1.2, not 2"),
    ],
)
def test_what_tables_do_not_tell_is_a_roofline_and_says_why(name: str, reason: str) -> None:
    place = deployment(name)
    assert isinstance(place, RooflineDeployment)
    assert reason in place.source.lines[1]


def test_machines_that_hold_a_replica_change_nothing() -> None:
    assert deployment("Qwen/Qwen3-32B/h100:tp4@4").source == deployment("Qwen/Qwen3-32B/h100:tp4").source


def test_how_uneven_the_experts_loads_are_is_a_setting() -> None:
    even, own, steep = (
        deployment(f"Qwen/Qwen3-30B-A3B/h100:tp8ep{skew}")
        .times()
        .stage_s(StepShape(512, 512, 2**19, 0.0, 512))
        for skew in ("skew0", "", "skew1.2")
    )
    assert even != own == steep  # what the package takes by default


def test_a_device_has_the_same_memory_for_both_sources() -> None:
    for name in package.SYSTEMS:
        assert DEVICES[name].memory_bytes == deployment(f"Qwen/Qwen3-8B/{name}:tp4").unit.memory_bytes
    tables, sheet = deployment("Qwen/Qwen3-32B/h100:tp4"), deployment("qwen3-32b/h100:tp4")
    assert isinstance(tables, MeasuredDeployment)
    memory = tables.kernels.memory
    room = memory_share() * DEVICES["h100"].memory_bytes - memory.weights - memory.other
    assert tables.kv_tokens == int(memory.tokens_in(room))
    assert tables.kv_tokens == pytest.approx(sheet.kv_tokens, rel=0.05)


def test_a_checkpoint_that_tables_miss_is_as_quantized_as_it_is() -> None:
    place = deployment("nvidia/Llama-3.1-70B-Instruct-FP8/l4:tp8")
    assert isinstance(place, RooflineDeployment)
    assert (place.model.precision.mlp, place.model.precision.kv) == (1.0, 1.0)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiconfigurator_core.sdk.common", None)
    monkeypatch.setattr(package, "known_models", package.known_models.__wrapped__)
    for module in ("deployment", "model_limits"):
        monkeypatch.setattr(f"vllm_sarathi.simulation.{module}.known_models", package.known_models)
    assert deployment("qwen3-32b/h100:tp4").source.kind == "roofline"
    with pytest.raises(ConfigError, match=re.escape("pip install 'vllm-sarathi[devices]'")):
        deployment("Qwen/Qwen3-32B/h100:tp4")
