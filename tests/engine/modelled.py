"""The real vLLM scheduler and KV-cache manager, driven like vLLM's engine core, with a modelled executor.

No weights and no tokenizer: the next token of a request is a hash of its id and position, so that two runs
can be compared token for token whatever order they were scheduled in.
"""

import copy
import json
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

VOCABULARY = 512
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def config_folder(folder: Path, **changes: Any) -> Path:
    """Write a folder that holds nothing but a model's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return folder


def engine_config(folder: Path, **engine_args: Any) -> Any:
    """Return a VllmConfig for a folder made by `config_folder`."""
    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "block_size": 16,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    return EngineArgs(model=str(folder), **{**defaults, **engine_args}).create_engine_config()


def kv_cache_config(num_blocks: int, block_size: int) -> KVCacheConfig:
    """Return one group of full attention with so many blocks."""
    import torch  # local: only this function needs it

    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )


@dataclass
class Step:
    """What one call of `schedule` saw and did."""

    running_before: list[Any]
    decodes_allowed: dict[str, int]
    partial_before: dict[str, int]
    output: Any
    preempted: set[str]
    admitted: list[Any]
    sampling: dict[str, int] = field(default_factory=dict)

    @property
    def scheduled(self) -> dict[str, int]:
        return self.output.num_scheduled_tokens


class ModelledEngine:
    """A scheduler of the real vLLM with a modelled executor.

    Args:
        config: a VllmConfig; copied, so that one can serve many engines.
        num_blocks: KV-cache blocks.
        in_flight: batches in flight: 1 is synchronous, 2 is asynchronous or a pipeline of 2.
        scheduler_cls: the class to drive; the configuration's own by default.
        draft: gives the draft tokens for (request id, position), for speculative decoding.
    """

    def __init__(
        self,
        config: Any,
        num_blocks: int = 64,
        in_flight: int = 1,
        scheduler_cls: Any = None,
        draft: Callable[[str, int], list[int]] | None = None,
    ) -> None:
        config = copy.copy(config)
        config.cache_config = copy.copy(config.cache_config)
        config.cache_config.num_gpu_blocks = num_blocks
        block_size = config.cache_config.block_size
        scheduler_cls = scheduler_cls or config.scheduler_config.get_scheduler_cls()
        self.scheduler = scheduler_cls(
            vllm_config=config,
            kv_cache_config=kv_cache_config(num_blocks, block_size),
            structured_output_manager=StructuredOutputManager(config),
            include_finished_set=False,
            log_stats=False,
            block_size=block_size,
            hash_block_size=block_size,
        )
        self.in_flight = in_flight
        self.queue: deque[Step] = deque()
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self._draft = draft
        self._hasher = None
        if config.cache_config.enable_prefix_caching:
            init_none_hash(hash)
            self._hasher = get_request_block_hasher(block_size, hash)

    def add(self, name: str, prompt: int | list[int], max_tokens: int = 8, **fields: Any) -> Any:
        """Queue a request; `prompt` is its tokens or how many."""
        tokens = prompt if isinstance(prompt, list) else [(i * 7 + 3) % VOCABULARY for i in range(prompt)]
        request = Request(
            request_id=name,
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(
                max_tokens=max_tokens, ignore_eos=True, **fields.pop("sampling", {})
            ),
            pooling_params=None,
            block_hasher=self._hasher,
            **{"arrival_time": float(len(self.outputs)), **fields},
        )
        self.outputs.setdefault(name, [])
        self.scheduler.add_request(request)
        return request

    def abort(self, name: str) -> None:
        """Abort a request, as a client's disconnect does."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> Step:
        """Schedule one batch; when so many are in flight, or nothing was scheduled, finish the oldest."""
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
                self.outputs[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    self.finished[output.request_id] = str(output.finish_reason)
        if self._draft is not None:
            self._propose(step)

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
        return min(need, self.scheduler.max_model_len - request.num_computed_tokens - 1)

    @staticmethod
    def token(name: str, position: int) -> int:
        """Return the token that the modelled model puts at a position of a request."""
        return zlib.crc32(f"{name}/{position}".encode()) % VOCABULARY

    def _execute(self, step: Step) -> ModelRunnerOutput:
        names = list(step.scheduled)
        sampled = []
        for name in names:
            if name not in step.sampling:
                sampled.append([])
                continue
            position = step.sampling[name]
            drafts = step.output.scheduled_spec_decode_tokens.get(name, ())
            tokens = []
            for draft in drafts:
                tokens.append(self.token(name, position + len(tokens)))
                if draft != tokens[-1]:
                    break
            else:
                tokens.append(self.token(name, position + len(tokens)))
            sampled.append(tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
        )

    def _propose(self, step: Step) -> None:
        assert self._draft is not None
        names = [n for n in step.sampling if n in self.scheduler.requests]
        drafts = [self._draft(n, self.scheduler.requests[n].num_tokens) for n in names]
        self.scheduler.update_draft_token_ids(DraftTokenIds(names, drafts))
