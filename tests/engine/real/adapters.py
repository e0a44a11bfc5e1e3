"""LoRA adapters for the tiny model, written by hand: two small matrices for each projection."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN = 64
LAYERS = 2
RANK = 8
PROJECTIONS = ("q_proj", "v_proj")


def write_adapter(folder: Path, seed: int) -> Path:
    """Write a random adapter, strong enough to change what the tiny model says."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for projection in PROJECTIONS:
            key = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(HIDDEN, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(PROJECTIONS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
