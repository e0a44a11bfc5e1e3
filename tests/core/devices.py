"""Synthetic devices whose truth is known, and a loop that lets a controller run on one in virtual time."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_sarathi.core.controller import StepController
from vllm_sarathi.core.types import RequestView, StepRecord, StepShape, StepView, chunk_work

Device = Callable[[StepShape], float]


def roofline(speed: float = 1.0) -> Device:
    """Return a device: weights read in 20 ms, 0.4 ms a token above 50, KV reads, attention, 3 ms of overhead."""

    def seconds(shape: StepShape) -> float:
        linear_s = max(0.02, 0.0004 * shape.tokens)
        kv_s = 1e-6 * shape.decode_context_tokens
        attention_s = 3e-8 * shape.prefill_work
        return (0.003 + linear_s + kv_s + attention_s + 0.0002 * shape.sequences) / speed

    return seconds


@dataclass
class Loop:
    """Decodes that never end, beside prompts that follow each other; the state is plain numbers.

    Attributes:
        decodes: how many decode, each with `context` tokens.
        prompt_tokens: length of each prompt.
        noise: relative standard deviation of the measured times.
        outliers: share of steps that take twenty times as long.
    """

    controller: StepController
    device: Device
    decodes: int = 8
    context: int = 500
    prompt_tokens: int = 4000
    max_tokens: int = 4096
    noise: float = 0.0
    outliers: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    now_s: float = 0.0
    done: int = 0
    budgets: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def view(self) -> StepView:
        prompt = RequestView("p", (0, 0.0), 0.0, self.done, self.prompt_tokens - self.done)
        return StepView(
            now_s=self.now_s,
            decodes=self.decodes,
            decode_tokens=self.decodes,
            decode_context_tokens=self.decodes * self.context,
            prefills=(prompt,),
            waiting=(),
            max_tokens=self.max_tokens,
        )

    def shape(self, budget: int) -> StepShape:
        chunk = max(0, min(budget - self.decodes, self.prompt_tokens - self.done))
        return StepShape(
            tokens=self.decodes + chunk,
            decodes=self.decodes,
            decode_context_tokens=self.decodes * self.context,
            prefill_work=chunk_work(self.done, chunk),
            sequences=self.decodes + (chunk > 0),
        )

    def step(self) -> None:
        plan = self.controller.plan(self.view())
        shape = self.shape(plan.token_budget)
        seconds = self.device(shape) * max(0.1, 1 + self.noise * self.rng.gauss(0, 1))
        if self.rng.random() < self.outliers:
            seconds *= 20
        self.now_s += seconds
        predicted = self.controller.predict(shape)
        self.controller.observe(
            StepRecord(shape, plan.token_budget, plan.reason, predicted, seconds, self.now_s)
        )
        self.done = (self.done + shape.tokens - self.decodes) % self.prompt_tokens
        self.budgets.append(plan.token_budget)
        self.times_s.append(seconds)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def best_budget(self, limit_s: float) -> int:
        """Return the largest budget whose step truly takes at most `limit_s`, at the current prefix."""
        low, high = self.decodes, self.max_tokens
        while high - low > 1:
            middle = (low + high) // 2
            chunk = middle - self.decodes
            shape = StepShape(
                middle,
                self.decodes,
                self.decodes * self.context,
                chunk_work(self.done, chunk),
                self.decodes + 1,
            )
            low, high = (middle, high) if self.device(shape) <= limit_s else (low, middle)
        return low
