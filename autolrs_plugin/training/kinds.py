"""How the walk through a job tells things apart, by their types."""

import functools
import random
from types import (
    BuiltinMethodType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)

import torch

from autolrs_plugin.training.plain import ATOMS, BUFFERS
from autolrs_plugin.training.slots import DESCRIPTORS

PASSED = (*ATOMS, *BUFFERS, ModuleType, random.SystemRandom, *DESCRIPTORS)
"""What nothing is looked for in."""

FUNCTIONS = (
    *(FunctionType, MethodType, functools.partial, functools._lru_cache_wrapper),
    *(BuiltinMethodType, MethodWrapperType),
)

REFERRED = (
    *(torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
    *(FunctionType, MethodType, functools.partial),
)
"""What a state_dict() leaves out where it is only referred to."""
