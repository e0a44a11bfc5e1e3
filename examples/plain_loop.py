"""AutoLRS on a plain PyTorch loop: a small decoder learns to write like Python's language reference, byte by byte.

pip install 'vllm-sarathi[autolrs]'
python examples/plain_loop.py
"""

import argparse
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.utils.data import DataLoader

from autolrs_plugin import AutoLRS

LENGTH = 64


class Decoder(nn.Module):
    """Two transformer layers on bytes."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.tokens(x) + self.positions.weight, mask=self.mask, is_causal=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--run-dir", help="with it, a run that was killed goes on where it was")
    options = parser.parse_args()

    text = torch.tensor(list("".join(topics[key] for key in sorted(topics)).encode()[: 2000 * (LENGTH + 1)]))
    rows = text.view(-1, LENGTH + 1)
    loader = DataLoader(rows[:1900], batch_size=16, shuffle=True)
    torch.manual_seed(0)
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters())

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def train_step(batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        return loss

    def validate() -> torch.Tensor:
        with torch.no_grad():
            return loss_of(rows[1900:])

    tuner = AutoLRS(
        model,
        optimizer,
        max_steps=options.steps,
        lr_range=(1e-6, 1.0),
        train_step=train_step,
        train_data=loader,
        validate=validate,
        run_dir=options.run_dir,
    )
    schedule = tuner.run()
    print(f"peak learning rate {max(schedule.lrs):.2e}, validation loss {tuner.val_losses[-1][1]:.3f}")
    print(f"the search took {tuner.ledger.search_share:.0%} of all steps")


if __name__ == "__main__":
    main()
