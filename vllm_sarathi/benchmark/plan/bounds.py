"""Bounds on what one replica can carry, from step times alone: cheap, and never below what a run would show.

    a step with a chunk and decodes takes at least as long as either alone, so per second a replica
      - reads no more prompts than it would if it did nothing else, at the size of step that suits it best
      - writes no more tokens than the best batch of decodes would, among those whose step keeps the SLO

A share of the requests may be late (`attainment`), and so may a hundredth of the gaps of those that are not; the rest
is written in steps that keep the SLO. The bound on decodes is widened by just that.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vllm_sarathi.benchmark.plan.load import Load
from vllm_sarathi.core.types import StepShape, chunk_work
from vllm_sarathi.simulation.deployment import deployment
from vllm_sarathi.simulation.outcome import SLO_PERCENTILE
from vllm_sarathi.simulation.placement import Deployment, DoesNotFit
from vllm_sarathi.simulation.simulator import StepTimes

GRID = 1.1
"""Batch sizes and chunks that are looked at grow by this factor."""

MOST_CHUNK = 32768


@dataclass(frozen=True)
class Bound:
    """What is known of a deployment without a run.

    Attributes:
        most_qps: the highest rate that one replica could carry.
        refused: why it cannot do it at all; empty where it may.
        kind: `memory`, `slo` or empty.
        fastest_ms: the shortest time between two tokens of one request alone, or its shortest time to first token,
            where that breaks the SLO.
        source: where its step times come from.
        notes: what a reader should know of them.
    """

    most_qps: float = 0.0
    refused: str = ""
    kind: str = ""
    fastest_ms: float = 0.0
    source: str = ""
    notes: tuple[str, ...] = ()


def bound(name: str, load: Load) -> Bound:
    """Return what is known of a deployment without a run.

    Raises:
        ConfigError: an unknown model or device.
    """
    try:
        place = deployment(name, longest=load.longest)
    except DoesNotFit as error:
        return Bound(refused=str(error), kind="memory")
    source = place.source
    times = place.times()
    broken = _broken_alone(times, load)
    if broken is not None:
        said, fastest_ms = broken
        return Bound(0.0, f"{name}: {said}", "slo", fastest_ms, source.kind, source.lines)
    most_qps = min(_decode_qps(place, times, load), _read_qps(place, times, load))
    return Bound(most_qps, source=source.kind, notes=source.lines)


def _broken_alone(times: StepTimes, load: Load) -> tuple[str, float] | None:
    """Return what a request breaks that has the replica to itself, and what it would get; None where it keeps all."""
    token_ms = _decode_s(times, 1, 1) * times.stages * 1e3
    kinds = {r.kind for r in load.requests}
    for kind in sorted(kinds):
        mine = [r for r in load.requests if r.kind == kind]
        tbt_ms = min((r.tbt_slo_ms for r in mine if r.tbt_slo_ms is not None), default=math.inf)
        if token_ms > tbt_ms:
            return (
                f"one request alone has {token_ms:.3g} ms between its tokens, more than {tbt_ms:g}",
                token_ms,
            )
        ttft_ms = [r.ttft_slo_ms for r in mine if r.ttft_slo_ms is not None]
        if not ttft_ms or load.share_prefixes:
            continue
        prompt = int(np.quantile([r.prompt_tokens for r in mine], load.attainment, method="lower"))
        first_ms = _read_s(times, prompt, 1) * times.stages * 1e3
        if first_ms > max(ttft_ms):
            said = f"a prompt of {prompt} tokens alone has its first token after {first_ms:.3g} ms"
            return f"{said}, more than {max(ttft_ms):g}", first_ms
    return None


def _decode_s(times: StepTimes, decodes: int, context: float) -> float:
    return times.stage_s(StepShape(decodes, decodes, int(decodes * context), 0.0, decodes), 0)


def _read_s(times: StepTimes, tokens: int, prompts: int) -> float:
    return times.stage_s(StepShape(tokens * prompts, 0, 0, prompts * chunk_work(0, tokens), prompts), 0)


def _grid(least: int, most: int) -> list[int]:
    sizes, size = [], float(least)
    while size < most:
        sizes.append(round(size))
        size = max(size + 1, size * GRID)
    return [*sizes, most]


def _decode_qps(place: Deployment, times: StepTimes, load: Load) -> float:
    """Return the most requests per second whose answers can be written."""
    requests, count = load.requests, len(load.requests)
    outputs = sum(r.output_tokens - 1 for r in requests) / count
    if not outputs:
        return math.inf
    # By tokens written: a long answer is in as many steps, at the contexts on its way.
    written = sum((r.output_tokens - 1) * (r.prompt_tokens + r.output_tokens / 2) for r in requests)
    context = written / (outputs * count)
    held = 1.0 if load.share_prefixes else context
    at_once = max(1, min(place.max_sequences, int(place.kv_tokens / held)) // times.stages)
    slos_s = [math.inf if r.tbt_slo_ms is None else r.tbt_slo_ms / 1e3 for r in requests]
    loosest_s = max(slos_s) / times.stages
    best = 1 / _decode_s(times, 1, context)
    sizes = _grid(1, at_once)
    for size, larger in pairwise(sizes):
        seconds = _decode_s(times, size, context)
        if seconds > loosest_s:
            break
        best = max(best, larger / seconds)  # whatever lies between takes as long, and writes no more
    kept = load.attainment * SLO_PERCENTILE / 100 if math.isfinite(loosest_s) else 1.0
    return best / outputs / kept


def _read_qps(place: Deployment, times: StepTimes, load: Load) -> float:
    """Return the most requests per second whose prompts can be read."""
    if load.share_prefixes:
        return math.inf
    prompt = sum(r.prompt_tokens for r in load.requests) / len(load.requests)
    step = min(place.max_tokens, MOST_CHUNK)
    # A chunk at a prompt's start has the least attention for its size.
    token_s = min(_read_s(times, size, 1) / size for size in _grid(16, step))
    return 1 / (prompt * token_s * (1 - (GRID - 1)))
