"""A real engine in this process, driven step by step by whoever holds it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm_sarathi.engine.vllm.contract import missing_attributes, raise_violations
from vllm_sarathi.engine.vllm.internals import (
    argument_parser_class,
    llm_engine_class,
    sampling_params_class,
    server_args_class,
    server_context,
)

MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"


class InProcessEngine:
    """A vLLM engine whose scheduler can be reached.

    Args:
        engine: vLLM's LLMEngine, with its core in this process.
    """

    def __init__(self, engine: Any) -> None:
        raise_violations(missing_attributes("engine", engine))
        self._engine = engine
        self._requests = 0
        self.scheduler: Any = engine.engine_core.engine_core.scheduler
        config = engine.vllm_config
        self.vocabulary = int(config.model_config.get_vocab_size())
        self.max_model_len = int(config.model_config.max_model_len)
        self.max_num_seqs = int(config.scheduler_config.max_num_seqs)
        self.kv_tokens = int(config.cache_config.num_gpu_blocks) * int(self.scheduler.block_size)

    def add(self, prompt_tokens: Sequence[int], max_tokens: int) -> str:
        """Queue a request that generates exactly `max_tokens`, and return its name."""
        params = sampling_params_class()(
            max_tokens=max_tokens, ignore_eos=True, temperature=0.0, detokenize=False
        )
        self._requests += 1
        name = f"request-{self._requests}"
        self._engine.add_request(name, {"prompt_token_ids": list(prompt_tokens)}, params)
        return name

    def step(self) -> None:
        """Take one step."""
        self._engine.step()

    def abort(self, names: list[str]) -> None:
        """Abort requests, and step until nothing of them is left; those that have finished are passed over."""
        self._engine.abort_request(names)
        while self._engine.has_unfinished_requests() or self.scheduler.has_requests():
            self._engine.step()


@contextmanager
def engine_in_process(flags: Sequence[str]) -> Iterator[InProcessEngine]:
    """Yield the engine that `vllm serve` with these flags would run, our flags among them.

    Raises:
        SystemExit: vLLM's command line refuses a flag; it has said why.
    """
    parser_class = argument_parser_class()
    arguments = server_args_class()
    llm_engine = llm_engine_class()
    context = server_context()
    parser = arguments.add_cli_args(parser_class(prog="vllm-sarathi profile"))
    engine_args = arguments.from_cli_args(parser.parse_args(list(flags)))
    # Configured as for a server, whose core has a process of its own: on a CPU that decides how many cores compute.
    with _multiprocessing("1"):
        vllm_config = engine_args.create_engine_config(context)
    with _multiprocessing("0"):
        engine = llm_engine.from_vllm_config(vllm_config, usage_context=context, disable_log_stats=True)
    try:
        yield InProcessEngine(engine)
    finally:
        engine.engine_core.shutdown()


@contextmanager
def _multiprocessing(value: str) -> Iterator[None]:
    before = os.environ.get(MULTIPROCESSING)
    os.environ[MULTIPROCESSING] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[MULTIPROCESSING]
        else:
            os.environ[MULTIPROCESSING] = before
