"""The real vLLM engine on the CPU, with a tiny model of saved weights, in pairs: stock's scheduler and ours.

A scene is a function that adds requests to an engine and steps it. `Pair.compare` plays it on both engines,
lets both finish, checks what holds for every scene, and hands back the two runs.
"""

import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import RequestOutputKind

from vllm_sarathi import SarathiConfig, SarathiScheduler
from vllm_sarathi.benchmark.live.reference_model import TINY_VOCABULARY
from vllm_sarathi.engine.control import AT_START_ONLY

BUDGET = 32
LONG = 3 * BUDGET + 7
"""A prompt of this length takes four steps of ours."""
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 16,
    "num_gpu_blocks_override": 128,
    "block_size": 32,
    "seed": 0,
    # Without it a random model fills a JSON object with blanks.
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


def prompt(number: int, length: int) -> list[int]:
    """Return random tokens; the same for the same number and length."""
    return random.Random(f"{number}/{length}").choices(range(2, TINY_VOCABULARY), k=length)


@dataclass(frozen=True)
class Step:
    """What one call of `schedule` saw and did, by the names of the requests."""

    decodes_before: frozenset[str]
    scheduled: dict[str, int]
    drafts: dict[str, int]
    partial: frozenset[str]
    preempted: frozenset[str]


@dataclass(frozen=True)
class Delta:
    """New tokens of a sample, and how many steps had been scheduled when the engine handed them out."""

    name: str
    sample: int
    tokens: list[int]
    step: int


@dataclass
class Run:
    """What a scene gave.

    Attributes:
        steps: the steps in order.
        deltas: what the engine handed out, in order.
        texts: the text of each (name, sample); right where the prompt ends in whole characters.
        finished: the names in the order in which they finished.
        cached_tokens: for each name, the prompt tokens that came out of the prefix cache.
    """

    steps: list[Step] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    texts: dict[tuple[str, int], str] = field(default_factory=lambda: defaultdict(str))
    finished: list[str] = field(default_factory=list)
    cached_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> dict[tuple[str, int], list[int]]:
        """The tokens of each (name, sample)."""
        tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        for delta in self.deltas:
            tokens[delta.name, delta.sample] += delta.tokens
        return dict(tokens)

    def of(self, name: str) -> list[int]:
        """Return the tokens of a request's first sample."""
        return self.tokens[name, 0]

    @property
    def first_tokens(self) -> list[str]:
        """The names in the order of their first tokens."""
        return list(dict.fromkeys(delta.name for delta in self.deltas))

    @property
    def distinct(self) -> int:
        """How many different answers there are: where it is 1, equal answers prove nothing."""
        return len({tuple(tokens) for tokens in self.tokens.values()})

    @property
    def preempted(self) -> set[str]:
        """The names of requests that lost their place in the KV cache."""
        return {name for step in self.steps for name in step.preempted}

    def chunks(self, name: str) -> int:
        """Return in how many steps a request's prompt was read, its last piece included."""
        return 1 + sum(name in step.partial for step in self.steps)


