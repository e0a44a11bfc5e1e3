"""The conformance kit: whatever a policy prefers, it moves, it keeps to memory and budget, and everybody finishes.

Real requests, vLLM's scheduler and KV-cache manager, a modelled executor: no weights, no device. A policy passes if

- each step keeps the rules of `rules`: within the budget, no request lost or in two places, vLLM's limits put back;
- something moves as long as somebody waits, and in the end everybody has finished and all KV blocks are free;
- each answer is that of stock vLLM, token for token;
- no error of the policy's own has come up, which at run time would cost a step of stock scheduling.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.engine.offline import config_folder
from vllm_sarathi.testing.modelled import ModelledEngine, config_maker
from vllm_sarathi.testing.play import Event, RequestPlay

MAX_MODEL_LEN = 256
LIMIT_TOKENS = 256
"""The engine's own limit on the tokens of a step."""
BLOCKS_FOR_ONE = MAX_MODEL_LEN // 16 + 2
BLOCKS_FOR_ALL = 400

MODES = ("sync", "async", "pipeline")


def check_policy(config: SarathiConfig, *, runs: int = 20, seed: int = 0) -> None:
    """Run random request sequences under a policy and under vLLM's scheduler.

    Each is run synchronously, asynchronously and on a pipeline of two stages.

    Args:
        config: the settings; `SarathiConfig(scheduler="mine")` for a policy in `core/policies/mine.py`.
        runs: sequences for each of the three; twenty take some seconds.
        seed: seed of the sequences.

    Raises:
        AssertionError: the policy breaks a rule; the message says which, and the sequence that shows it.
        ImportError: vLLM is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        make_config = config_maker(config_folder(Path(folder)))
        for mode in MODES:
            rng = random.Random(f"{seed} {mode}")
            for _ in range(runs):
                events = random_events(rng)
                blocks = rng.choice((rng.randint(BLOCKS_FOR_ONE, 30), BLOCKS_FOR_ALL))
                try:
                    compare_with_stock(make_config, config, mode, events, blocks)
                except AssertionError as error:
                    raise AssertionError(f"{error} (mode {mode!r}, {blocks} KV blocks, {events})") from error


def random_events(rng: random.Random) -> list[Event]:
    """Return events at random: short and long prompts, steps, aborts."""
    events: list[Event] = []
    for _ in range(rng.randint(6, 30)):
        kind = rng.choice(("add", "add", "step", "abort"))
        if kind == "add":
            events.append(("add", rng.randint(1, rng.choice((20, MAX_MODEL_LEN - 1))), rng.randint(1, 24)))
        elif kind == "step":
            events.append(("step", rng.randint(1, 12), 0))
        else:
            events.append(("abort", rng.randint(0, 30), 0))
    return events


def compare_with_stock(
    make_config: Callable[..., Any], config: SarathiConfig, mode: str, events: Sequence[Event], blocks: int
) -> None:
    """Play events with a policy and with stock vLLM.

    Args:
        make_config: as `config_maker` returns it.
        config: the settings.
        mode: one of MODES.
        events: what happens.
        blocks: KV-cache blocks; few of them mean preemptions.

    Raises:
        AssertionError: a rule is broken, or an answer is not stock's.
    """
    ours, stock = (
        RequestPlay(
            ModelledEngine(make_config(each, mode), num_blocks=blocks, in_flight=1 if mode == "sync" else 2),
            (each and each.token_budget) or LIMIT_TOKENS,
        )
        for each in (config, None)
    )
    ours.play(events)
    stock.play(events)
    for name in ours.lengths.keys() - ours.aborted - stock.aborted:
        answer = ours.engine.outputs[name]
        assert answer == stock.engine.outputs[name], f"the answer of {name} is not stock's"
        assert len(answer) == ours.lengths[name], f"the answer of {name} has {len(answer)} tokens"
