"""Rehearsals judged by silicon: the measured servers of aiconfigurator-core's sample, simulated row by row.

A row of the sample says what a real vLLM server gave in a closed loop: so many clients, each with one request at a
time, prompts and answers of stated lengths; the time to the first token and the time per token after it. The same
loop is simulated with vLLM's own scheduler, the default budget of the device, and step times from measured kernels.

Constants (`simulation.devices.corrections`, `simulation.devices.host`) are fitted on the rows whose id ends in an even
number, and the rows with odd ones judge. A row whose stated load cannot be what was run is left out, with the reason.
"""

import csv
import functools
import importlib.resources
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_sarathi.core.config import ConfigError, nearest_hint
from vllm_sarathi.simulation.closed_loop import ClosedLoop, Frontend
from vllm_sarathi.simulation.deployment import build, deployment, scheduler_choice
from vllm_sarathi.simulation.devices.measured import MeasuredTimes
from vllm_sarathi.simulation.devices.package import known_models, model_config
from vllm_sarathi.simulation.devices.roofline import device
from vllm_sarathi.simulation.models import ModelShape, shape_of_config
from vllm_sarathi.simulation.placement import Deployment, MeasuredDeployment
from vllm_sarathi.simulation.quantization import NAMED_BYTES
from vllm_sarathi.simulation.simulator import RequestLog
from vllm_sarathi.simulation.workload import SimulatedRequest

SAMPLE = ("systems", "silicon_sample.csv")

ASYNCHRONOUS_SINCE = (0, 14)
"""The first vLLM that schedules asynchronously by default; InferenceMAX asked for it before."""

LENGTH_SHARE = 0.8
"""InferenceMAX draws lengths evenly from this share of the stated ones up to all (`--random-range-ratio 0.8`)."""

FRONTEND = Frontend(0.010, 10e-6)
GATEWAY = Frontend(0.010, 70e-6)
"""What was between the clients and the engines: vLLM's own server, and Dynamo's before it (the rows of other harnesses
than InferenceMAX). Fitted on the rows with even ids: of 60 of them the median |error| of TTFT was the least."""

WAVES = 10
"""Requests for each client (`--num-prompts` of InferenceMAX is ten times its `--max-concurrency`)."""

MAX_TOKENS = 12288
"""Longer than any row's prompt and answer."""

STEADY_REQUESTS, LONG_ANSWER = 32, 2048
"""At least so many requests are looked at, unless answers are long."""

QUANTIZED_FROM = {"nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Llama-3.1-8B-Instruct"}
"""Checkpoints that the package has no config.json of, and what they were quantized from."""

KV_AT_LEAST = 1.0
"""Bytes of an element of the KV cache, at least: the sample does not say it."""

BEYOND_SHARE = 0.1
"""Where so many rows of a model on a device are quicker than its data sheet, none of them had the stated load."""

QUEUED_SHARE = 1.5
FALLING_SHARE = 1.1
"""How far a figure may be beyond what the rest of its deployment says."""


SOME_ROWS = 4
"""So many of each group are simulated unless all are asked for."""

BATCH_ROWS = 6
"""Rows of one deployment that a process simulates one after the other."""


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
        how = f"{precision}tp{self.tensor_parallel}{'ep' if self.expert_parallel else ''}"
        return f"{model}/{self.system.partition('_')[0]}:{how}"

    @property
    def asynchronous(self) -> bool:
        """Whether its server scheduled asynchronously."""
        numbers = [
            int(number) for number in re.findall(r"^(\d+)\.(\d+)", self.version)[:1] for number in number
        ]
        return self.ranged or not numbers or tuple(numbers) >= ASYNCHRONOUS_SINCE


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
        return "prompts were read on other devices than those that decode, by a router that is not stated"
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
    products = 2 * (shape.active_parameters - shape.embedding_parameters) * row.prompt_tokens
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
        f"{row.ttft_ms / 1e3:.1f} s to the first token is longer than reading all {row.concurrency} prompts one after "
        f"another takes ({row.concurrency * prompt_s:.1f} s): fewer were in the engine than stated"
    )


# --- Simulation ---


@functools.cache
def place_of(name: str) -> Deployment:
    """Return a deployment that serves the sample's lengths."""
    return deployment(name, longest=MAX_TOKENS)


