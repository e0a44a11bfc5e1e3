"""A schedule that was found once, replayed by an ordinary scheduler of torch: to the bit the same weights.

pip install 'vllm-sarathi[autolrs]'
python examples/replay_schedule.py
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.utils.data import DataLoader

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.schedule import Schedule
from autolrs_plugin.training.lr import ReplayLR

LENGTH = 16


class Job:
    """A network that predicts a byte from the sixteen before it."""

    def __init__(self) -> None:
        text = torch.tensor(
            list("".join(topics[key] for key in sorted(topics)).encode()[: 4000 * (LENGTH + 1)])
        )
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * LENGTH, 64), nn.ReLU(), nn.Linear(64, 256)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.loader = DataLoader(text.view(-1, LENGTH + 1), batch_size=32, shuffle=True)

    def step(self, batch: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(batch[:, :-1]), batch[:, -1])
        loss.backward()
        self.optimizer.step()
        return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("build/examples/schedule.json"))
    options = parser.parse_args()

    job = Job()
    tuner = AutoLRS(
        job.model,
        job.optimizer,
        max_steps=options.steps,
        lr_range=(1e-6, 1.0),
        train_step=job.step,
        train_data=job.loader,
        progress=False,
    )
    schedule = tuner.run()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    schedule.save(options.out)
    print(f"searched: peak {max(schedule.lrs):.2e}, loss {tuner.losses[-1]:.4f}, {options.out}")

    again = Job()
    scheduler = ReplayLR(again.optimizer, Schedule.load(options.out).lrs)
    step = 0
    while step < options.steps:
        for batch in again.loader:
            loss = again.step(batch)
            scheduler.step()
            step += 1
            if step == options.steps:
                break
    pairs = zip(job.model.parameters(), again.model.parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    print(f"replayed: loss {loss.item():.4f}, {'the same weights' if same else 'other weights'}")


if __name__ == "__main__":
    main()
