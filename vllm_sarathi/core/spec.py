"""How a scheduler is named in lists and result files: NAME, or NAME@N with a fixed token budget."""

from typing import NamedTuple

from vllm_sarathi.core.errors import ConfigError


class SchedulerSpec(NamedTuple):
    """A scheduler's name, and its fixed budget.

    Attributes:
        name: of the scheduler.
        token_budget: tokens of a step; None where the name has no @N.
    """

    name: str
    token_budget: int | None = None

    @classmethod
    def parse(cls, text: str) -> "SchedulerSpec":
        """Read NAME or NAME@N; whether there is such a scheduler is for the caller to say.

        Raises:
            ConfigError: a budget that is no whole number of at least 1.
        """
        name, at, budget = text.partition("@")
        if not at:
            return cls(name)
        if not (budget.isascii() and budget.isdigit() and int(budget) >= 1):
            raise ConfigError(
                f"--schedulers {text!r}: the budget after '@' must be a whole number of at least 1 tokens; "
                "a name with a budget must be NAME@N, as in sarathi@512."
            )
        return cls(name, int(budget))
