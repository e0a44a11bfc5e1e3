"""What was learnt of a device, kept for the next start: one file per deployment, checked before it is believed.

A file is JSON: `{"schema": 2, "key": {...}, "model": {...}}`. Its name is a digest of the key, and the key stands in
it in full, so that a file that was renamed or copied from elsewhere is not taken for ours.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_sarathi.core.config import NO_CALIBRATION
from vllm_sarathi.core.files import write_whole
from vllm_sarathi.core.steptime.model import StepTimeModel

SCHEMA = 2

Key = Mapping[str, str | int | bool | None]
"""What the device, the model and the engine's settings were, as far as they decide how long a step takes."""


class CalibrationError(ValueError):
    """A calibration that cannot be used; the message names the file and says why."""


def calibration_folder(setting: str | None) -> Path | None:
    """Return the folder that `--calibration-dir` names, the default one for None, and None for `none`.

    Raises:
        CalibrationError: it is below the user's home, and nobody knows where that is.
    """
    if setting == NO_CALIBRATION:
        return None
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # to be ignored, says the XDG Base Directory Specification
        cache = "~/.cache"
    try:
        return Path(f"{cache}/vllm-sarathi" if setting is None else setting).expanduser()
    except RuntimeError as error:
        raise CalibrationError("the user's home is not known; name a folder by --calibration-dir.") from error


def calibration_file(folder: Path, key: Key) -> Path:
    """Return the file in `folder` that belongs to `key`."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"calibration-{digest[:16]}.json"


def load_calibration(model: StepTimeModel, folder: Path, key: Key) -> Path | None:
    """Give a model the prior that an earlier run left, and return its file; None where there is none.

    Raises:
        CalibrationError: the file is there, and cannot be used; the model is as it was.
    """
    path = calibration_file(folder, key)
    values = _read(path)
    if values is None:
        return None
    if values.get("key") != dict(key):
        raise CalibrationError(f"{path}: was learnt on another device or setup (its key differs).")
    _load(model, values, path)
    return path


def load_latest(model: StepTimeModel, folder: Path, name: str) -> Path | None:
    """Give a model what was last learnt of a model on a CPU, whatever the other settings were; return its file.

    Args:
        model: takes it as a prior.
        folder: where calibrations are kept.
        name: the model that was served: a folder, or a name on a model hub.

    Raises:
        CalibrationError: it cannot be used; the model is as it was.
    """
    served = os.path.abspath(name) if os.path.exists(name) else name
    for path in sorted(folder.glob("calibration-*.json"), key=os.path.getmtime, reverse=True):
        values = _read(path) or {}
        key = values.get("key")
        # An accelerator's name does not end in a number of cores.
        if isinstance(key, dict) and key.get("model") == served and str(key.get("device")).endswith(" cores"):
            _load(model, values, path)
            return path
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """Return what a calibration file holds; None where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise CalibrationError(f"{path}: is not valid JSON ({error}).") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        schema = values.get("schema") if isinstance(values, dict) else None
        raise CalibrationError(f"{path}: has schema {schema!r}; this version reads {SCHEMA}.")
    return values


def _load(model: StepTimeModel, values: Mapping[str, Any], path: Path) -> None:
    try:
        model.load(values["model"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CalibrationError(f"{path}: holds no step model ({error}).") from error


def save_calibration(learnt: Mapping[str, Any], folder: Path, key: Key) -> Path:
    """Keep what `StepTimeModel.to_mapping` returned, and return the file.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path = calibration_file(folder, key)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"schema": SCHEMA, "key": dict(key), "model": learnt}) + "\n")
    return path
