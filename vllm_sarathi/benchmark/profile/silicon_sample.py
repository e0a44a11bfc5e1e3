"""The measured servers of aiconfigurator-core's silicon sample: its rows, and those whose load cannot be what was run.

A row says what a real vLLM server gave in a closed loop: a number of clients, each with one request at a time, prompts
and answers of stated lengths; the time to the first token and the time per token after it.

Constants are fitted on the rows whose id ends in an even number, and the rows with odd ones judge. A row whose stated
load cannot be what was run is left out, with the reason; reasons rest on the sample and on data sheets, and the last of
them, which needs to know how long a prompt takes to read, on that alone.
"""

import csv
import functools
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.simulation.devices.package import known_models, model_config
from vllm_sarathi.simulation.devices.roofline import device
from vllm_sarathi.simulation.models import ModelShape, shape_of_config
from vllm_sarathi.simulation.quantization import NAMED_BYTES

SAMPLE = ("systems", "silicon_sample.csv")

ASYNCHRONOUS_SINCE = (0, 14)
"""The first vLLM that schedules asynchronously by default; InferenceMAX asked for it before."""

UNSTATED = (99, 0)

LENGTH_SHARE = 0.8
"""InferenceMAX draws lengths evenly from this share of the stated ones up to all (`--random-range-ratio 0.8`)."""

QUANTIZED_FROM = {"nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Llama-3.1-8B-Instruct"}
"""Checkpoints that the package has no config.json of, and what they were quantized from."""

FP8_KV_ON = ("b200", "b300")
"""Where servers had their KV cache in FP8; elsewhere it was what the checkpoint states. The sample does not say it: of
the rows with even ids, those of MiniMax-M2.5 in FP8 and of gpt-oss are the nearer for it there, and the further off on
Hopper; those of Llama and Kimi say little."""

KV_AT_LEAST = 1.0
"""Bytes of an element of the KV cache, at least: the sample does not say it."""

BEYOND_SHARE = 0.1
"""The share of rows quicker than the data sheet above which none of a model's rows on a device had the stated load."""

QUEUED_SHARE = 1.5
FALLING_SHARE = 1.1
"""How far a figure may be beyond what the rest of its deployment says."""


@dataclass(frozen=True, slots=True)
class SiliconRow:
    """One row of the sample.

    Attributes:
        name: its `id`.
        model, system, precision: as the sample says them; the precision is empty for the checkpoint's own.
        tensor_parallel: devices that share a layer; 0 where prefill and decode have their own.
        experts_over: devices that share the experts; 0 where the row says nothing of it.
        expert_parallel: whether experts are distributed whole.
        engines: over how many the attention is data parallel.
        aggregated: whether one engine reads prompts and decodes.
        concurrency: clients; 0 where none is stated.
        prompt_tokens, output_tokens: lengths.
        version: of vLLM; empty where none is stated.
        ranged: whether lengths are drawn from LENGTH_SHARE on.
        ttft_ms, tpot_ms: measured.
    """

    name: str
    model: str
    system: str
    precision: str
    tensor_parallel: int
    experts_over: int
    expert_parallel: bool
    engines: int
    aggregated: bool
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    version: str
    ranged: bool
    ttft_ms: float
    tpot_ms: float

    @property
    def judging(self) -> bool:
        """Whether its id ends in an odd number."""
        return int(re.findall(r"\d+", self.name)[-1]) % 2 == 1

    @property
    def server(self) -> tuple[str, str, str, int, bool, str, int, int]:
        """What it shares with rows that differ in their concurrency alone."""
        where = (self.model, self.system, self.precision, self.tensor_parallel, self.expert_parallel)
        return (*where, self.version, self.prompt_tokens, self.output_tokens)

    @property
    def group(self) -> tuple[str, str, str, int]:
        """What the table puts it under."""
        return self.model, self.system, self.precision or "checkpoint", self.tensor_parallel

    @property
    def place(self) -> str:
        """The deployment that it states, as `deployment` takes it."""
        model, precision = _checkpoint(self.model, self.precision)
        kv = "kvfp8" if self.system.startswith(FP8_KV_ON) else ""
        how = f"{precision}tp{self.tensor_parallel}{'ep' if self.expert_parallel else ''}{kv}"
        return f"{model}/{self.system.partition('_')[0]}:{how}"

    @property
    def release(self) -> tuple[int, int]:
        """Which vLLM its server was; where none is stated, a later one than all."""
        said = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(said[1]), int(said[2])) if said else UNSTATED

    @property
    def asynchronous(self) -> bool:
        """Whether its server scheduled asynchronously."""
        return self.ranged or self.release >= ASYNCHRONOUS_SINCE


