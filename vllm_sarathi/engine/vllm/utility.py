"""A way from the API server to the scheduler: vLLM's own utility calls.

An API server reaches its engine cores through its `EngineClient`. The `collective_rpc` of that goes on to the workers,
which have no scheduler; what the engine core itself is asked (LoRA adapters, sleep, prefix caches) are utility calls: a
method of the engine core by its name, run between two steps in the engine's own thread. vLLM asks plugins for just
that: no new way into the engine, but a method of theirs where the existing one looks for it.
"""

import sys
from typing import Any

METHOD = "sarathi_control"
"""Our method of the engine core."""


class NoControlError(RuntimeError):
    """The engine core has no such method: another scheduler than ours runs in it."""


def answer_control(engine_core: Any, command: str) -> str:
    """Answer a control command in the engine core's process; a method of vLLM's engine core."""
    answer: str = engine_core.scheduler.control.answer(command)
    return answer


def offer_control() -> None:
    """Let the engine core that is being made in this process, if any, answer control commands."""
    module = sys.modules.get("vllm.v1.engine.core")
    if module is not None:
        setattr(module.EngineCore, METHOD, answer_control)


async def ask_engines(engine_client: Any, command: str) -> list[str]:
    """Return what each engine core answers to a control command.

    Before vLLM 0.32 all of a data-parallel group are asked, too, and the first one's answer is told.

    Raises:
        NoControlError: the scheduler is none of ours. The API server's own configuration does not tell: of several API
            servers it is made without our flags.
    """
    engine_core = engine_client.engine_core
    try:
        if hasattr(engine_core, "call_utility_all_async"):
            answers: list[str] = await engine_core.call_utility_all_async(METHOD, command)
            return answers
        return [await engine_core.call_utility_async(METHOD, command)]
    except Exception as error:  # vLLM hands on what was raised as text
        if f"has no attribute '{METHOD}'" in str(error):
            raise NoControlError from error
        raise
