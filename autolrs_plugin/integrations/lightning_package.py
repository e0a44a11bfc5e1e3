"""Lightning under the name by which the script knows it: lightning.pytorch, or pytorch_lightning, which is the same."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

PACKAGE = "lightning.pytorch"
if "pytorch_lightning" in sys.modules and PACKAGE not in sys.modules:
    PACKAGE = "pytorch_lightning"

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ProgressBar
    from lightning.pytorch.loggers.logger import DummyLogger
else:
    Callback, LightningModule, Trainer = (
        getattr(import_module(PACKAGE), name) for name in ("Callback", "LightningModule", "Trainer")
    )
    ProgressBar = import_module(f"{PACKAGE}.callbacks").ProgressBar
    DummyLogger = import_module(f"{PACKAGE}.loggers.logger").DummyLogger

__all__ = ["PACKAGE", "Callback", "DummyLogger", "LightningModule", "ProgressBar", "Trainer"]