def _checkpoint(model: str, precision: str) -> tuple[str, str]:
    """Return the checkpoint that a row's server had loaded, and the precision to ask for beside its own."""
    if precision in ("", "int4"):
        return model, ""
    if model in QUANTIZED_FROM:
        return QUANTIZED_FROM[model], precision
    known = known_models()
    config_says = {"fp8": "-fp8", "fp4": "-nvfp4"}[precision]
    owned = f"nvidia/{model.rpartition('/')[2]}{config_says}".lower()
    if precision == "fp4" and owned in known:
        return known[owned], ""
    own = known.get(model.lower(), model)
    return model, "" if _quantized(own) else {"fp8": "fp8", "fp4": "nvfp4"}[precision]


def _quantized(model: str) -> bool:
    return model in set(known_models().values()) and bool(model_config(model).get("quantization_config"))


def read_sample(path: Path | None = None) -> list[SiliconRow]:
    """Return the rows of vLLM's servers.

    Args:
        path: a file like the package's; None for the package's own.

    Raises:
        ConfigError: the package is not installed.
    """
    if path is None:
        try:
            path = Path(str(importlib.resources.files("aiconfigurator_core").joinpath(*SAMPLE)))
        except ModuleNotFoundError as error:
            raise ConfigError(
                "--silicon: aiconfigurator-core is not installed: pip install 'vllm-sarathi[devices]'."
            ) from error
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(fields) for fields in csv.DictReader(file) if fields["backend"] == "vllm"]


def _row(fields: Mapping[str, str]) -> SiliconRow:
    def number(key: str) -> int:
        return int(float(fields[key] or 0))

    origin = fields["silicon_data_source"]
    stated = re.search(r"silicon_concurrency=(\d+)", origin)
    return SiliconRow(
        name=fields["id"],
        model=fields["model_path"],
        system=fields["system"],
        precision=fields["precision"],
        tensor_parallel=number("tp_size"),
        experts_over=number("moe_tp_size") * number("moe_ep_size"),
        expert_parallel=number("moe_ep_size") > 1,
        engines=max(1, number("attention_dp_size")),
        aggregated=fields["mode"] == "agg",
        concurrency=int(stated[1]) if stated else 0,
        prompt_tokens=number("isl"),
        output_tokens=number("osl"),
        version=fields["backend_version"],
        ranged="aic-auto-gap-analysis" not in origin,
        ttft_ms=float(fields["silicon_ttft_ms"]),
        tpot_ms=float(fields["silicon_tpot_ms"]),
    )


# --- Rows whose stated load cannot be what was run ---


def left_out(rows: Sequence[SiliconRow]) -> dict[str, str]:
    """Return why rows are not simulated, by their names; what it says rests on the sample and data sheets alone."""
    reasons = {row.name: reason for row in rows if (reason := _unsaid(row)) is not None}
    stated = [row for row in rows if row.name not in reasons]
    beyond = {row.name: reason for row in stated if (reason := _beyond(row)) is not None}
    for where in {(row.model, row.system) for row in stated if row.name in beyond}:
        beside = [row for row in stated if (row.model, row.system) == where]
        count = sum(row.name in beyond for row in beside)
        if count >= BEYOND_SHARE * len(beside):
            why = f"{count} of the {len(beside)} rows of this model there are quicker than data sheets allow"
            reasons |= {row.name: f"{why}: their load was another one" for row in beside}
    reasons |= beyond
    stated = [row for row in stated if row.name not in reasons]
    for row in stated:
        if (reason := _falling(row, stated)) is not None:
            reasons[row.name] = reason
    return reasons


