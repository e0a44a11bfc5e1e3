"""Weights that FSDP2 shards over several processes."""

import torch


def reshard(model: torch.nn.Module) -> None:
    """Make FSDP2 let go of weights that it has gathered.

    After a forward pass without a backward pass the root keeps them for the next forward pass, which would then not
    see what is written into its parameters meanwhile.
    """
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            module.reshard()
