"""What of a model and an optimizer cannot be rolled back, and is refused by a sentence."""

from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from autolrs_plugin.training.plain import attributes_of

MOST_NESTED = 4
"""Optimizers are looked for in containers in containers, so deep."""


def check_job(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise if a job cannot be rolled back.

    Raises:
        ValueError: the model is of DeepSpeed, FSDP1 or torch.jit, has a parameter that is uninitialised or on the meta
            device, or is all frozen; or the optimizer has no parameters, or none of the model's.
        TypeError: they are no model and no optimizer.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: {named(model)} is no torch.nn.Module{_hint(model, torch.nn.Module)}.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = torch.optim.Optimizer
        raise TypeError(f"optimizer: {named(optimizer)} is no torch.optim.Optimizer{_hint(optimizer, kind)}.")
    _check_wrapper(model)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not params:
        raise ValueError("optimizer: has no parameters; there is nothing to train.")
    of_model = {id(p): name for name, p in model.named_parameters()}
    if not any(id(p) in of_model for p in params):
        raise ValueError(
            "optimizer: none of its parameters belongs to the model; was it built for another one?"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedTensorMixin):
            raise ValueError(
                f"model: the parameter {name!r} is uninitialised; pass one batch through the model first."
            )
        if parameter.is_meta:
            raise ValueError(
                f"model: the parameter {name!r} is on the meta device, where it has no values; put the model on a "
                "device with to_empty(), and load or initialise its weights first."
            )
    if not any(p.requires_grad for p in params):
        raise ValueError(
            "model: none of the parameters that the optimizer has requires a gradient, so no step trains anything; "
            "call requires_grad_() on what is to be trained."
        )


def check_accumulation(train_step: Any) -> None:
    """Refuse a step that accumulates gradients with an Accelerator: it counts the batches, and no probe can be undone.

    Raises:
        ValueError: `train_step` uses an Accelerator that accumulates.
    """
    function = train_step.__func__ if isinstance(train_step, MethodType) else train_step
    used = list(attributes_of(train_step.__self__).values()) if isinstance(train_step, MethodType) else []
    if isinstance(function, FunctionType):
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        used += [cell.cell_contents for _, cell in cells if cell != CellType()]
        used += [function.__globals__.get(name) for name in function.__code__.co_names]
    for thing in used:
        # Only an Accelerator is asked: a configuration may raise KeyError for a name that it does not have.
        accelerates = any(kind.__module__ == "accelerate.accelerator" for kind in type(thing).__mro__)
        if accelerates and (steps := thing.gradient_accumulation_steps) > 1:
            raise ValueError(
                f"train_step: uses an Accelerator with gradient_accumulation_steps={steps}, which counts batches by "
                "itself; use autolrs_plugin.integrations.accelerate.AutoLRS, or 1."
            )


def plain_numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the numbers and arrays of numpy and torch as Python's own numbers and lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(plain(v) for v in value)
        return value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value

    return {name: plain(value) for name, value in settings.items()}


def named(thing: Any) -> str:
    """Return what something is, with its article, for an error."""
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    name = type(thing).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def _hint(thing: Any, kind: type) -> str:
    """Return what to give in place of what is no module or no optimizer, as far as that can be seen."""
    maker = thing.func if isinstance(thing, partial) else thing
    if isinstance(maker, type) and issubclass(maker, kind):
        arguments = "" if kind is torch.nn.Module else "model.parameters(), lr=..."
        return f", but makes one; give {maker.__name__}({arguments})"
    if kind is torch.optim.Optimizer and hasattr(type(thing), "step"):
        return (
            ", though it has a step(); give an optimizer of a class that derives from it (of schedulefree: "
            "AdamWScheduleFree, RAdamScheduleFree or SGDScheduleFree in place of ScheduleFreeWrapper)"
        )
    parts = _parts(thing if isinstance(thing, list | tuple | dict) else attributes_of(thing))
    names = ", ".join(dict.fromkeys(type(part).__name__ for part in parts if isinstance(part, kind)))
    if not names:
        return ""
    if kind is torch.nn.Module:
        return f"; put {names} into one, such as a torch.nn.ModuleDict"
    return f"; put {names} into one torch.optim.Optimizer that holds them and whose step() calls theirs"


def _parts(value: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(value, list | tuple | dict) and depth < MOST_NESTED:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part, depth + 1)
    else:
        yield value


def _check_wrapper(model: torch.nn.Module) -> None:
    kinds = type(model).__mro__
    if any(kind.__module__.partition(".")[0] == "deepspeed" for kind in kinds):
        raise ValueError(
            f"model: a {type(model).__name__} partitions weights and optimizer state out of reach, so a step of it "
            "cannot be undone; train with DistributedDataParallel or FSDP2 (fully_shard) to use AutoLRS."
        )
    if any(kind.__name__ == "FullyShardedDataParallel" for kind in kinds):
        raise ValueError(
            "model: FullyShardedDataParallel (FSDP1) flattens the parameters, so a step of it cannot be undone; use "
            "FSDP2 (torch.distributed.fsdp.fully_shard)."
        )
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: has {named(module)} of torch.jit, which keeps its state out of reach, so a step of it cannot "
                "be undone; give the module that it was made of (torch.compile may be used)."
            )
