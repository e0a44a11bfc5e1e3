"""The hooks of modules, optimizers and tensors, and those that torch calls for all of them."""

import sys
from types import ModuleType
from typing import Any

import torch

HOOKS_OF_ALL = tuple(sys.modules[name] for name in ("torch.nn.modules.module", "torch.optim.optimizer"))
"""The modules that have the hooks of every module and of every optimizer."""


def hooks_of(owner: Any) -> dict[str, Any]:
    """Return the dictionaries of a module's, an optimizer's or a tensor's hooks, by name."""
    owners = torch.nn.Module | torch.optim.Optimizer | ModuleType
    names = list(vars(owner)) if isinstance(owner, owners) else _HOOKS_OF_TENSORS
    found = {name: getattr(owner, name, None) for name in names if name.endswith("_hooks")}
    return {name: hooks for name, hooks in found.items() if isinstance(hooks, dict)}


_HOOKS_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
