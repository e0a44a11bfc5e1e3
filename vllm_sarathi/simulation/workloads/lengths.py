"""How long prompts and answers are: datasets by their published statistics, and synthetic distributions.

Every draw comes from a generator that is passed in, so that a seed gives the same lengths anywhere.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


def bimodal_lengths(rng: np.random.Generator, count: int) -> Lengths:
    """Return nine short prompts (50 to 500 tokens) to each long one (8,000 to 12,000); answers of 50 to 400."""
    long = rng.random(count) < 0.1
    prompts = np.where(long, rng.integers(8000, 12001, count), rng.integers(50, 501, count))
    return prompts, rng.integers(50, 401, count)
