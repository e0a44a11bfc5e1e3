"""AutoLRS in a hand-written loop on an Accelerator, with gradient accumulation and checkpoints.

pip install 'vllm-sarathi[autolrs,accelerate]'
python examples/accelerate_loop.py
"""

import argparse
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from autolrs_plugin.integrations.accelerate import AutoLRS

LENGTH = 64


class Writer(nn.Module):
    """A GRU on bytes, which returns its loss."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        states, _ = self.body(self.tokens(batch[:, :-1]))
        return nn.functional.cross_entropy(self.head(states).flatten(0, 1), batch[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="build/examples/accelerate")
    options = parser.parse_args()

    text = torch.tensor(list("".join(topics[key] for key in sorted(topics)).encode()[: 2000 * (LENGTH + 1)]))
    rows = text.view(-1, LENGTH + 1)
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = Writer()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters()), DataLoader(rows[:1900], batch_size=8, shuffle=True)
    )
    judge = rows[1900:].to(accelerator.device)

    def train_step(batch: torch.Tensor) -> torch.Tensor:
        with accelerator.accumulate(model):
            loss = model(batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def validate() -> torch.Tensor:
        with torch.no_grad():
            return model(judge)

    tuner = AutoLRS(
        accelerator,
        model,
        optimizer,
        loader,
        train_step,
        max_steps=options.steps,
        lr_range=(1e-6, 1.0),
        validate=validate,
    )
    step = 0
    while step < options.steps:
        for batch in loader:
            tuner.step(batch)
            step += accelerator.sync_gradients
            if step == options.steps:
                break
    accelerator.save_state(options.out)  # the tuner's state is in it
    print(f"peak learning rate {max(tuner.schedule.lrs):.2e}, validation loss {validate().item():.3f}")
    print(f"the search took {tuner.ledger.search_share:.0%} of all steps")


if __name__ == "__main__":
    main()
