"""Errors of ours in the engine's loop: logged once per kind, counted always, and never the end of the engine."""

import traceback
from collections import Counter

from vllm_sarathi.engine.vllm.internals import logger

SAID_AT = frozenset(10**n for n in range(1, 12))
"""The counts at which an error of a kind that was logged before is logged again."""


class Faults:
    """Counts the errors of ours, by kind: what was raised, and where."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How many there were."""
        return self.counts.total()

    def note(self, error: Exception) -> None:
        """Count an error; the first of its kind is logged with its traceback."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} at {where.name}:{where.lineno}"
        self.counts[kind] += 1
        count = self.counts[kind]
        if count == 1:
            text = "".join(traceback.format_exception(error))
            logger.error("An error of the plugin; vLLM's own scheduling goes on without it.\n%s", text)
        elif count in SAID_AT:
            logger.error("The plugin has failed %d times by now: %s.", count, kind)
