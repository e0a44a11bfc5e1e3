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
from typing import Any, Literal

from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.engine.offline import config_folder
from vllm_sarathi.engine.scheduler import EMPTY_STEPS_BEFORE_FULL_BUDGET
from vllm_sarathi.testing.modelled import ModelledEngine, Step, config_maker
from vllm_sarathi.testing.rules import StepRules

MAX_MODEL_LEN = 256
LIMIT_TOKENS = 256
"""The engine's own limit on the tokens of a step."""
BLOCKS_FOR_ONE = MAX_MODEL_LEN // 16 + 2
BLOCKS_FOR_ALL = 400

MODES = ("sync", "async", "pipeline")

Event = tuple[Literal["add", "step", "abort"], int, int]
"""What happens: `add` a request (prompt and answer tokens), `step` a number of times, or `abort` a request."""


def check_policy(config: SarathiConfig, *, lives: int = 20, seed: int = 0) -> None:
    """Play random lives with a policy and with stock vLLM, synchronously, asynchronously and on a pipeline of two.

    Args:
        config: the settings; `SarathiConfig(scheduler="mine")` for a policy in `core/policies/mine.py`.
        lives: how many lives to play in each mode; twenty take some seconds.
        seed: of the lives.

    Raises:
        AssertionError: the policy breaks a rule; the message says which, and the life that shows it.
        ImportError: vLLM is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        make_config = config_maker(config_folder(Path(folder)))
        for mode in MODES:
            rng = random.Random(f"{seed} {mode}")
            for _ in range(lives):
                events = random_life(rng)
                blocks = rng.choice((rng.randint(BLOCKS_FOR_ONE, 30), BLOCKS_FOR_ALL))
                try:
                    compare_with_stock(make_config, config, mode, events, blocks)
                except AssertionError as error:
                    raise AssertionError(f"{error} (mode {mode!r}, {blocks} KV blocks, {events})") from error


def random_life(rng: random.Random) -> list[Event]:
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
    in_flight = 1 if mode == "sync" else 2
    ours = Play(make_config(config, mode), blocks, in_flight, config.token_budget or LIMIT_TOKENS)
    ours.run(events)
    stock = Play(make_config(None, mode), blocks, in_flight, LIMIT_TOKENS)
    stock.run(events)
    for name in ours.lengths.keys() - ours.aborted - stock.aborted:
        answer = ours.engine.outputs[name]
        assert answer == stock.engine.outputs[name], f"the answer of {name} is not stock's"
        assert len(answer) == ours.lengths[name], f"the answer of {name} has {len(answer)} tokens"


class Play:
    """Plays events on an engine, and checks each step.

    Args:
        config: a VllmConfig.
        blocks: KV-cache blocks.
        in_flight: batches in flight.
        budget_tokens: the most tokens of a step.

    Attributes:
        engine: the engine.
        lengths: of each request, the tokens of its answer.
        aborted: the requests that were aborted.
        steps: all steps so far.
    """

    def __init__(self, config: Any, blocks: int, in_flight: int, budget_tokens: int) -> None:
        self.engine = ModelledEngine(config, num_blocks=blocks, in_flight=in_flight)
        self.lengths: dict[str, int] = {}
        self.aborted: set[str] = set()
        self.steps: list[Step] = []
        self._idle_steps = 0
        self._now_s = 0.0
        scheduler = self.engine.scheduler
        self._rules = StepRules(scheduler, budget_tokens)
        if hasattr(scheduler, "wall_clock"):
            scheduler.clock = scheduler.wall_clock = lambda: self._now_s

    def run(self, events: Sequence[Event]) -> None:
        """Play all events, then on until nobody is left."""
        for kind, a, b in events:
            if kind == "add":
                self.add(f"r{len(self.lengths)}", a, min(b, MAX_MODEL_LEN - a))
            elif kind == "step":
                for _ in range(a):
                    self.step()
            elif self.lengths:
                name = f"r{a % len(self.lengths)}"
                if name not in self.engine.finished:
                    self.engine.abort(name)
                    self.aborted.add(name)
        self.finish()

    def add(self, name: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Queue a request."""
        self.lengths[name] = answer_tokens
        self.engine.add(name, prompt_tokens, answer_tokens, arrival_s=self._now_s)

    def step(self) -> None:
        """Take a step, and check it."""
        busy = bool(self.engine.queue)
        step = self.engine.step()
        self._now_s += 0.001 * (1 + sum(step.scheduled.values()))
        self.steps.append(step)
        self._rules.check_step(step)
        waits = self.engine.scheduler.has_unfinished_requests() and not busy
        self._idle_steps = self._idle_steps + 1 if waits and not step.scheduled else 0
        assert self._idle_steps < EMPTY_STEPS_BEFORE_FULL_BUDGET, "no progress while requests wait"

    def finish(self) -> None:
        """Step until nobody is left, and check the end."""
        for _ in range(20_000):
            if self.engine.idle():
                break
            self.step()
        engine = self.engine
        missing = set(self.lengths) - set(engine.finished) - self.aborted
        assert not missing, f"never finished: {', '.join(sorted(missing))}"
        self._rules.check_end()
