"""AutoLRS in a Lightning Trainer: one callback. A recurrent network learns Python's language reference, byte by byte.

pip install 'vllm-sarathi[autolrs,lightning]'
python examples/lightning_module.py
"""

import argparse
from pydoc_data.topics import topics

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from autolrs_plugin.integrations.lightning import AutoLRSCallback

LENGTH = 64


class Writer(LightningModule):
    """A GRU on bytes; `configure_optimizers` returns an optimizer and no scheduler."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        states, _ = self.body(self.tokens(batch[:, :-1]))
        return nn.functional.cross_entropy(self.head(states).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="build/examples/lightning")
    options = parser.parse_args()

    text = torch.tensor(list("".join(topics[key] for key in sorted(topics)).encode()[: 2000 * (LENGTH + 1)]))
    rows = text.view(-1, LENGTH + 1)
    torch.manual_seed(0)
    tuner = AutoLRSCallback(lr_range=(1e-6, 1.0))
    trainer = Trainer(
        max_steps=options.steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=options.out,
        callbacks=[tuner],
    )
    train = DataLoader(rows[:1900], batch_size=16, shuffle=True)
    judge = DataLoader(rows[1900:], batch_size=100)
    model = Writer()
    trainer.fit(model, train, judge)
    loss = trainer.validate(model, judge, verbose=False)[0]["val_loss"]
    print(f"peak learning rate {max(tuner.schedule.lrs):.2e}, validation loss {loss:.3f}")
    print(f"the search took {tuner.ledger.search_share:.0%} of all steps")


if __name__ == "__main__":
    main()
