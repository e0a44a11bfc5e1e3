"""What of a model and an optimizer cannot be rolled back, and is refused by a sentence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


def check_job(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise if a job cannot be rolled back.

    Raises:
        ValueError: the model is of DeepSpeed or FSDP1 or has an uninitialised parameter; or the optimizer has no
            parameters, or none of the model's.
        TypeError: they are no model and no optimizer.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: a {type(model).__name__} is no torch.nn.Module.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        several = isinstance(optimizer, list | tuple | dict)
        hint = "; put several into one torch.optim.Optimizer that holds them" if several else ""
        raise TypeError(f"optimizer: a {type(optimizer).__name__} is no torch.optim.Optimizer{hint}.")
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


def check_functions(validate: object, run_dir: Path | None) -> None:
    """Raise if what is to be called cannot be, or a folder is none.

    Raises:
        TypeError: `validate` cannot be called.
        ValueError: `run_dir` is a file.
    """
    if validate is not None and not callable(validate):
        raise TypeError(
            f"validate: a {type(validate).__name__} cannot be called; give a function that returns the validation "
            "loss, such as one that goes through your loader."
        )
    if run_dir is not None and run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir={str(run_dir)!r}: is a file; give a folder.")


def plain_numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with numpy's numbers as Python's own."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(plain(v) for v in value)
        return value.item() if isinstance(value, np.generic) else value

    return {name: plain(value) for name, value in settings.items()}


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
