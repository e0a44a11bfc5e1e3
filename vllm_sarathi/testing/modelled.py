"""The real vLLM scheduler and KV-cache manager, driven like vLLM's engine core, with a modelled executor.

No weights and no tokenizer: the next token of a request is a hash of its id and position, so that two runs
can be compared token for token whatever order they were scheduled in.
"""

import copy
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.engine.offline import (
    block_hasher,
    build_output,
    build_request,
    build_scheduler,
    engine_config,
)
from vllm_sarathi.engine.vllm.internals import request_status

VOCABULARY = 512
NGRAM: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


def tiny_engine_config(folder: Path, **engine_args: Any) -> Any:
    """Return a VllmConfig of small limits for a folder made by `config_folder`."""
    defaults: dict[str, Any] = {
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "block_size": 16,
        "enable_prefix_caching": False,
    }
    return engine_config(folder, **{**defaults, **engine_args})


def adapted(config: Any, sarathi: SarathiConfig | None, mode: str = "sync") -> Any:
    """Return a copy of a VllmConfig with our scheduler, or with stock's, in a mode: `sync`, `async` or `pipeline`."""
    config = copy.copy(config)
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.parallel_config = copy.copy(config.parallel_config)
    if mode == "async":  # vLLM's CPU platform switches it off; the scheduler itself needs no device
        config.scheduler_config.async_scheduling = True
    if mode == "pipeline":
        config.parallel_config.pipeline_parallel_size = 2
    if sarathi is not None:
        args = sarathi.engine_args()
        config.scheduler_config.scheduler_cls = args["scheduler_cls"]
        config.additional_config = args["additional_config"]
    return config


@dataclass
class Step:
    """What one call of `schedule` saw and did.

    Attributes:
        running_before: the running requests before it.
        decodes_allowed: of each that decodes, the tokens that stock vLLM would give it with an unlimited budget.
        partial_before: of each whose prompt was read in part, the tokens that were left.
        output: vLLM's SchedulerOutput.
        preempted: the requests that it preempted.
        admitted: the requests that it admitted.
        sampling: of each that samples in it, the position of its first new token.
    """

    running_before: list[Any]
    decodes_allowed: dict[str, int]
    partial_before: dict[str, int]
    output: Any
    preempted: set[str]
    admitted: list[Any]
    sampling: dict[str, int] = field(default_factory=dict)

    @property
    def scheduled(self) -> dict[str, int]:
        """The tokens of each request that is served."""
        tokens: dict[str, int] = self.output.num_scheduled_tokens
        return tokens


