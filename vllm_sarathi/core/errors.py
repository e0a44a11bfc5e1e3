"""Errors that a user can cause: one sentence each."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting that a user gave and that cannot be used; the message names it, the value and what is valid."""


def nearest_hint(name: str, valid: Iterable[str]) -> str:
    """Return "did you mean ...?" with the nearest valid name, or the list of valid names."""
    name, names = name[:80], sorted(valid)
    close = [each for each in names if each.casefold() == name.casefold()]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names)}."


def short(value: object) -> str:
    """Return a value as it is quoted in an error: what came from outside may be of any length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
