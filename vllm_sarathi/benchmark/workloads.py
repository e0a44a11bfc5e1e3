"""The workloads of the live benchmark: how long prompts and answers are, and how they arrive.

Everything is drawn from a seed. Prompts are English prose, no two alike, cut to an exact number of tokens.
The rates suit SmolLM2-135M on two CPU cores: the stock server carries each of them, and yet long prompts
arrive while streams run.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pydoc_data.topics import topics

import numpy as np

TEXT = "\n\n".join(topics[name] for name in sorted(topics))
"""English prose that every Python carries: the language reference, about 110,000 tokens."""

QUICK_SHARE = 0.4
"""The share of each workload's requests that `--quick` sends."""


@dataclass(frozen=True)
class Kind:
    """One kind of request; lengths in tokens, both ends included, drawn evenly.

    Attributes:
        share: the share of a workload's requests that are of this kind, to the nearest whole request.
    """

    share: float
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]


@dataclass(frozen=True)
class Workload:
    """What arrives, and when.

    Attributes:
        name: as `--workload` takes it.
        summary: one line for people.
        kinds: the kinds of requests; shares sum to 1.
        requests: how many are sent.
        rate_per_s: mean arrival rate.
        burstiness: shape of the gamma-distributed times between arrivals, as `vllm bench serve --burstiness`
            takes it: 1 is a Poisson process, less comes in clusters.
    """

    name: str
    summary: str
    kinds: tuple[Kind, ...]
    requests: int
    rate_per_s: float
    burstiness: float = 1.0


@dataclass(frozen=True)
class Lengths:
    """Lengths of one request, tokens."""

    prompt_tokens: int
    output_tokens: int


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "chat",
            "steady chat, short prompts",
            (Kind(1.0, (40, 200), (40, 80)),),
            requests=60,
            rate_per_s=1.0,
        ),
        Workload("long", "long prompts", (Kind(1.0, (700, 2000), (48, 96)),), requests=14, rate_per_s=0.15),
        Workload(
            "mix",
            "85% short prompts, 15% very long ones",
            (Kind(0.85, (30, 150), (32, 64)), Kind(0.15, (2000, 3000), (32, 64))),
            requests=33,
            rate_per_s=0.35,
        ),
        Workload(
            "burst",
            "short and medium prompts, many at once",
            (Kind(1.0, (60, 300), (32, 64)),),
            requests=48,
            rate_per_s=0.8,
            burstiness=0.1,
        ),
    )
}


def quick(workload: Workload) -> Workload:
    """Return the workload with fewer requests."""
    return replace(workload, requests=round(QUICK_SHARE * workload.requests))


def draw_lengths(workload: Workload, seed: int) -> list[Lengths]:
    """Return the lengths of each request, in the order of arrival; the same for the same seed."""
    rng = np.random.default_rng(seed)
    counts = [round(kind.share * workload.requests) for kind in workload.kinds[1:]]
    counts.insert(0, workload.requests - sum(counts))
    lengths = [
        Lengths(
            int(rng.integers(*kind.prompt_tokens, endpoint=True)),
            int(rng.integers(*kind.output_tokens, endpoint=True)),
        )
        for kind, count in zip(workload.kinds, counts, strict=True)
        for _ in range(count)
    ]
    return [lengths[i] for i in rng.permutation(len(lengths))]


def write_prompts(
    counts: Sequence[int], encode: Callable[[str], Sequence[int]], text: str = TEXT
) -> list[str]:
    """Return one prompt per entry of `counts`, of exactly as many tokens, each cut from further on in `text`.

    Args:
        counts: tokens of each prompt.
        encode: the tokenizer, with the special tokens that the server adds.
        text: where the prompts are cut from.

    Raises:
        RuntimeError: the text is not long enough for them all.
    """
    prompts = []
    start = 0
    for count in counts:
        prompt, start = _cut(text, start, count, encode)
        prompts.append(prompt)
    return prompts


def _cut(text: str, start: int, count: int, encode: Callable[[str], Sequence[int]]) -> tuple[str, int]:
    """Return a prompt of exactly `count` tokens that begins at a word at or after `start`, and where it ends."""
    while (start := text.find(" ", start) + 1) > 0:
        # The tokens of a longer text grow with its length but for a merge at the very end: search, then step.
        low, high = start, min(len(text), start + 16 * count)
        while high - low > 1:
            middle = (low + high) // 2
            if len(encode(text[start:middle])) <= count:
                low = middle
            else:
                high = middle
        if len(encode(text[start:low])) == count:
            return text[start:low], low
    raise RuntimeError("the text that prompts are cut from is too short for so many tokens.")


def dataset_lines(lengths: Sequence[Lengths], encode: Callable[[str], Sequence[int]]) -> str:
    """Return the requests as the lines of a `custom` data set of `vllm bench serve`."""
    prompts = write_prompts([each.prompt_tokens for each in lengths], encode)
    return "".join(
        json.dumps({"prompt": prompt, "output_tokens": each.output_tokens}) + "\n"
        for prompt, each in zip(prompts, lengths, strict=True)
    )