class ModelledEngine:
    """A scheduler of the real vLLM with a modelled executor.

    Args:
        config: a VllmConfig; copied, so that one can serve many engines.
        num_blocks: KV-cache blocks.
        in_flight: batches in flight: 1 is synchronous, 2 is asynchronous or a pipeline of 2.
        scheduler_cls: the class to drive; the configuration's own by default.
        draft: gives the draft tokens for (request id, position), for speculative decoding.
        kv_cache_config: vLLM's description of the KV cache; by default that of a model with full attention alone.
        log_stats: as in `build_scheduler`.
    """

    def __init__(
        self,
        config: Any,
        num_blocks: int = 64,
        in_flight: int = 1,
        scheduler_cls: Any = None,
        draft: Callable[[str, int], list[int]] | None = None,
        kv_cache_config: Any | None = None,
        log_stats: bool = False,
    ) -> None:
        self.scheduler = build_scheduler(config, num_blocks, scheduler_cls, kv_cache_config, log_stats)
        self.in_flight = in_flight
        self.queue: deque[Step] = deque()
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self._draft = draft
        self._hasher = block_hasher(config)

    def add(self, name: str, prompt: int | list[int], max_tokens: int = 8, **fields: Any) -> Any:
        """Queue a request; `prompt` is its tokens or how many."""
        tokens = prompt if isinstance(prompt, list) else [(i * 7 + 3) % VOCABULARY for i in range(prompt)]
        fields.setdefault("arrival_s", float(len(self.outputs)))
        request = build_request(name, tokens, max_tokens, block_hasher=self._hasher, **fields)
        self.outputs.setdefault(name, [])
        self.scheduler.add_request(request)
        return request

    def abort(self, name: str) -> None:
        """Abort a request, as a client's disconnect does."""
        self.scheduler.finish_requests(name, request_status().FINISHED_ABORTED)

    def step(self) -> Step:
        """Schedule one batch; when the pipeline is full, or nothing was scheduled, finish the oldest."""
        step = self._schedule()
        self.queue.append(step)
        if len(self.queue) >= self.in_flight or not step.scheduled:
            self.finish_oldest()
        return step

    def finish_oldest(self) -> None:
        """Deliver the oldest batch's tokens, if there is one in flight."""
        if not self.queue:
            return
        step = self.queue.popleft()
        result = self._execute(step)
        for outputs in self.scheduler.update_from_output(step.output, result).values():
            for output in outputs.outputs:
                self._deliver(output)
        if self._draft is not None:
            self._propose(step)

    def _deliver(self, output: Any) -> None:
        """Take what the scheduler tells a request's client, an EngineCoreOutput."""
        self.outputs[output.request_id] += output.new_token_ids
        if output.finish_reason is not None:
            self.finished[output.request_id] = str(output.finish_reason)

    def drain(self, most_steps: int = 10_000) -> int:
        """Step until every request has finished; return the number of steps."""
        for count in range(most_steps):
            if self.idle():
                return count
            self.step()
        raise AssertionError(f"not finished after {most_steps} steps: {list(self.scheduler.requests)}")

    def idle(self) -> bool:
        """True when all requests have finished; delivers what is still in flight."""
        if self.scheduler.has_unfinished_requests():
            return False
        while self.queue:
            self.finish_oldest()
        return True

    def _schedule(self) -> Step:
        scheduler = self.scheduler
        running = list(scheduler.running)
        partial = {r.request_id: r.num_tokens - r.num_computed_tokens for r in running if r.is_prefill_chunk}
        allowed = {
            r.request_id: need for r in running if not r.is_prefill_chunk and (need := self._need(r)) > 0
        }
        output = scheduler.schedule()
        ids = {r.request_id for r in scheduler.running}
        before = {r.request_id for r in running}
        step = Step(
            running_before=running,
            decodes_allowed=allowed,
            partial_before=partial,
            output=output,
            preempted={name for name in before - ids if not scheduler.requests[name].is_finished()},
            admitted=[r for r in scheduler.running if r.request_id not in before],
        )
        for name in output.num_scheduled_tokens:
            request = scheduler.requests[name]
            if not request.is_prefill_chunk:
                drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
                step.sampling[name] = request.num_computed_tokens - drafts
        return step

    def _need(self, request: Any) -> int:
        """Return the tokens that stock vLLM would give a decode in a step of unlimited budget."""
        placeholders = request.num_output_placeholders
        last = (
            request.num_computed_tokens + 2 - placeholders >= request.num_prompt_tokens + request.max_tokens
        )
        if placeholders > 0 and last:
            return 0
        need = request.num_tokens_with_spec + placeholders - request.num_computed_tokens
        return int(min(need, self.scheduler.max_model_len - request.num_computed_tokens - 1))

    @staticmethod
    def token(name: str, position: int) -> int:
        """Return the token that the modelled model puts at a position of a request."""
        return zlib.crc32(f"{name}/{position}".encode()) % VOCABULARY

    def _execute(self, step: Step) -> Any:
        return build_output({name: self._sample(step, name) for name in step.scheduled})

    def _sample(self, step: Step, name: str) -> list[int]:
        """Return the tokens that a request samples: right drafts, and one more; none while it prefills."""
        if name not in step.sampling:
            return []
        tokens: list[int] = []
        for draft in step.output.scheduled_spec_decode_tokens.get(name, ()):
            tokens.append(self.token(name, step.sampling[name] + len(tokens)))
            if draft != tokens[-1]:
                return tokens
        return [*tokens, self.token(name, step.sampling[name] + len(tokens))]

    def _propose(self, step: Step) -> None:
        assert self._draft is not None
        names = [n for n in step.sampling if n in self.scheduler.requests]
        drafts = [self._draft(n, self.scheduler.requests[n].num_tokens) for n in names]
        self.scheduler.update_draft_token_ids(SimpleNamespace(req_ids=names, draft_token_ids=drafts))


def config_maker(model_folder: Path) -> Callable[..., Any]:
    """Return a function that gives a VllmConfig of a model: stock without a SarathiConfig, ours with one."""
    cache: dict[str, Any] = {}

    def make(sarathi: SarathiConfig | None = None, mode: str = "sync", **engine_args: Any) -> Any:
        key = repr(sorted(engine_args.items(), key=str))
        if key not in cache:
            cache[key] = tiny_engine_config(model_folder, **engine_args)
        return adapted(cache[key], sarathi, mode)

    return make