def _unsaid(row: SiliconRow) -> str | None:
    if not row.aggregated:
        return "prompts were prefilled on other devices than those that decode, behind a router that is not stated"
    if not row.concurrency:
        return "states no concurrency"
    if row.engines > 1:
        devices = row.tensor_parallel * row.engines
        return (
            f"{row.engines} engines with a scheduler each, and a router that is not stated "
            f"({devices} devices by its columns)"
        )
    if row.experts_over > 1 and row.experts_over != row.tensor_parallel:
        return (
            f"attention over {row.tensor_parallel} devices and experts over {row.experts_over} "
            "are not one engine of vLLM"
        )
    return None


def _beyond(row: SiliconRow) -> str | None:
    """Return why a row is quicker than its devices can be."""
    shape, unit, width = _shape(row), device(row.system.partition("_")[0]), row.tensor_parallel
    flops_per_s = unit.flops_per_s * width * unit.speed_up(shape.precision)
    products = 2.0 * (shape.active_parameters - shape.embedding_parameters) * row.prompt_tokens
    pairs = row.prompt_tokens**2 / 2
    products += sum(k.count * k.attention.pair_flops * pairs for k in shape.kinds if k.attention)
    context = row.prompt_tokens + row.output_tokens / 2
    read = shape.weight_bytes if shape.experts is None else 0.0
    read += row.concurrency * shape.kv_bytes(context) * KV_AT_LEAST / shape.precision.kv
    least_s = read / (unit.bytes_per_s * width) + row.concurrency / row.output_tokens * products / flops_per_s
    if row.tpot_ms / 1e3 >= least_s:
        return None
    return (
        f"{row.tpot_ms:.1f} ms a token is less than the bandwidth and the peak of the data sheet allow "
        f"{row.concurrency} requests at a time ({least_s * 1e3:.1f} ms)"
    )


@functools.cache
def _shape_in(model: str, precision: str) -> ModelShape:
    hub_model, asked = _checkpoint(model, precision)
    name = known_models()[hub_model.lower()]
    shape = shape_of_config(model_config(name), name)
    return shape.weights_in(NAMED_BYTES[asked]) if asked else shape


def _shape(row: SiliconRow) -> ModelShape:
    return _shape_in(row.model, row.precision)


def _falling(row: SiliconRow, rows: Sequence[SiliconRow]) -> str | None:
    """Return why a row cannot be, beside one of the same server with more clients."""
    for other in rows:
        more = other.server == row.server and other.concurrency > row.concurrency
        if more and row.tpot_ms > FALLING_SHARE * other.tpot_ms:
            return (
                f"{row.tpot_ms:.1f} ms a token for {row.concurrency} requests at a time, and the same server has "
                f"{other.tpot_ms:.1f} ms for {other.concurrency}"
            )
    return None


def queued(row: SiliconRow, prompt_s: float) -> str | None:
    """Return why a row's requests cannot all have been in the engine.

    Args:
        row: the row.
        prompt_s: seconds to read one of its prompts alone.
    """
    all_s = QUEUED_SHARE * row.concurrency * prompt_s + row.tpot_ms / 1e3
    if row.ttft_ms / 1e3 <= all_s:
        return None
    return (
        f"{row.ttft_ms / 1e3:.1f} s to the first token is more than prefilling all {row.concurrency} prompts one after "
        f"another takes ({row.concurrency * prompt_s:.1f} s): fewer were in the engine than stated"
    )