def requests_of(row: SiliconRow, count: int, seed: int = 0) -> list[SimulatedRequest]:
    """Return requests as the row's clients drew them."""
    draw = random.Random(seed)

    def length(stated: int) -> int:
        return draw.randint(int(stated * LENGTH_SHARE), stated) if row.ranged else stated

    return [
        SimulatedRequest(0.0, length(row.prompt_tokens), max(2, length(row.output_tokens)))
        for _ in range(count)
    ]


def simulate(row: SiliconRow) -> dict[str, Any]:
    """Return what a row's load gives in simulation: `tpot_ms`, `ttft_ms`, `source`; or `left_out`.

    The harness sends WAVES requests for each client, the first of all at once. Here each client's first request is
    one wave, and the requests that are answered next stand for all the others; the run ends with them.
    """
    try:
        place = place_of(row.place)
    except ConfigError as error:
        return {"left_out": str(error)}
    if not isinstance(place, MeasuredDeployment):
        return {"left_out": place.source.lines[-1]}
    if (reason := queued(row, place.read_s(row.prompt_tokens))) is not None:
        return {"left_out": reason}
    first, steady = waves(row, place, FRONTEND if row.ranged else GATEWAY)
    return {
        "tpot_ms": _mean_of_waves(first, steady, tpot_s) * 1e3,
        "ttft_ms": _mean_of_waves(first, steady, ttft_s) * 1e3,
        "source": place.source.kind,
        "warnings": list(place.source.warnings),
    }


Answer = tuple[float, RequestLog]
"""When a request was sent, and its log."""


def waves(
    row: SiliconRow, place: MeasuredDeployment, frontend: Frontend
) -> tuple[list[Answer], list[Answer]]:
    """Return the first request of each client, and those of the later ones that stand for all of them."""
    clients = row.concurrency
    counted = clients if row.output_tokens > LONG_ANSWER else max(clients, STEADY_REQUESTS)
    requests = requests_of(row, 2 * clients + counted)
    in_flight = place.in_flight if row.asynchronous else 1
    scheduler = build(place, scheduler_choice("default"), in_flight=in_flight)
    times = MeasuredTimes(place.kernels, place.stages, row.asynchronous)
    loop = ClosedLoop(scheduler, times, requests, clients, frontend, in_flight)
    loop.run(lambda run: len(run.finished) >= clients + counted)
    answers = loop.answered()
    first = [answer for answer in answers if not answer[0]]
    return first, answers[len(first) :][:counted]


def tpot_s(answer: Answer) -> float:
    """Return a request's mean time per token after its first."""
    came_s = answer[1].token_s
    return (came_s[-1] - came_s[0]) / (len(came_s) - 1)


def ttft_s(answer: Answer) -> float:
    """Return a request's time to its first token, as a client sees it."""
    return answer[1].token_s[0] - answer[0]


def _mean_of_waves(
    first: Sequence[Answer], steady: Sequence[Answer], figure: Callable[[Answer], float]
) -> float:
    once, later = (statistics.fmean(map(figure, answers)) for answers in (first, steady))
    return (once + (WAVES - 1) * later) / WAVES


# --- The command ---

Row = dict[str, Any]


