"""Workloads whose requests belong together: classes with SLOs of their own, conversations that share prefixes."""

import heapq
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_sarathi.simulation.workloads.lengths import LogNormal
from vllm_sarathi.simulation.workloads.requests import PREFIX_TOKENS, SimulatedRequest


@dataclass(frozen=True, slots=True)
class RequestClass:
    """Requests of one kind, with their SLOs.

    Attributes:
        name: what reports call it.
        share: its share of all requests.
        prompt: least and greatest prompt length, tokens; all equally likely.
        output: least and greatest answer length, tokens.
        tbt_slo_ms, ttft_slo_ms: the SLOs; None for none.
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