class RealEngine:
    """A vLLM engine in this process, driven step by step.

    Args:
        llm: the engine; its scheduler's steps are recorded from now on.
        budget: what no step may exceed; None where stock's scheduler sets the limit.
    """

    def __init__(self, llm: LLM, budget: int | None) -> None:
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.budget = budget
        self.run = Run()
        self._limit = self.scheduler.max_num_scheduled_tokens
        self._schedule = self.scheduler.schedule
        self.scheduler.schedule = self._recorded

    def add(self, name: str, tokens: list[int] | str, max_tokens: int = 12, **options: Any) -> None:
        """Queue a request; greedy and without an end unless `options` say otherwise."""
        request = {
            key: options.pop(key) for key in ("lora_request", "priority", "arrival_time") if key in options
        }
        params = {"temperature": 0.0, "ignore_eos": True, **options}
        text_or_tokens: Any = tokens if isinstance(tokens, str) else {"prompt_token_ids": tokens}
        self.engine.add_request(
            name,
            text_or_tokens,
            SamplingParams(max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA, **params),
            **request,
        )

    def abort(self, name: str) -> None:
        """Abort a request, as a client that hangs up does."""
        self.engine.abort_request([name])

    def step(self, times: int = 1) -> None:
        """Take a number of steps and keep what comes out."""
        for _ in range(times):
            for output in self.engine.step():
                if output.num_cached_tokens is not None:
                    self.run.cached_tokens.setdefault(output.request_id, output.num_cached_tokens)
                for sample in output.outputs:
                    key = (output.request_id, sample.index)
                    self.run.texts[key] += sample.text
                    if sample.token_ids:
                        self.run.deltas.append(Delta(*key, list(sample.token_ids), len(self.run.steps)))
                if output.finished:
                    self.run.finished.append(output.request_id)

    def drain(self) -> None:
        """Step until nothing is left, batches in flight included."""
        for _ in range(5_000):
            if not (self.engine.has_unfinished_requests() or self.scheduler.has_requests()):
                return
            self.step()
        raise AssertionError("not finished after 5,000 steps")

    @property
    def free_blocks(self) -> int:
        """KV-cache blocks that no request holds."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def play(self, scene: Callable[["RealEngine"], None]) -> Run:
        """Play a scene to its end, from an empty prefix cache, and check what holds for every scene."""
        assert self.engine.reset_prefix_cache()
        free = self.free_blocks
        self.run = Run()
        try:
            scene(self)
        finally:
            self.drain()
        assert self.free_blocks == free, "KV blocks are still held"
        assert not self.scheduler.requests
        if self.budget is not None:
            self._check(self.budget)
        return self.run

    def change(self, config: SarathiConfig) -> None:
        """Go by other settings, as a server does that is told so while it serves."""
        settings = {key: value for key, value in config.to_mapping().items() if key not in AT_START_ONLY}
        answer = json.loads(
            self.scheduler.control.answer(json.dumps({"command": "change", "settings": settings}))
        )
        assert answer["status"] == 200, answer
        assert self.scheduler.config.to_mapping() | settings == self.scheduler.config.to_mapping()
        self.budget = config.token_budget or SETTINGS["max_num_batched_tokens"]

    def close(self) -> None:
        """Free the engine's memory and end its workers, if it has any."""
        self.engine.engine_core.shutdown()

    def _check(self, budget: int) -> None:
        assert isinstance(self.scheduler, SarathiScheduler)
        assert self.scheduler.faults.total == 0
        assert self.scheduler.max_num_scheduled_tokens == self._limit, (
            "the engine's own limit was not restored"
        )
        for step in self.run.steps:
            assert sum(step.scheduled.values()) <= budget, f"over budget: {step}"

    def _recorded(self, *args: Any, **kwargs: Any) -> Any:
        scheduler = self.scheduler
        decodes = frozenset(_name(r.request_id) for r in scheduler.running if not r.is_prefill_chunk)
        output = self._schedule(*args, **kwargs)
        self.run.steps.append(
            Step(
                decodes_before=decodes,
                scheduled={_name(i): n for i, n in output.num_scheduled_tokens.items()},
                drafts={_name(i): len(d) for i, d in output.scheduled_spec_decode_tokens.items()},
                partial=frozenset(
                    _name(i) for i in output.num_scheduled_tokens if scheduler.requests[i].is_prefill_chunk
                ),
                preempted=frozenset(map(_name, output.preempted_req_ids or ())),
            )
        )
        return output


def _name(internal_id: str) -> str:
    """Return the caller's name for a request: vLLM adds a dash and random characters."""
    return internal_id.rpartition("-")[0]


@dataclass
class Pair:
    """The same engine twice: `stock` with vLLM's own scheduler, `ours` with SarathiScheduler."""

    stock: RealEngine
    ours: RealEngine

    def compare(self, scene: Callable[[RealEngine], None], aborted: str = "") -> tuple[Run, Run]:
        """Play a scene on both, check that they answer the same, and return both runs, stock's first.

        `aborted` names a request that the scene aborts: how far it had come is the scheduler's business.
        """
        stock, ours = self.stock.play(scene), self.ours.play(scene)
        expected, got = ({k: v for k, v in run.tokens.items() if k[0] != aborted} for run in (stock, ours))
        assert expected, "the scene gave no tokens"
        assert got == expected
        assert sorted(ours.finished) == sorted(stock.finished)
        return stock, ours


@contextmanager
def buildable_after_numba() -> Iterator[None]:
    """Let an engine be built in a process where another one has used ngram drafts, and with them numba.

    vLLM looks through the attributes of every loaded module when it binds its CPU kernels, and stumbles over
    llvmlite's library handle, which claims to have every attribute.
    """
    bind = CpuPlatform.register_triton_kernel_overrides

    def bind_unseen(_platform: type) -> None:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite")}
        try:
            bind()
        finally:
            sys.modules.update(hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "register_triton_kernel_overrides", classmethod(bind_unseen))
        yield


@contextmanager
def open_engine(
    model: Path, budget: int | None = None, config: SarathiConfig | None = None, **settings: Any
) -> Iterator[RealEngine]:
    """Yield an engine: ours with this token budget, with `config` where it is given, or stock's without a budget."""
    ours = (config or SarathiConfig(token_budget=budget)).engine_args() if budget is not None else {}
    with buildable_after_numba():
        engine = RealEngine(LLM(str(model), **{**SETTINGS, **ours, **settings}), budget)
    try:
        assert isinstance(engine.scheduler, SarathiScheduler) == (budget is not None)
        yield engine
    finally:
        engine.close()


@contextmanager
def open_pair(model: Path, budget: int = BUDGET, **settings: Any) -> Iterator[Pair]:
    """Yield both engines with the same settings."""
    with open_engine(model, **settings) as stock, open_engine(model, budget, **settings) as ours:
        yield Pair(stock, ours)