def asked_rows(rows: Sequence[SiliconRow], ids: Path | None, every: bool) -> list[SiliconRow]:
    """Return the rows to simulate: those of a file, or the judging ones, of each group a few unless all are asked for.

    Args:
        rows: the sample.
        ids: a file with an id on each line.
        every: whether all judging rows are.

    Raises:
        ConfigError: the file names a row that is not there, or none.
    """
    if ids is None:
        judging = [row for row in rows if row.judging]
        return judging if every else _some(judging)
    names = [line.strip() for line in ids.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise ConfigError(f"--ids {ids}: names no row; it has an id of the sample on each line.")
    known = {row.name: row for row in rows}
    for name in names:
        if name not in known:
            raise ConfigError(f"--ids {ids}: no row {name!r} of vLLM; {nearest_hint(name, known)}")
    return [known[name] for name in names]


def _some(rows: Sequence[SiliconRow]) -> list[SiliconRow]:
    """Return up to SOME_ROWS of each group, spread evenly over it."""
    groups: dict[Any, list[SiliconRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    chosen = []
    for group in groups.values():
        group.sort(key=lambda row: (row.prompt_tokens, row.output_tokens, row.concurrency, row.name))
        step = max(1.0, len(group) / SOME_ROWS)
        chosen += [group[int(i * step)] for i in range(min(SOME_ROWS, len(group)))]
    return chosen


def simulate_together(rows: Sequence[SiliconRow]) -> list[Row]:
    """Return what rows of one deployment give; they share its kernel times."""
    return [simulate(row) for row in rows]


def judge(
    rows: Sequence[SiliconRow], without: Mapping[str, str], run_all: Callable[..., list[list[Row]]]
) -> list[Row]:
    """Return a result for each row, in their order; see the schema in the issue of the command's `--json`.

    Args:
        rows: to simulate.
        without: why some are left out, by their names.
        run_all: `farm.run_all` with all but its first two arguments.
    """
    batches: dict[Any, list[SiliconRow]] = {}
    for row in rows:
        if row.name not in without:
            batches.setdefault((row.place, row.asynchronous), []).append(row)
    tasks = [
        batch[start : start + BATCH_ROWS]
        for batch in batches.values()
        for start in range(0, len(batch), BATCH_ROWS)
    ]
    # The long ones first, so that no core waits for one of them at the end.
    tasks.sort(key=lambda task: -sum(row.concurrency * row.output_tokens for row in task))
    found = {
        row.name: result
        for task, results in zip(tasks, run_all(simulate_together, tasks), strict=True)
        for row, result in zip(task, results, strict=True)
    }
    return [_result(row, found.get(row.name, {"left_out": without.get(row.name)})) for row in rows]


def _result(row: SiliconRow, found: Row) -> Row:
    return {
        "id": row.name,
        "model": row.model,
        "system": row.system,
        "precision": row.precision or "checkpoint",
        "tp": row.tensor_parallel,
        "concurrency": row.concurrency,
        "isl": row.prompt_tokens,
        "osl": row.output_tokens,
        "tpot_ms": found.get("tpot_ms"),
        "silicon_tpot_ms": row.tpot_ms,
        "ttft_ms": found.get("ttft_ms"),
        "silicon_ttft_ms": row.ttft_ms,
        "source": found.get("source"),
        "left_out": found.get("left_out"),
        "warnings": found.get("warnings", []),
    }


def error_of(row: Row, metric: str) -> float:
    """Return by how much a simulated figure is off, as a share of the measured one; positive where it is too long."""
    return float(row[f"{metric}_ms"] / row[f"silicon_{metric}_ms"] - 1)


def grouped(rows: Sequence[Row]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Return the simulated rows by model, system, precision and parallelism, the worst TPOT first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["left_out"] is None:
            groups.setdefault((row["model"], row["system"], row["precision"], row["tp"]), []).append(row)
    return sorted(groups.items(), key=lambda item: -median_error(item[1], "tpot"))


def median_error(rows: Sequence[Row], metric: str) -> float:
    """Return the median of the errors' sizes."""
    return statistics.median(abs(error_of(row, metric)) for row in rows)


def silicon_table(rows: Sequence[Row]) -> Table:
    """Return the errors by group, the worst first."""
    shown = Table(title="simulated against measured servers: median |error|, and median error")
    for name in ("model", "system", "precision", "source"):
        shown.add_column(name)
    for name in ("tp", "rows", "TPOT", "signed", "TTFT", "signed"):
        shown.add_column(name, justify="right")
    for (model, system, precision, width), group in grouped(rows):
        figures = []
        for metric in ("tpot", "ttft"):
            signed = statistics.median(error_of(row, metric) for row in group)
            figures += [f"{median_error(group, metric):.1%}", f"{signed:+.1%}"]
        shown.add_row(model, system, precision, group[0]["source"], str(width), str(len(group)), *figures)
    return shown


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Return the errors over all rows, what was left out and why, and what tables were missing."""
    simulated = [row for row in rows if row["left_out"] is None]
    lines = []
    if simulated:
        tpot, ttft = (median_error(simulated, metric) for metric in ("tpot", "ttft"))
        lines.append(f"{len(simulated)} rows: median |error| of TPOT {tpot:.1%}, of TTFT {ttft:.1%}")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["left_out"] is not None:
            reasons.setdefault(row["left_out"], []).append(row["id"])
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"left out, {names[0]}{more}: {reason}")
    warned = sorted({(row["model"], row["system"], text) for row in simulated for text in row["warnings"]})
    lines += [f"warning: {model} on {system}: {text}" for model, system, text in warned]
    return lines
