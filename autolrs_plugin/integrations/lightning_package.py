"""Lightning under the name by which the script knows it: lightning.pytorch, or pytorch_lightning, which is the same."""

import sys
from typing import TYPE_CHECKING

PACKAGE = "lightning.pytorch"
if "pytorch_lightning" in sys.modules and PACKAGE not in sys.modules:
    PACKAGE = "pytorch_lightning"

if TYPE_CHECKING or PACKAGE == "lightning.pytorch":
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ProgressBar
    from lightning.pytorch.loggers.logger import DummyLogger
else:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.callbacks import ProgressBar
    from pytorch_lightning.loggers.logger import DummyLogger

__all__ = ["PACKAGE", "Callback", "DummyLogger", "LightningModule", "ProgressBar", "Trainer"]
