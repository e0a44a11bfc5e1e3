"""The constants of `simulation.devices.corrections`, fitted: `python -m vllm_sarathi.benchmark.profile.silicon_fit`.

Rows whose id ends in an even number, and that are not left out, are fitted in closed form. In a closed loop of c
clients with prompts of p tokens and answers of o, an answer's o steps have the prompts of c - 1 others among them, so

    time per token = decode step + c / o x (step with a prompt - decode step)

which is a sum of the constants times what each stands for. The fit is of the relative error, by least squares with
no constant below zero; residuals above HUBER_SHARE count by their size alone. Each constant is held near what it would
be without any row: 1 for a scale and 0 for what a step launches.
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_sarathi.benchmark.profile.silicon import place_of
from vllm_sarathi.benchmark.profile.silicon_sample import (
    LENGTH_SHARE,
    SiliconRow,
    left_out,
    queued,
    read_sample,
)
from vllm_sarathi.core.config import ConfigError
from vllm_sarathi.core.steptime.nonnegative import nonnegative_least_squares
from vllm_sarathi.core.types import chunk_work
from vllm_sarathi.simulation.devices.graphs import padded
from vllm_sarathi.simulation.devices.measured import Kernels
from vllm_sarathi.simulation.placement import MeasuredDeployment

HUBER_SHARE = 0.06
ROUNDS = 20
RIDGE = 0.01
"""How much being off by a whole TRUST counts, in rows' relative errors."""

TRUST = {"scale": 0.15, "latent": 1.0, "layer": 20.0, "step": 500.0, "host": 8000.0}
"""How far off a constant may be without it: of a scale, and in microseconds of what is launched."""


def features(row: SiliconRow, kernels: Kernels, step_tokens: int) -> dict[str, float]:
    """Return what each constant is multiplied with in a row's time per token: milliseconds for one of it."""
    share = (1 + LENGTH_SHARE) / 2 if row.ranged else 1.0
    clients, prompt, answer = row.concurrency, row.prompt_tokens * share, row.output_tokens * share
    context = round(prompt + answer / 2)
    attend_s = kernels.attend_s(clients, context)
    decode = {**kernels.decode_parts_s(padded(clients, kernels.sizes)), "attention": attend_s}
    chunks = -(-round(prompt) // step_tokens)
    one = padded(round(prompt / chunks) + clients, kernels.sizes)
    mixed = {name: chunks * seconds for name, seconds in kernels.shared_parts_s(one).items()}
    mixed["attention"] = chunks * attend_s
    mixed["chunk_attention"] = kernels.attend_chunks_s(1, round(prompt), chunk_work(0, round(prompt)))
    keys = kernels.place.scale_keys()
    made = dict.fromkeys(keys.values(), 0.0)
    for name, seconds in mixed.items():
        plain = decode.get(name, 0.0)
        made[keys[name]] += 1e3 * (plain + clients / answer * (seconds - chunks * plain))
    made |= {key: count / 1e3 for key, count in kernels.place.launches().items()}
    if not row.asynchronous:
        made |= {"host_us": 1e-3, "host_sequence_us": clients / 1e3}
    return made


def prior_of(key: str) -> tuple[float, float]:
    """Return what a constant would be without any row, and how far off it may be."""
    if not key.endswith("_us"):
        return 1.0, TRUST["latent" if key.startswith("latent") else "scale"]
    kind = next(kind for kind in ("host", "layer", "norm", "step") if kind in key)
    return 0.0, TRUST["layer" if kind == "norm" else kind]


def solve(table: Sequence[Mapping[str, float]], measured: NDArray[np.float64]) -> dict[str, float]:
    """Return the constants that make the rows of a table come to what was measured.

    Args:
        table: for each row, what each constant is multiplied with.
        measured: shape [rows], milliseconds.
    """
    keys = sorted({key for row in table for key in row})
    x = np.array([[row.get(key, 0.0) for key in keys] for row in table]) / measured[:, None]
    priors, trusts = (np.array(values) for values in zip(*map(prior_of, keys), strict=True))
    hold = np.diag(len(table) * RIDGE**2 / trusts**2)
    weights, found = np.ones(len(table)), priors
    for _ in range(ROUNDS):
        weighted = weights[:, None] * x
        a = x.T @ weighted + hold
        b = weighted.sum(axis=0) + hold @ priors
        scale = 1 / np.sqrt(np.diag(a))
        found = scale * nonnegative_least_squares(a * scale * scale[:, None], b * scale, found > 0)
        weights = np.minimum(1.0, HUBER_SHARE / np.maximum(np.abs(x @ found - 1), 1e-9))
    return {key: float(f"{value:.4g}") for key, value in zip(keys, found, strict=True)}


def fit(rows: Sequence[SiliconRow]) -> dict[str, float]:
    """Return the constants, from those of the rows that may be fitted on."""
    without = left_out(rows)
    table, measured = [], []
    for row in rows:
        if row.judging or row.name in without:
            continue
        try:
            place = place_of(row.place)
        except ConfigError:
            continue
        if isinstance(place, MeasuredDeployment) and queued(row, place.prefill_s(row.prompt_tokens)) is None:
            kernels = place.kernels.under(row.release)
            table.append(features(row, kernels, place.step_tokens))
            measured.append(row.tpot_ms)
    return solve(table, np.array(measured))


if __name__ == "__main__":
    print(json.dumps(fit(read_sample()), indent=4))
