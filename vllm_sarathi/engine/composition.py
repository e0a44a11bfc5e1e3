"""Another scheduler beside ours: a subclass of vLLM's that goes on below ours, as NVIDIA Dynamo's instrumented one.

Two ways, with the same result:

- by name: `vllm serve --scheduler sarathi --scheduler-cls THEIR.CLASS`, in Python
  `SarathiConfig(scheduler_base="THEIR.CLASS")`;
- by hand: `class Mine(SarathiMixin, Theirs)`, and `scheduler_cls="my.module.Mine"`.

Ours sets the limits of a step and calls `super().schedule()`: theirs sees each call of vLLM's methods, with the result
that vLLM gave. It must call `super()` in turn, and leave the queues to vLLM.
"""

import importlib
from typing import Any

from vllm_sarathi.core.errors import ConfigError


def scheduler_base(path: str, root: type[Any]) -> type[Any]:
    """Return the scheduler class that a dotted path names.

    Args:
        path: MODULE.CLASS.
        root: vLLM's scheduler class.

    Raises:
        ConfigError: it cannot be imported, or is none of vLLM's kind.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--scheduler-base {path!r}: cannot be imported ({error}).") from error
    if not isinstance(found, type) or not issubclass(found, root):
        raise ConfigError(
            f"--scheduler-base {path!r}: must be a subclass of {root.__module__}.{root.__name__}."
        )
    return found


def composed(ours: type[Any], theirs: type[Any], asynchronous: type[Any] | None) -> type[Any]:
    """Return the class in which theirs goes on below ours.

    Args:
        ours: our scheduler.
        theirs: another subclass of vLLM's scheduler.
        asynchronous: vLLM's asynchronous scheduler, where it is to keep the books; else None.
    """
    bases: tuple[type[Any], ...] = (ours, theirs)
    if asynchronous is not None and not issubclass(theirs, asynchronous):
        bases = (ours, theirs, asynchronous)
    return type(f"Sarathi{theirs.__name__}", bases, {"__doc__": f"{ours.__name__} over {theirs.__name__}."})
