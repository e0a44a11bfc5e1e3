"""AutoLRSConfig: every setting of the search, strict about names, types and ranges."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

MODES = ("staged", "once", "paper", "find")
"""The names of the plans, see `plans`."""

SEARCH_BUDGET = 0.25
"""The steps that a search may take by default, as a fraction of the run's."""

MAX_LR = 1e6
"""A learning rate above this is a mistake in the unit."""


class ConfigError(ValueError):
    """A setting that a user gave and that cannot be used; the message names it, the value and what is valid."""


def is_number(value: object) -> bool:
    """Tell whether a setting is a finite number."""
    # bool is an int to Python, but `search_budget=True` is a mistake.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_int(key: str, value: object, minimum: int) -> None:
    """Raise ConfigError naming `key` if `value` is no whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{key}={value!r}: must be a whole number of at least {minimum}.")


def check_lr_range(value: object) -> tuple[float, float]:
    """Return `value` as (low, high); raise ConfigError if it is no range of positive learning rates."""
    rule = f"must be (low, high) with 0 < low < high <= {MAX_LR:g}"
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(is_number(v) for v in value):
        raise ConfigError(f"lr_range={value!r}: {rule}, two finite numbers.")
    low, high = float(value[0]), float(value[1])
    if low > high:
        raise ConfigError(f"lr_range={value!r}: is reversed; {rule}.")
    if low == high:
        raise ConfigError(f"lr_range={value!r}: is empty; {rule}.")
    if low <= 0 or high > MAX_LR:
        raise ConfigError(f"lr_range={value!r}: {rule}.")
    return low, high


def check_warm_start(value: object) -> tuple[tuple[float, float], ...] | None:
    """Return `value` as points; raise ConfigError if it is neither None nor points of an earlier run."""
    if value is None:
        return None
    rule = "must be (progress, learning rate) pairs from progress 0 on, rising, each rate above 0"
    if not isinstance(value, tuple | list) or not value:
        raise ConfigError(f"warm_start={value!r}: {rule}.")
    points = []
    for point in value:
        if not isinstance(point, tuple | list) or len(point) != 2 or not all(map(is_number, point)):
            raise ConfigError(f"warm_start={value!r}: {rule}.")
        points.append((float(point[0]), float(point[1])))
    progress = [at for at, _ in points]
    if progress[0] != 0 or progress != sorted(set(progress)) or min(lr for _, lr in points) <= 0:
        raise ConfigError(f"warm_start={value!r}: {rule}.")
    return tuple(points)


@dataclass(frozen=True)
class AutoLRSConfig:
    """Settings of one run and of the search for its learning rate.

    Decisions depend on these settings and on the losses alone, never on the clock: the same run twice finds the
    same schedule, and a run that was killed resumes to the same weights.

    Attributes:
        max_steps: training steps of the run itself; what the search takes comes on top.
        lr_range: the lowest and the highest learning rate that may be tried, of the first parameter group.
        search_budget: steps that the search may take, as a fraction of max_steps, in (0, 1]; evaluations that
            serve the search count as `eval_cost_steps` each. The search's share of all steps is below it.
        mode: `staged`; `once` for its search before the first step alone; `paper` for AutoLRS as published (its
            search always takes as many steps as the training: `search_budget` is not read); `find` to search and
            train nothing.
        seed: the seed of the search.
        warmup: fraction of max_steps over which the learning rate rises to its peak, in [0, 0.5].
        final_decay: whether the run ends with a decay to zero.
        validation: whether the run can evaluate a validation loss; without one the training loss decides.
        eval_cost_steps: what one evaluation costs, in training steps. Declared, not measured, so that no decision
            depends on the clock; the ledger holds what was measured.
        parallel_probes: how many learning rates the search asks for at a time. Those of one asking may be probed in
            parallel; each is asked for without knowing what comes of the others, so that in the mode "paper" 1 decides
            best per step. The default mode asks for a whole round at a time, and makes its last one fit this number.
        evaluations: how many times the validation loss is evaluated along the run, the last one at its end.
        rewind: whether steps of the run itself can be taken back. Where a framework owns the loop they cannot, for
            its step count and its data go on: after a divergence such a run goes on at a lower learning rate.
        prior_lr: the learning rate that the optimizer was built with: where the search begins, and what it keeps
            without evidence. None to know none; one outside of `lr_range` is none.
        warm_start: (progress, learning rate) of the plateau of an earlier run, from progress 0 on: it is followed,
            and hardly searched.
        greater_is_better: whether a greater validation value is a better one, as of an accuracy.

    Raises:
        ConfigError: a value of a wrong type or out of range.
    """

    max_steps: int
    lr_range: tuple[float, float]
    search_budget: float = SEARCH_BUDGET
    mode: str = "staged"
    seed: int = 0
    warmup: float = 0.05
    final_decay: bool = True
    validation: bool = True
    eval_cost_steps: float = 2.0
    evaluations: int = 5
    parallel_probes: int = 1
    rewind: bool = True
    prior_lr: float | None = None
    warm_start: tuple[tuple[float, float], ...] | None = None
    greater_is_better: bool = False

    def __post_init__(self) -> None:
        check_int("max_steps", self.max_steps, minimum=1)
        # The one place where a frozen field is set: a list out of JSON becomes the tuple that it was.
        object.__setattr__(self, "lr_range", check_lr_range(self.lr_range))
        if not is_number(self.search_budget) or not 0 < self.search_budget <= 1:
            raise ConfigError(
                f"search_budget={self.search_budget!r}: must be a fraction of max_steps, above 0 and at most 1."
            )
        if self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r}: unknown; valid: {', '.join(MODES)}.")
        check_int("seed", self.seed, minimum=0)
        if not is_number(self.warmup) or not 0 <= self.warmup <= 0.5:
            raise ConfigError(f"warmup={self.warmup!r}: must be a fraction of max_steps from 0 to 0.5.")
        for key in ("final_decay", "validation", "rewind", "greater_is_better"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"{key}={getattr(self, key)!r}: must be True or False.")
        if not is_number(self.eval_cost_steps) or self.eval_cost_steps < 0:
            raise ConfigError(f"eval_cost_steps={self.eval_cost_steps!r}: must be a number of at least 0.")
        check_int("evaluations", self.evaluations, minimum=1)
        check_int("parallel_probes", self.parallel_probes, minimum=1)
        if self.prior_lr is not None and not (is_number(self.prior_lr) and self.prior_lr >= 0):
            raise ConfigError(f"prior_lr={self.prior_lr!r}: must be a learning rate, or None.")
        object.__setattr__(self, "warm_start", check_warm_start(self.warm_start))

    @property
    def starting_lr(self) -> float | None:
        """The learning rate that the run begins with, if one is known: the earlier run's, or the prior in the range."""
        low, high = self.lr_range
        known = self.warm_start[0][1] if self.warm_start else self.prior_lr
        return known if known is not None and low <= known <= high else None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "AutoLRSConfig") -> "AutoLRSConfig":
        """Build a config from plain values; `origin` names their source in errors.

        Raises:
            ConfigError: an unknown or missing key, or a value of a wrong type or out of range.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.6)
                hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(known)}."
                raise ConfigError(f"{origin}: unknown setting {key!r}; {hint}")
        for key in ("max_steps", "lr_range"):
            if key not in values:
                raise ConfigError(f"{origin}: the setting {key!r} is missing.")
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Return the settings as plain values; `from_mapping` takes them back."""
        points = None if self.warm_start is None else [list(point) for point in self.warm_start]
        return {**asdict(self), "lr_range": list(self.lr_range), "warm_start": points}
