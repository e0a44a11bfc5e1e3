"""Deployments by name: what fits, what is refused with the arithmetic, what a typing mistake is told."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.steptime.store import save_calibration
from vllm_sarathi.core.types import StepShape
from vllm_sarathi.engine.offline import config_folder
from vllm_sarathi.simulation.deployment import PAPER_DEPLOYMENTS, build, deployment, scheduler_choice
from vllm_sarathi.simulation.devices.roofline import DEVICES
from vllm_sarathi.simulation.models import MODELS
from vllm_sarathi.simulation.placement import RESERVED_BYTES, memory_share


@pytest.mark.parametrize(
    ("name", "ways", "stages", "node", "in_flight"),
    [
        ("mistral-7b/a100", 1, 1, 8, 2),
        ("yi-34b/2xa100", 2, 1, 8, 2),
        ("llama2-70b/8xa40", 4, 2, 8, 2),
        ("falcon-180b/8xa100", 4, 2, 4, 2),
        ("Falcon-180B/A100:tp8@4", 8, 1, 4, 2),
        ("llama-3.1-70b/4xh100", 4, 1, 8, 2),
        ("llama-3.1-70b/l4:tp8pp2", 8, 2, 8, 2),
        ("qwen3-32b/b200", 1, 1, 8, 2),
        ("llama-3.1-8b/h200", 1, 1, 8, 2),
    ],
)
def test_deployments_by_name(name: str, ways: int, stages: int, node: int, in_flight: int) -> None:
    place: Any = deployment(name)
    assert (place.tensor_parallel, place.stages, place.devices_per_node) == (ways, stages, node)
    assert place.in_flight == in_flight
    assert place.times().stages == stages
    if name in PAPER_DEPLOYMENTS:
        assert place.max_tokens >= 16384  # the paper's datasets


def test_the_share_of_the_memory_is_vllms() -> None:
    from vllm.config import CacheConfig

    assert memory_share() == CacheConfig().gpu_memory_utilization


def test_the_kv_cache_is_what_the_weights_leave() -> None:
    place = deployment("mistral-7b/a100")
    weights = 2 * MODELS["mistral-7b"].parameters
    assert place.kv_tokens == int(
        (memory_share() * DEVICES["a100"].memory_bytes - weights - RESERVED_BYTES) / 131072
    )
    two = deployment("mistral-7b/a100:tp2")
    assert two.kv_tokens == int(
        (memory_share() * DEVICES["a100"].memory_bytes - weights / 2 - RESERVED_BYTES) / 65536
    )
    # Eight heads over sixteen devices: each holds one, twice over in all.
    assert deployment("mistral-7b/a100:tp16").kv_tokens == int(
        (memory_share() * DEVICES["a100"].memory_bytes - weights / 16 - RESERVED_BYTES) / (131072 / 8)
    )


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError) as refused:
        deployment("llama2-70b/a100")
    said = str(refused.value)
    weights = 2 * MODELS["llama2-70b"].parameters
    room = memory_share() * DEVICES["a100"].memory_bytes - weights - RESERVED_BYTES
    for piece in (
        f"{memory_share():.0%} of 85 GB",
        "138.0 GB of weights (69.0e9 parameters over 1)",
        "3 GB reserved",
        f"{room / 1e9:.1f} GB of KV cache",
    ):
        assert piece in said
    assert "tp2pp2" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mistral-7b", "must be MODEL/DEVICE"),
        ("mistrall-7b/a100", "did you mean 'mistral-7b'?"),
        ("mistral-7b/a1000", "did you mean 'a100'?"),
        ("mistral-7b/tpu-v5", "valid: a100, a40, b200, b300, cpu, h100, h200, l4"),
        ("mistral-7b/a100:tp3", "32 attention heads cannot be shared by 3"),
        ("mistral-7b/a100:tp1pp33", "33 stages for 32 layers"),
        ("llama-3.1-70b/a100:tp99999", "must be MODEL/DEVICE"),
        ("mistral-7b/a100:skew1", "'skew' is of the loads of experts, and mistral-7b has none"),
        ("mistral-7b/a100@0", "at least 1 device"),
        ("mistral-7b/a100:what", "must be MODEL/DEVICE"),
        ("./nowhere/a100", "unknown model './nowhere', and no config.json is there"),
        ("./nowhere/a100", "Any other model is a folder with its config.json: FOLDER/DEVICE"),
    ],
)
def test_a_mistake_is_told_the_nearest(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        deployment(name)


def test_heads_that_devices_cannot_share_are_refused_as_vllm_does(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "mine", num_attention_heads=12, num_key_value_heads=6, hidden_size=384)
    for ways in (1, 2, 3, 6, 12):
        assert deployment(f"{folder}/h100:tp{ways}").tensor_parallel == ways
    with pytest.raises(ConfigError, match="6 heads of keys cannot be shared by 4 devices, nor copied evenly"):
        deployment(f"{folder}/h100:tp4")


def test_the_busiest_device_is_waited_for(tmp_path: Path) -> None:
    keys = {
        "model_type": "mixtral",
        "num_local_experts": 64,
        "num_experts_per_tok": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "intermediate_size": 4096,
    }
    folder = config_folder(tmp_path / "mixed", **keys)

    def step_s(how: str, tokens: int) -> float:
        shape = StepShape(tokens, tokens, tokens, 0.0, tokens)
        return deployment(f"{folder}/h100:tp8{how}").times().stage_s(shape)

    assert step_s("ep", 4096) == pytest.approx(step_s("", 4096))
    assert step_s("skew1.2", 32) < step_s("", 32)  # fewer experts are woken
    assert step_s("epskew1.2", 2**16) > 1.05 * step_s("skew1.2", 2**16)


def test_a_local_config_json_is_a_model(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "mine", num_hidden_layers=3, max_position_embeddings=4096)
    for name in (folder, folder / "config.json"):
        place: Any = deployment(f"{name}/l4")
        assert (place.model.layers, place.model.dtype_bytes, place.max_tokens) == (3, 2, 4096)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, not list"),
        ('{"hidden_size": 64}', "has no 'model_type'"),
        ('{"model_type": "llama"}', "has no whole number 'num_hidden_layers'"),
    ],
)
def test_a_config_json_that_is_none_says_why(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        deployment(f"{tmp_path}/a100")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_local_experts", 8, "has no whole number 'num_experts_per_tok'"),
        ("kv_lora_rank", 512, "has no whole number 'qk_nope_head_dim'"),
        ("quantization_config", {"quant_method": "x"}, "quantization_config.quant_method is 'x'"),
        ("layer_types", ["full_attention", "linear_attention"], "layers without attention"),
        ("mamba_d_state", 128, "'mamba_d_state' is not understood"),
        ("torch_dtype", "float8_e4m3fn", "'torch_dtype' is 'float8_e4m3fn'"),
    ],
)
def test_a_config_json_that_is_not_understood_is_refused(
    tmp_path: Path, key: str, value: object, said: str
) -> None:
    folder = config_folder(tmp_path / "mine", **{key: value})
    with pytest.raises(ConfigError, match=re.escape(said)):
        deployment(f"{folder}/h100")


def test_a_mixture_of_experts_of_ones_own_is_read(tmp_path: Path) -> None:
    keys = {"num_local_experts": 64, "num_experts_per_tok": 2, "quantization_config": {"quant_method": "fp8"}}
    dense: Any
    mixed: Any
    dense, mixed = (
        deployment(f"{config_folder(tmp_path / name, **more)}/h100:tp2")
        for name, more in (("dense", {}), ("mixed", keys))
    )
    assert mixed.model.experts.count == 64
    assert mixed.model.parameters > 5 * dense.model.parameters
    few, many = (mixed.times().stage_s(StepShape(n, n, n * 100, 0.0, n)) for n in (1, 64))
    assert many > few


@pytest.mark.parametrize(
    "keys",
    [
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False},  # Qwen2
        {"sliding_window": 32768, "max_position_embeddings": 32768},
        {"num_experts": 0, "quantization_config": None, "layer_types": ["full_attention"] * 2},
        {"torch_dtype": "float16"},
    ],
)
def test_a_dense_model_that_mentions_what_it_does_not_do_is_read(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    assert deployment(f"{config_folder(tmp_path / 'mine', **keys)}/h100").source.kind == "roofline"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sarathy", "did you mean 'sarathi'?"),
        ("sarathi@", "must be NAME@N"),
        ("sarathi@-3", "must be NAME@N"),
        ("default@0", "must be NAME@N"),
    ],
)
def test_a_schedulers_name_that_is_none(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        scheduler_choice(text)


def test_a_budget_after_the_name() -> None:
    assert scheduler_choice("default@512").step_tokens == 512
    fixed = scheduler_choice("sarathi@512", tbt_slo_ms=100.0).config
    assert fixed is not None
    assert (fixed.token_budget, fixed.tbt_slo_ms) == (512, None)


def test_the_scheduler_is_the_very_class_that_serves() -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_sarathi.engine.scheduler import AsyncSarathiScheduler, SarathiScheduler

    place = deployment("mistral-7b/a100")
    ours, stock = (build(place, scheduler_choice(name)) for name in ("sarathi", "default"))
    assert isinstance(ours, AsyncSarathiScheduler)
    assert isinstance(stock, AsyncScheduler)
    assert not isinstance(stock, SarathiScheduler)
    assert stock.max_num_scheduled_tokens == 2048  # vLLM's default for a server on an A100
    piped = build(deployment("llama2-70b/8xa40"), scheduler_choice("sarathi"))
    assert isinstance(piped, SarathiScheduler)
    assert isinstance(piped, Scheduler)
    assert not isinstance(piped, AsyncScheduler)


# --- The CPU, by its calibration ---


def calibrate(
    folder: Path, served: str, decode_s: float, device: str = "Some CPU, 2 cores", **key: Any
) -> None:
    model = StepTimeModel()
    for _ in range(64):
        model.observe(StepShape(1, 1, 100, 0.0, 1), decode_s)
    save_calibration(model.to_mapping(), folder, {"model": served, "device": device, **key})


def test_the_cpu_is_what_profile_measured_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    served = str(config_folder(tmp_path / "model", max_position_embeddings=4096))
    kept = tmp_path / "kept"
    calibrate(kept, served, 0.040, dtype="a")
    for path in kept.iterdir():
        os.utime(path, (time.time() - 100,) * 2)
    calibrate(kept, served, 0.080, dtype="b")
    calibrate(kept, served, 0.001, device="NVIDIA A100")  # not a CPU's
    calibrate(kept, "another", 0.002)
    place: Any = deployment(f"{served}/cpu", str(kept))
    assert place.in_flight == 1  # vLLM schedules synchronously on a CPU
    assert place.kv_tokens == 2**30 // place.model.kv_bytes_per_token
    decode = StepShape(1, 1, 100, 0.0, 1)
    drawn = [place.times(seed).stage_s(decode, 0) for seed in range(200)]
    assert sum(drawn) / 200 == pytest.approx(0.080, rel=0.03)
    assert place.times(5).stage_s(decode, 0) == place.times(5).stage_s(decode, 0)


def test_a_cpu_that_nobody_has_profiled(tmp_path: Path) -> None:
    served = config_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match="vllm-sarathi profile --model"):
        deployment(f"{served}/cpu", str(tmp_path))
    with pytest.raises(ConfigError, match="no calibration"):
        deployment(f"{served}/cpu", "none")


def test_a_broken_calibration_is_named(tmp_path: Path) -> None:
    served = str(config_folder(tmp_path / "model"))
    calibrate(tmp_path, served, 0.04)
    (path,) = tmp_path.glob("calibration-*.json")
    values = json.loads(path.read_text())
    values["model"]["kinds"][0]["weight"] = -1
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=re.escape(path.name)):
        deployment(f"{served}/cpu", str(tmp_path))


@pytest.mark.parametrize(("space", "said"), [("x", "must be a whole number of GiB"), ("1", "does not fit")])
def test_a_kv_cache_that_is_no_number_or_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: str, said: str
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
    served = str(config_folder(tmp_path / "model", num_hidden_layers=200, max_position_embeddings=131072))
    calibrate(tmp_path, served, 0.04)
    with pytest.raises(ConfigError, match=said):
        deployment(f"{served}/cpu", str(tmp_path))


def test_a_kv_cache_in_fp8_holds_twice_as_many_tokens() -> None:
    own, asked = (deployment(f"llama-3.1-8b/h100{how}") for how in ("", ":kvfp8"))
    assert asked.kv_tokens == pytest.approx(2 * own.kv_tokens, abs=2)
    shape = StepShape(8, 8, 8 * 8192, 0.0, 8)
    assert asked.times().stage_s(shape, 0) < own.times().stage_s(shape, 0)
