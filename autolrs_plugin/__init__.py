"""AutoLRS: finds the learning rate while training, stage by stage, and counts what the search costs."""

__version__ = "0.1.0"
