"""Simulations against measured accelerators: the measured servers of `silicon_sample`, simulated row by row.

The same closed loop is simulated with vLLM's own scheduler, the default budget of the device, and step times from
measured kernels.
"""

import functools
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_sarathi.benchmark.profile.silicon_sample import LENGTH_SHARE, SiliconRow, queued
from vllm_sarathi.core.config import ConfigError, nearest_hint
from vllm_sarathi.simulation.closed_loop import ClosedLoop, Frontend
from vllm_sarathi.simulation.deployment import build, deployment, scheduler_choice
from vllm_sarathi.simulation.devices.measured import MeasuredTimes
from vllm_sarathi.simulation.placement import Deployment, MeasuredDeployment
from vllm_sarathi.simulation.simulator import RequestLog
from vllm_sarathi.simulation.workloads.requests import SimulatedRequest

FRONTEND = Frontend(0.010, 5e-6)
GATEWAY = Frontend(0.010, 30e-6)
"""What was between the clients and the engines: vLLM's own server, and a gateway before it in the rows of another
harness than InferenceMAX. Chosen out of three each on 38 rows whose ids end in even numbers, by the median |error| of
TTFT: of the first, 11% (16% with 10e-6, 18% with 15e-6)."""

WAVES = 10
"""Requests for each client (`--num-prompts` of InferenceMAX is ten times its `--max-concurrency`)."""

MAX_TOKENS = 12288
"""Longer than any row's prompt and answer."""

SPARE_TOKENS = 64
"""Blocks that a request has begun, and those of the steps in flight."""

STEADY_REQUESTS, LONG_ANSWER = 32, 2048
"""The least number of requests that are looked at, unless answers are long."""

SOME_ROWS = 4
"""Rows of each group that are simulated unless all are asked for."""

FITTED = ", fitted"
"""What marks rows on which constants were fitted: their errors tell nothing of others."""

CHECKPOINT = "checkpoint"
"""The precision of a row that states none."""

BATCH_ROWS = 6
"""Rows of one deployment that a process simulates one after the other."""


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
    if (reason := queued(row, place.prefill_s(row.prompt_tokens))) is not None:
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
    # Each client's request, and room for a whole step beside them: nothing is ever preempted for less.
    enough = clients * (row.prompt_tokens + row.output_tokens + SPARE_TOKENS) + 2 * place.step_tokens
    scheduler = build(place, scheduler_choice("default"), in_flight=in_flight, enough_tokens=enough)
    times = MeasuredTimes(place.kernels.under(row.release), place.stages)
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
        ConfigError: the file cannot be read, or names a row that is not there, or none.
    """
    if ids is None:
        judging = [row for row in rows if row.judging]
        return judging if every else _some(judging)
    try:
        text = ids.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"--ids {ids}: cannot be read: {why}.") from error
    names = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
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
    """Return a result for each row, in their order: see `written`.

    Args:
        rows: to simulate.
        without: why some are left out, by their names.
        run_all: `farm.run_all` with all but its first two arguments.
    """
    batches: dict[Any, list[SiliconRow]] = {}
    for row in rows:
        if row.name not in without:
            batches.setdefault((row.place, row.release), []).append(row)
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
        "fitted": not row.judging,
        "model": row.model,
        "system": row.system,
        "precision": row.precision or CHECKPOINT,
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


def written(rows: Sequence[Row]) -> list[Row]:
    """Return rows as `--json` has them: what to know before trusting a deployment is printed once, with the table."""
    return [{key: value for key, value in row.items() if key != "warnings"} for row in rows]


def error_of(row: Row, metric: str) -> float:
    """Return by how much a simulated figure is off, as a share of the measured one; positive where it is too long."""
    return float(row[f"{metric}_ms"] / row[f"silicon_{metric}_ms"] - 1)


def grouped(rows: Sequence[Row]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Return the simulated rows by model, system, precision, parallelism and use, the worst TPOT first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["left_out"] is None:
            shared = ("model", "system", "precision", "tp", "fitted")
            groups.setdefault(tuple(row[key] for key in shared), []).append(row)
    return sorted(groups.items(), key=lambda item: -median_error(item[1], "tpot"))


def median_error(rows: Sequence[Row], metric: str) -> float:
    """Return the median of the errors' sizes."""
    return statistics.median(abs(error_of(row, metric)) for row in rows)


def silicon_table(rows: Sequence[Row]) -> Table:
    """Return the errors by group, the worst first; rows on which constants were fitted are marked."""
    title = "simulated against measured servers: median |error|, and median error"
    shown = Table(title=title, box=None, pad_edge=False)
    shown.add_column("model", overflow="fold")
    shown.add_column("on", no_wrap=True)
    for name in ("rows", "TPOT", "signed", "TTFT", "signed"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("source", no_wrap=True)
    for (model, system, precision, width, fitted), group in grouped(rows):
        figures = []
        for metric in ("tpot", "ttft"):
            signed = statistics.median(error_of(row, metric) for row in group)
            figures += [f"{median_error(group, metric):.1%}", f"{signed:+.1%}"]
        where = f"{system.partition('_')[0]}:{'' if precision == CHECKPOINT else precision}tp{width}"
        name = model.rpartition("/")[2] + FITTED * fitted
        shown.add_row(name, where, str(len(group)), *figures, group[0]["source"])
    return shown


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Return the errors over all rows, what was left out and why, and what tables were missing."""
    simulated = [row for row in rows if row["left_out"] is None]
    lines = []
    for fitted in (False, True):
        if mine := [row for row in simulated if row["fitted"] is fitted]:
            tpot, ttft = (median_error(mine, metric) for metric in ("tpot", "ttft"))
            said = f"{len(mine)} rows{FITTED * fitted}"
            lines.append(f"{said}: median |error| of TPOT {tpot:.1%}, of TTFT {ttft:.1%}")
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
