"""Errors that a user can cause: one sentence each."""

import difflib
from collections.abc import Iterable, Mapping


class ConfigError(ValueError):
    """A setting that a user gave and that cannot be used; the message names it, the value and what is valid."""


class VllmMissingError(ImportError):
    """vLLM is not installed; the message names the extras that bring it."""

    def __init__(self, asking: str) -> None:
        super().__init__(
            f"{asking} needs vLLM, which is not installed: "
            "pip install 'vllm-sarathi[vllm]' (accelerators) or 'vllm-sarathi[cpu]' (CPU build)."
        )


MOST_PARTS = 10_000
"""The most values within one that an error writes out."""

MOST_NAMES = 40
"""The most valid names that an error lists."""


def nearest_hint(name: str, valid: Iterable[str]) -> str:
    """Return "did you mean ...?" with the nearest valid name, or the list of valid names; of many, the first."""
    name, names = name[:80], sorted(valid)
    close = [each for each in names if each.casefold() == name.casefold()]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"valid: {', '.join(names[:MOST_NAMES])}{more}."


def short(value: object) -> str:
    """Return a value as it is quoted in an error: what came from outside may be of any length."""
    text = repr(value) if _has_few_parts(value) else f"a {type(value).__name__} of very many values"
    return text if len(text) <= 80 else text[:77] + "..."


def _has_few_parts(value: object) -> bool:
    """Tell whether a value can be written out: aliases in a YAML file may stand for billions of values."""
    left = [value]
    for _ in range(MOST_PARTS):
        if not left:
            return True
        part = left.pop()
        if isinstance(part, Mapping):
            left += [*part, *part.values()]
        elif isinstance(part, list | tuple | set):
            left += part
    return False
