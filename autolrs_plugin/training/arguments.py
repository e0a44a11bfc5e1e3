"""What AutoLRS is given and cannot use, refused by a sentence before anything is trained."""

import inspect
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autolrs_plugin.core.actions import Result
from autolrs_plugin.training.checking import named

OF_OBSERVERS = ("on_action", "on_step", "on_result", "close")
OF_PROBERS = ("attach", "probe", "forget", "close")
"""The methods that they need."""


def check_callables(validate: Any, count_tokens: Any, train_data: Any) -> None:
    """Raise if what is to be called cannot be, or not in the way in which it is called.

    Raises:
        TypeError: `validate` cannot be called with nothing, or `count_tokens` not with a batch.
        ValueError: there are no batches to count the tokens of.
    """
    if validate is not None and not callable(validate):
        raise TypeError(
            f"validate: {named(validate)} cannot be called; give a function that returns the validation "
            "loss, such as one that goes through your loader."
        )
    if validate is not None and not takes(validate, 0):
        raise TypeError(
            "validate: needs an argument, and is called without any; give a function that knows its model and data, "
            "such as lambda: evaluate(model)."
        )
    if count_tokens is None:
        return
    if not callable(count_tokens) or not takes(count_tokens, 1):
        raise TypeError(
            f"count_tokens: {named(count_tokens)} cannot be called with a batch; give a function that returns how "
            "many tokens (or samples) are in one."
        )
    if train_data is None:
        raise ValueError(
            "count_tokens: was given without train_data, so there are no batches to count; leave it out."
        )


def check_collections(stateful: Any, generators: Any, observers: Any, probes: Any, progress: Any) -> None:
    """Raise, naming the argument, if a collection is none, or something lacks the methods that it needs.

    Raises:
        TypeError: one of the collections, `observers` or `probes` is not what it must be.
        ValueError: `progress` neither asks for lines nor does without them.
    """
    if not isinstance(progress, bool | np.bool_):
        raise ValueError(f"progress={progress!r}: must be True or False.")
    if stateful is not None and not isinstance(stateful, Mapping):
        raise TypeError(
            f"stateful: {named(stateful)} has no names; give a dictionary, such as stateful={{'ema': ema}}."
        )
    for name in stateful or ():
        if not isinstance(name, str):
            raise TypeError(
                f"stateful: the name {name!r} is {named(name)}; give each object a name, a string."
            )
    for argument, value in (("generators", generators), ("observers", observers)):
        if not isinstance(value, Collection) or isinstance(value, str | Mapping):
            raise TypeError(f"{argument}: {named(value)} is not a list; give {argument}=[...].")
    for observer in observers:
        _check_methods("observers", observer, OF_OBSERVERS)
    if probes is not None:
        _check_methods("probes", probes, OF_PROBERS)


def _check_methods(argument: str, thing: Any, methods: Iterable[str]) -> None:
    missing = [m for m in methods if not callable(getattr(thing, m, None)) or isinstance(thing, type)]
    if missing:
        raise TypeError(
            f"{argument}: {named(thing)} has no {missing[0]}(); it needs the methods {', '.join(methods)}."
        )


def checked_resume(resume: Any, folder: Path | None) -> bool | str:
    """Return `resume`; raise ValueError if it is none of what it can be, or insists on a run that has no folder."""
    if isinstance(resume, bool | np.bool_):
        if resume and folder is None:
            raise ValueError("resume=True: needs the folder of the run that is to go on; give run_dir=.")
        return bool(resume)
    if isinstance(resume, str) and resume == "auto":
        return "auto"
    raise ValueError(f"resume={resume!r}: must be 'auto', True or False.")


def checked_folder(run_dir: Any) -> Path | None:
    """Return `run_dir` as a path, `~` standing for the home folder.

    Raises:
        TypeError: it is no path.
        ValueError: it is empty, a file, or under one, or nothing may be written there.
    """
    if run_dir is None:
        return None
    if not isinstance(run_dir, str | os.PathLike) or not isinstance(os.fspath(run_dir), str):
        raise TypeError(
            f"run_dir={run_dir!r}: is {named(run_dir)}; give the path of a folder, a string or a Path."
        )
    if not os.fspath(run_dir):
        raise ValueError("run_dir='': is empty; give the path of a folder, or None to keep nothing.")
    try:
        path = Path(run_dir).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"run_dir={str(run_dir)!r}: that user has no home folder here; give another."
        ) from error
    for folder in [path, *path.parents]:
        if folder.exists():
            if not folder.is_dir():
                under = "" if folder == path else f" is under {str(folder)!r}, which"
                raise ValueError(f"run_dir={str(path)!r}:{under} is a file; give a folder.")
            if not os.access(folder, os.W_OK):
                raise ValueError(f"run_dir={str(path)!r}: nothing may be written to {str(folder)!r}.")
            break
    return path


def check_result(result: Any) -> None:
    """Raise TypeError if what was told is no result of an action."""
    if not isinstance(result, Result):
        raise TypeError(
            f"tell: {named(result)} is no Result; give what perform() returned, or "
            "Result(losses=..., val_loss=...)."
        )


def takes(function: Any, count: int) -> bool:
    """Tell whether a function can be called with `count` arguments; yes, where that cannot be known."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in callables have none
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def check_step(train_step: Any, train_data: Any, probe_data: Any, has_data: bool) -> None:
    """Raise if train_step cannot be called with what it would be given.

    Raises:
        TypeError: it cannot be called at all, or not with a batch where there are batches, or only with one.
        ValueError: data was given twice, or for probes alone.
    """
    if probe_data is not None and train_data is None:
        raise ValueError(
            "probe_data: was given without train_data; give both, and let train_step take a batch."
        )
    if train_data is not None and has_data:
        raise ValueError(
            "data: was given together with train_data; the position in train_data is kept by itself."
        )
    if train_step is None:
        return
    if not callable(train_step):
        raise TypeError(f"train_step: {named(train_step)} cannot be called.")
    if takes(train_step, 0 if train_data is None else 1):
        return
    if train_data is None:
        raise TypeError("train_step: takes a batch, so train_data= is needed.")
    if takes(train_step, 0):
        raise TypeError("train_step: takes no batch, but train_data was given; let it take one.")
    raise TypeError(
        "train_step: needs more than a batch, and is called with one alone; let it take just that."
    )


def whole_number(value: Any, source: str) -> int:
    """Return what a user's function returned as a whole number; raise TypeError if it is none."""
    plain = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(plain, bool) or not isinstance(plain, int):
        raise TypeError(
            f"{source}: returned {str(value)[:40]} ({type(value).__name__}); it must return a whole number."
        )
    return plain
