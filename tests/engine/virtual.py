"""vLLM's real scheduler, stock or ours, under a virtual clock: each step takes the seconds that a device says.

Two schedulers that see the same arrivals can be compared by what their clients feel: TTFT and the gaps between tokens.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from vllm_sarathi.testing.modelled import VOCABULARY, ModelledEngine, Step

IDLE_S = 0.001
"""The clock goes on so far in a step that takes nothing."""


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
        tokens: all of them.
        decodes: requests that decode.
        context_tokens: what the decodes attend to.
        token_pairs: for each chunk of k tokens after `done` ones, k x (done + k / 2).
        prefill_tokens: those that belong to prompts.
    """

    tokens: int
    decodes: int
    context_tokens: int
    token_pairs: float
    prefill_tokens: int


Device = Callable[[Work], float]
"""Seconds that a step takes."""


@dataclass(frozen=True)
class LinearDevice:
    """Seconds of a step, by part."""

    step_s: float = 0.020
    token_s: float = 0.0004
    decode_s: float = 0.0005
    context_token_s: float = 1e-7
    token_pair_s: float = 1e-9

    def __call__(self, work: Work) -> float:
        return (
            self.step_s
            + self.token_s * work.tokens
            + self.decode_s * work.decodes
            + self.context_token_s * work.context_tokens
            + self.token_pair_s * work.token_pairs
        )


@dataclass(frozen=True)
class TimedStep:
    """A step that has run."""

    started_s: float
    seconds: float
    scheduled: dict[str, int]
    work: Work


class VirtualEngine(ModelledEngine):
    """A scheduler, driven one batch at a time on a device.

    Args:
        config: a VllmConfig.
        device: gives the seconds of each step.
        num_blocks: KV-cache blocks.
        kv_groups: the KV-cache groups where it is not one of full attention.
    """

    def __init__(
        self,
        config: Any,
        device: Device | None = None,
        num_blocks: int = 4000,
        kv_groups: list[KVCacheGroupSpec] | None = None,
    ) -> None:
        groups = None if kv_groups is None else KVCacheConfig(num_blocks, [], kv_groups)
        super().__init__(config, num_blocks, kv_cache_config=groups)
        self.device = device or LinearDevice()
        self.now_s = 1000.0
        if hasattr(self.scheduler, "wall_clock"):
            self.scheduler.clock = self.scheduler.wall_clock = lambda: self.now_s
        self.arrived_s: dict[str, float] = {}
        self.token_s: dict[str, list[float]] = defaultdict(list)
        self.finished_s: dict[str, float] = {}
        self.first_scheduled_s: dict[str, float] = {}
        self.steps: list[TimedStep] = []
        self.keep_steps = True

    def add(self, name: str, prompt: int | list[int], max_tokens: int = 8, **fields: Any) -> Any:
        """Queue a request; `prompt` is its tokens or how many."""
        tokens = prompt if isinstance(prompt, list) else random_tokens(name, prompt)
        fields.setdefault("arrival_s", self.now_s)
        self.arrived_s[name] = self.now_s
        return super().add(name, tokens, max_tokens, **fields)

    def _execute(self, step: Step) -> Any:
        """Let the time of a step pass, and return its tokens."""
        scheduled = dict(step.scheduled)
        work = self._work(step)
        seconds = self.device(work) if scheduled else IDLE_S
        for name in scheduled:
            self.first_scheduled_s.setdefault(name, self.now_s)
        if self.keep_steps:
            self.steps.append(TimedStep(self.now_s, seconds, scheduled, work))
        self.now_s += seconds
        return super()._execute(step)

    def _deliver(self, output: Any) -> None:
        super()._deliver(output)
        self.token_s[output.request_id] += [self.now_s] * len(output.new_token_ids)
        if output.finish_reason is not None:
            self.finished_s[output.request_id] = self.now_s

    def run(self, steps: int) -> None:
        """Take a number of steps."""
        for _ in range(steps):
            self.step()

    def run_until(self, done: Callable[[], Any], most_s: float = 1000.0, most_steps: int = 200_000) -> bool:
        """Step until `done` says so; return False if it has not within those seconds or steps."""
        end_s = self.now_s + most_s
        for _ in range(most_steps):
            if done():
                return True
            if self.now_s > end_s:
                return False
            self.step()
        return bool(done())

    def run_to(self, at_s: float) -> None:
        """Step until it is so late."""
        self.run_until(lambda: self.now_s >= at_s)

    def run_until_answered(self, *names: str, most_s: float = 1000.0) -> None:
        """Step until each of the requests has its first token, or for those seconds."""
        self.run_until(lambda: all(self.token_s[name] for name in names), most_s)

    def ttft_s(self, name: str) -> float:
        """Return a request's time to first token; without one yet, how long it has waited."""
        tokens = self.token_s[name]
        return (tokens[0] if tokens else self.now_s) - self.arrived_s[name]

    def gaps_s(self, since_s: float, prefix: str = "") -> list[float]:
        """Return the gaps that ended after `since_s`, of the requests whose names start with `prefix`."""
        return [
            end - start
            for name, times in self.token_s.items()
            if name.startswith(prefix)
            for start, end in itertools.pairwise(times)
            if end > since_s
        ]

    def _work(self, step: Step) -> Work:
        decodes = context = prefill = 0
        pairs = 0.0
        for name, tokens in step.scheduled.items():
            request = self.scheduler.requests[name]
            done = request.num_computed_tokens - tokens
            if tokens == 1 and done >= request.num_prompt_tokens:
                decodes += 1
                context += done
            else:
                prefill += tokens
                pairs += tokens * (done + tokens / 2)
        return Work(sum(step.scheduled.values()), decodes, context, pairs, prefill)


def random_tokens(name: str, count: int) -> list[int]:
    """Return tokens that follow from a name."""
    rng = random.Random(name)
    return [rng.randrange(2, VOCABULARY) for _ in range(count)]


def share_kept(gaps_s: list[float], slo_s: float) -> float:
    """Return the share of gaps that keep an SLO."""
    return sum(gap <= slo_s for gap in gaps_s) / len(gaps_s)
