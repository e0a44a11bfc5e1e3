"""Plays events on a modelled engine under a virtual clock, and checks each step.

The conformance kit, the property tests and the fuzz are subclasses: each says what may happen, and what it checks
beside the rules of `rules`.
"""

from collections.abc import Iterable
from typing import Any

from vllm_sarathi.engine.scheduler import EMPTY_STEPS_BEFORE_FULL_BUDGET
from vllm_sarathi.testing.modelled import ModelledEngine, Step
from vllm_sarathi.testing.rules import StepRules

STEP_S = 0.001
"""What a step takes, and each token in it."""

ARRIVAL_S = 1e-6
"""Requests that come between two steps come so far apart."""

MOST_STEPS_TO_END = 20_000

Event = tuple[str, int, int] | tuple[str, int, int, int]
"""What happens: `add` a request (prompt and answer tokens, perhaps a priority), `step` a number of times, or `abort` a
request."""


class Play:
    """Plays events on an engine, then on until everybody has finished.

    Args:
        engine: the engine, before anybody has come.
        most_tokens: the most tokens of a step.

    Attributes:
        engine: the engine.
        scheduler: its scheduler.
        steps: steps that were taken.
        now_s: the virtual clock, seconds.
    """

    most_empty_steps = EMPTY_STEPS_BEFORE_FULL_BUDGET - 1
    """Steps in a row that may serve nobody although somebody could be served."""

    def __init__(self, engine: ModelledEngine, most_tokens: int) -> None:
        self.engine = engine
        self.scheduler = engine.scheduler
        self.steps = 0
        self.now_s = 0.0
        self.rules = StepRules(self.scheduler, most_tokens)
        self._empty_steps = 0
        if hasattr(self.scheduler, "wall_clock"):
            self.scheduler.clock = self.scheduler.wall_clock = lambda: self.now_s

    def play(self, events: Iterable[Any]) -> None:
        """Play all events, then on until everybody has finished.

        Raises:
            AssertionError: a rule is broken; the message says which.
        """
        for event in events:
            self.happen(event)
        self.finish()

    def happen(self, event: Any) -> None:
        """Let an event happen."""
        raise NotImplementedError

    def step(self) -> None:
        """Take a step, and check it."""
        busy = bool(self.engine.queue)
        step = self.engine.step()
        self.steps += 1
        self.now_s += self.seconds_of(step)
        self.rules.check_step(step)
        self.check(step)
        empty = not busy and not step.scheduled and self.could_serve(step)
        self._empty_steps = self._empty_steps + 1 if empty else 0
        assert self._empty_steps <= self.most_empty_steps, "no progress while requests wait"

    def seconds_of(self, step: Step) -> float:
        """Return what a step takes, seconds."""
        return STEP_S * (1 + sum(step.scheduled.values()))

    def check(self, step: Step) -> None:
        """Check what else must hold of a step."""

    def could_serve(self, step: Step) -> bool:
        """Return whether a step that served nobody could have served somebody."""
        return bool(self.scheduler.has_unfinished_requests())

    def finish(self) -> None:
        """Step until everybody has finished, and check the end."""
        for _ in range(self.most_steps_to_end()):
            if self.engine.idle():
                break
            self.step()
        self.rules.check_end()

    def most_steps_to_end(self) -> int:
        """Return the steps after which everybody must have finished."""
        return MOST_STEPS_TO_END


class RequestPlay(Play):
    """Plays requests that come, steps, and clients that leave.

    Attributes:
        lengths: of each request, the tokens of its answer.
        aborted: the requests that were aborted.
    """

    def __init__(self, engine: ModelledEngine, most_tokens: int) -> None:
        super().__init__(engine, most_tokens)
        self.lengths: dict[str, int] = {}
        self.aborted: set[str] = set()

    def happen(self, event: Event) -> None:
        """Let an event happen."""
        kind, a, b, *priority = event
        if kind == "add":
            answer_tokens = min(b, self.scheduler.max_model_len - a)
            self.add(f"r{len(self.lengths)}", a, answer_tokens, *priority)
        elif kind == "step":
            for _ in range(a):
                self.step()
        elif (name := self.name_of(a)) and name not in self.engine.finished:
            self.engine.abort(name)
            self.aborted.add(name)

    def name_of(self, number: int) -> str | None:
        """Return one of the requests so far; None before the first."""
        return f"r{number % len(self.lengths)}" if self.lengths else None

    def add(self, name: str, prompt_tokens: int, answer_tokens: int, priority: int = 0) -> None:
        """Queue a request."""
        self.now_s += ARRIVAL_S
        self.lengths[name] = answer_tokens
        self.engine.add(name, prompt_tokens, answer_tokens, arrival_s=self.now_s, priority=priority)

    def finish(self) -> None:
        """Step until everybody has finished, and check the end."""
        super().finish()
        missing = self.lengths.keys() - self.engine.finished.keys() - self.aborted
        assert not missing, f"never finished: {', '.join(sorted(missing))}"
