"""Workloads: when requests arrive, and how long their prompts and answers are.

Every draw comes from a generator that is passed in, so that a seed gives the same workload anywhere.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_sarathi.core.config import ConfigError, check_positive, nearest_hint


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """One request of a workload.

    Attributes:
        arrival_s: when it arrives, seconds from the start.
        prompt_tokens: length of its prompt.
        output_tokens: length of its answer.
        tbt_slo_ms: its own promised time between tokens; None for none of its own.
        ttft_slo_ms: its own promised time to first token; None for none of its own.
        prefix: names of the leading pieces of its prompt, PREFIX_TOKENS long each, as a trace gives them: two
            requests whose first names agree share that part of the prompt.
        kind: the class it belongs to, for reports and for schedulers that know classes.
        tenant: whose it is.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    tbt_slo_ms: float | None = None
    ttft_slo_ms: float | None = None
    prefix: tuple[int, ...] = ()
    kind: str = ""
    tenant: str = ""


PREFIX_TOKENS = 512
"""Tokens in one piece of a shared prefix (Mooncake's trace, arXiv 2407.00079, section 4.1)."""

Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Prompt and output lengths, each of shape [requests]."""


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Lengths whose logarithm is normal, given by two of their quantiles.

    Attributes:
        median: the median, tokens.
        p90: the 90th percentile, tokens.
    """

    median: float
    p90: float

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return `count` lengths of at least 1."""
        sigma = math.log(self.p90 / self.median) / 1.2815515655446004  # the normal's 90% quantile
        lengths = np.rint(rng.lognormal(math.log(self.median), sigma, count))
        return np.asarray(np.maximum(1, lengths), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset by its published statistics.

    Attributes:
        prompt: its prompts.
        output: its answers.
        max_total_tokens: requests that are longer in all were left out of it.
    """

    prompt: LogNormal
    output: LogNormal
    max_total_tokens: int

    def draw(self, rng: np.random.Generator, count: int) -> Lengths:
        """Return the lengths of `count` requests."""
        prompts = np.empty(0, np.int64)
        outputs = np.empty(0, np.int64)
        while len(prompts) < count:
            prompt, output = self.prompt.draw(rng, 2 * count), self.output.draw(rng, 2 * count)
            kept = prompt + output <= self.max_total_tokens
            prompts, outputs = np.append(prompts, prompt[kept]), np.append(outputs, output[kept])
        return prompts[:count], outputs[:count]


CHAT = Dataset(LogNormal(3996.7, 40214.7), LogNormal(415, 834), 8192)
"""openchat_sharegpt4 (Sarathi-Serve, arXiv 2403.02310, table 2): prompts of median 1730, P90 5696, deviation 2088.

The quantiles given here are those before the longest requests are left out, so chosen that what is kept has the
published median and P90; its standard deviation then comes out at 2054, which nothing was chosen for."""

ARXIV = Dataset(LogNormal(7888.4, 18162.9), LogNormal(208, 371), 16384)
"""arxiv_summarization (the same table): median 7059, P90 12985, deviation 3638, which comes out at 3591."""


def uniform_lengths(rng: np.random.Generator, count: int) -> Lengths:
    """Return prompts of 64 to 4,096 tokens and answers of 16 to 512, all equally likely."""
    return rng.integers(64, 4097, count), rng.integers(16, 513, count)


