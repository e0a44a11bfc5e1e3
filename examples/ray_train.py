"""AutoLRS inside of Ray Train: two workers train one model (DDP), rank 0 decides; one report for each real step.

pip install 'vllm-sarathi[autolrs,ray]'
python examples/ray_train.py
"""

import argparse
import os
from typing import Any

import ray
import torch
from ray import train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autolrs_plugin import AutoLRS
from autolrs_plugin.integrations.ray import SCHEDULE_FILE, TrainReports


def train_loop(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(512, 16)
    targets = (inputs @ torch.randn(16, 4)).argmax(1)
    model = prepare_model(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = prepare_data_loader(
        DataLoader(TensorDataset(inputs[:448], targets[:448]), batch_size=16, shuffle=True)
    )

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

    tuner = AutoLRS(
        model,
        optimizer,
        max_steps=config["steps"],
        lr_range=(1e-5, 1.0),
        train_step=step,
        validate=validate,
        train_data=loader,
        progress=False,
        observers=[
            TrainReports()
        ],  # rank 0 could save the model, too: TrainReports(save=function of a folder)
    )
    tuner.run()
    if train.get_context().get_world_rank() == 0:
        share = tuner.ledger.search_share
        print(f"peak {max(tuner.schedule.lrs):.2e}; the search took {share:.0%} of all steps", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", default=None, help="a folder for Ray's results; by default Ray's own")
    options = parser.parse_args()
    # The interval at which Ray takes reports from its workers; the default of 2 s is many steps here.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.02")
    # A small cluster of one machine; leave this line out to use the cluster that you have.
    ray.init(num_cpus=options.workers, include_dashboard=False, object_store_memory=200 * 1024 * 1024)
    try:
        result = TorchTrainer(
            train_loop,
            train_loop_config={"steps": options.steps},
            scaling_config=ScalingConfig(num_workers=options.workers),
            run_config=RunConfig(storage_path=options.storage),
        ).fit()
        last = result.metrics
        print(f"step {last['step']}: loss {last['loss']:.4f}, validation loss {last['val_loss']:.4f}")
        print(f"the schedule is {SCHEDULE_FILE} in {result.checkpoint.path}")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
