"""AutoLRS with its probes on Ray actors: several learning rates are tried at a time, on replicas of the job.

pip install 'vllm-sarathi[autolrs,ray]'
python examples/ray_probes.py
"""

import argparse
from typing import Any

import ray
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autolrs_plugin import AutoLRS
from autolrs_plugin.integrations.ray import RayProbes


def build() -> dict[str, Any]:
    """Return the job as AutoLRS takes it; each actor calls this for its replica, and so do we."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 16)
    targets = (inputs @ torch.randn(16, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(inputs[:448], targets[:448]), batch_size=32, shuffle=True)

    def step(batch: Any) -> torch.Tensor:
        x, y = batch
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    def validate() -> torch.Tensor:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(inputs[448:]), targets[448:])

    return {
        "model": model,
        "optimizer": optimizer,
        "train_step": step,
        "validate": validate,
        "train_data": loader,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--actors", type=int, default=2)
    options = parser.parse_args()
    # A small cluster of one machine; leave this line out to use the cluster that you have.
    ray.init(num_cpus=options.actors, include_dashboard=False, object_store_memory=200 * 1024 * 1024)
    try:
        tuner = AutoLRS(
            **build(),
            max_steps=options.steps,
            lr_range=(1e-5, 1.0),
            progress=False,
            probes=RayProbes(build, actors=options.actors),
            parallel_probes=options.actors,
        )
        schedule = tuner.run()
    finally:
        ray.shutdown()
    for stage in tuner.stages:
        probed = ", ".join(f"{candidate.lr:.1e}" for candidate in stage.candidates)
        print(f"{stage.kind}: probed {probed}; took {stage.chosen_lr:.2e}")
    print(f"peak {max(schedule.lrs):.2e}, validation loss {tuner.val_losses[-1][1]:.4f}")
    print(f"the search took {tuner.ledger.search.steps} steps on top of {options.steps}")


if __name__ == "__main__":
    main()