def zipf_lengths(rng: np.random.Generator, count: int) -> Lengths:
    """Return prompts of 32 to 8,192 tokens whose frequency falls with their rank, and answers a fifth as long."""
    ranks = np.arange(1, 257)
    weights = 1.0 / ranks
    prompts = 32 * rng.choice(ranks, count, p=weights / weights.sum())
    return prompts, np.maximum(16, prompts // 5)


def mixed_lengths(rng: np.random.Generator, count: int) -> Lengths:
    """Return nine short prompts (50 to 500 tokens) to each long one (8,000 to 12,000); answers of 50 to 400."""
    long = rng.random(count) < 0.1
    prompts = np.where(long, rng.integers(8000, 12001, count), rng.integers(50, 501, count))
    return prompts, rng.integers(50, 401, count)


WORKLOADS: dict[str, Callable[[np.random.Generator, int], Lengths]] = {
    "chat": CHAT.draw,
    "arxiv": ARXIV.draw,
    "uniform": uniform_lengths,
    "zipf": zipf_lengths,
    "mix": mixed_lengths,
}
"""Lengths by name."""


@dataclass(frozen=True, slots=True)
class RequestClass:
    """Requests of one kind, with their SLOs.

    Attributes:
        name: what reports call it.
        share: its share of all requests.
        prompt: least and greatest prompt length, tokens; all equally likely.
        output: least and greatest answer length, tokens.
        tbt_slo_ms, ttft_slo_ms: what is promised; None for nothing.
    """

    name: str
    share: float
    prompt: tuple[int, int]
    output: tuple[int, int]
    tbt_slo_ms: float | None = None
    ttft_slo_ms: float | None = None


CLASSES = (
    RequestClass("interactive", 0.60, (50, 800), (50, 400), 50.0, 500.0),
    RequestClass("normal", 0.25, (500, 4000), (50, 400), 100.0, 2000.0),
    RequestClass("batch", 0.15, (4000, 15000), (50, 400)),
)
"""Three kinds in one stream: the workload `classes`."""


def arrival_times(
    kind: str, rate_qps: float, count: int, rng: np.random.Generator, burstiness: float = 4.0
) -> NDArray[np.float64]:
    """Return the arrival times of `count` requests, seconds, rising.

    Args:
        kind: `poisson`, `gamma` (bursty) or `fixed`.
        rate_qps: requests per second.
        count: how many.
        rng: the generator.
        burstiness: the squared coefficient of variation of the gaps, for `gamma`; 1 would be Poisson.

    Raises:
        ConfigError: a kind that is none of these, or a rate out of range.
    """
    check_positive("rate", rate_qps, 1e6)
    if kind == "poisson":
        gaps = rng.exponential(1 / rate_qps, count)
    elif kind == "gamma":
        gaps = rng.gamma(1 / burstiness, burstiness / rate_qps, count)
    elif kind == "fixed":
        gaps = np.full(count, 1 / rate_qps)
    else:
        raise ConfigError(
            f"--arrivals {kind!r}: unknown; {nearest_hint(kind, ('poisson', 'gamma', 'fixed'))}"
        )
    return np.asarray(np.cumsum(gaps) - gaps[0], dtype=np.float64)


def classes(times: NDArray[np.float64], rng: np.random.Generator) -> list[SimulatedRequest]:
    """Return requests of CLASSES at these times."""
    shares = [c.share for c in CLASSES]
    requests = []
    for time_s, index in zip(times, rng.choice(len(CLASSES), len(times), p=shares), strict=True):
        kind = CLASSES[index]
        requests.append(
            SimulatedRequest(
                float(time_s),
                int(rng.integers(kind.prompt[0], kind.prompt[1] + 1)),
                int(rng.integers(kind.output[0], kind.output[1] + 1)),
                kind.tbt_slo_ms,
                kind.ttft_slo_ms,
                kind=kind.name,
            )
        )
    return requests


MOST_TOKENS = 32_768
"""Tokens of a request of `mooncake` in all."""

CONTINUE_SHARE = 0.62
"""With this probability an answer is followed by another turn."""

RETURN_REQUESTS = LogNormal(40, 120)
"""How many requests of others come before the next turn of a conversation."""

FIRST_TURN, NEXT_TURN, ANSWER = LogNormal(3400, 14000), LogNormal(700, 5700), LogNormal(96, 414)
"""Tokens that a conversation begins with beside its system prompt, that a turn adds, and that are answered."""

GREETED_SHARE = 0.6
"""Conversations that begin with the block that all of them share."""

SYSTEM_PROMPT_BLOCKS = (0, 0, 12, 4, 0, 2, 8, 1)
"""Blocks that each application puts after that one; the first applications are the most frequent."""


def mooncake(times: NDArray[np.float64], rng: np.random.Generator) -> list[SimulatedRequest]:
    """Return requests at these times that share prefixes as those of Mooncake's trace do (arXiv 2407.00079, section 4).

    Published: blocks of 512 tokens named by `hash_ids`; prompts of 7,590 tokens and answers of 182 on average; about
    half of the blocks are found in a cache that never forgets (table 1); more than half of them are used once, and a
    few, like the first of a common system prompt, by a large share of all requests (figure 6). Not published, and set
    so that these come out: conversations whose every turn repeats what was said, after one of a few system prompts.
    One figure is not the trace's: a few of its prompts are longer than 100k tokens, and none here longer than 32k, so
    that models of 40k can serve it.
    """
    heads, names = [], itertools.count(1)
    for blocks in SYSTEM_PROMPT_BLOCKS:
        heads.append(list(itertools.islice(names, blocks)))
    popularity = 1 / np.arange(1, len(heads) + 1)
    popularity /= popularity.sum()

    def draw(lengths: LogNormal, most: int) -> int:
        return min(int(lengths.draw(rng, 1)[0]), most)

    returning: list[tuple[int, int, list[int], int]] = []
    requests = []
    for index, time_s in enumerate(times):
        if returning and returning[0][0] <= index:
            _, _, said, tokens = heapq.heappop(returning)
            tokens += draw(NEXT_TURN, MOST_TOKENS // 2)
        else:
            said = [0, *heads[rng.choice(len(heads), p=popularity)]] if rng.random() < GREETED_SHARE else []
            tokens = len(said) * PREFIX_TOKENS + draw(FIRST_TURN, MOST_TOKENS // 2)
        answer = draw(ANSWER, MOST_TOKENS // 8)
        tokens = min(tokens, MOST_TOKENS - answer)
        said += itertools.islice(names, max(0, tokens // PREFIX_TOKENS - len(said)))
        # The last block is not whole: nobody shares it.
        last = itertools.islice(names, 1 if tokens % PREFIX_TOKENS else 0)
        requests.append(SimulatedRequest(float(time_s), tokens, answer, prefix=(*said, *last)))
        if rng.random() < CONTINUE_SHARE and tokens + answer < MOST_TOKENS // 2:
            back = index + 1 + draw(RETURN_REQUESTS, len(times))
            heapq.heappush(returning, (back, index, said, tokens + answer))
    return requests


STREAMS: dict[str, Callable[[NDArray[np.float64], np.random.Generator], list[SimulatedRequest]]] = {
    "classes": classes,
    "mooncake": mooncake,
}
"""Requests by the times at which they come, for workloads that are more than lengths."""

WORKLOAD_NAMES = (*WORKLOADS, *STREAMS)
"""What `--workload` takes."""


def synthetic(
    workload: str, rate_qps: float, count: int, seed: int, arrivals: str = "poisson"
) -> list[SimulatedRequest]:
    """Return a workload by name, at a rate.

    Args:
        workload: one of WORKLOAD_NAMES.
        rate_qps: requests per second.
        count: how many requests.
        seed: seeds both the lengths and the arrivals; the lengths do not depend on the rate.
        arrivals: as `arrival_times` takes it.

    Raises:
        ConfigError: an unknown workload, or a value out of range.
    """
    lengths_rng, arrivals_rng = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    times = arrival_times(arrivals, rate_qps, count, arrivals_rng)
    if workload in STREAMS:
        return STREAMS[workload](times, lengths_rng)
    if workload not in WORKLOADS:
        raise ConfigError(f"--workload {workload!r}: unknown; {nearest_hint(workload, WORKLOAD_NAMES)}")
    prompts, outputs = WORKLOADS[workload](lengths_rng, count)
    return [
        SimulatedRequest(float(t), int(p), int(o)) for t, p, o in zip(times, prompts, outputs, strict=True)
    ]


def at_rate(requests: Sequence[SimulatedRequest], rate_qps: float) -> list[SimulatedRequest]:
    """Return the same requests with their arrival times stretched so that they come at a mean rate."""
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    factor = (len(requests) - 1) / rate_qps / span_s if span_s > 0 else 1.0
    start_s = requests[0].arrival_s
    return [replace(r, arrival_s=(r.arrival_s - start_s) * factor) for r in requests]


def prompt_token_ids(request: SimulatedRequest, index: int, share_prefixes: bool) -> list[Any]:
    """Return token ids for a request's prompt; equal pieces of prefix get equal tokens, all else differs."""
    if not share_prefixes:
        return [0] * request.prompt_tokens
    tokens: list[int] = []
    for piece in request.prefix:
        tokens += [2 * piece + 2] * PREFIX_TOKENS
    tokens = tokens[: request.prompt_tokens]
    return tokens + [2 * index + 1] * (request.prompt_tokens - len(tokens))
