"""Jobs for the tests on Ray: built in the test and again on the actors."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.autolrs.jobs import Job


def build(wait_in: str = "", seconds: float = 0.0) -> dict[str, Any]:
    """A network with batch normalisation and dropout on a shuffled loader.

    Args:
        wait_in: a folder; an actor notes its first step there, and every step of it then takes `seconds` longer.
    """
    job = Job("adam", seed=3)
    loader = DataLoader(TensorDataset(job.inputs, job.targets), batch_size=16, shuffle=True)
    here = os.getpid()

    def step(batch: Any) -> torch.Tensor:
        if wait_in and is_actor():
            (Path(wait_in) / str(here)).touch()
            time.sleep(seconds)
        inputs, targets = batch
        job.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(job.model(inputs), targets)
        loss.backward()
        job.optimizer.step()
        return loss

    return {
        "model": job.model,
        "optimizer": job.optimizer,
        "train_step": step,
        "validate": job.validate,
        "train_data": loader,
    }


def is_actor() -> bool:
    import ray  # only where a cluster is there

    return bool(ray.is_initialized() and ray.get_runtime_context().get_actor_id())


def broken() -> dict[str, Any]:
    raise ArithmeticError("the data are not there")
