"""What the adapters for a framework's loop take alike: checked once, where the user gives it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from autolrs_plugin.core.config import SEARCH_BUDGET, AutoLRSConfig
from autolrs_plugin.training.arguments import check_collections
from autolrs_plugin.training.checking import plain_numbers
from autolrs_plugin.training.earlier import EarlierRun, earlier_run
from autolrs_plugin.training.hosted import hosted_config
from autolrs_plugin.training.inventory import Stateful
from autolrs_plugin.training.lr import checked_prior, prior_lr
from autolrs_plugin.training.ports import Observer
from autolrs_plugin.training.progress import StageLines, StageLog
from autolrs_plugin.training.rng import Generator


class HostedOptions(TypedDict, total=False):
    """The keyword arguments that every adapter for a framework's loop takes.

    Attributes:
        search_budget: the steps that the search may take, as a fraction of the run's, in (0, 1]; 0.25 by default.
        seed: the seed of the search; 0 by default.
        prior: the learning rate to begin with and to keep without evidence: `optimizer` (the default) for the one that
            the optimizer was built with, a number in `lr_range`, or None to know none.
        warm_start: the folder of an earlier run (what `save` wrote, or a `run_dir`), whose learning rates are
            followed and hardly searched for.
        generators: random number generators beside the global ones and the loader's that data or model draw from.
        stateful: more objects to roll back, by name.
        keep: where the state to go back to is kept: `host` memory (the default), `device` or `disk`.
        progress: whether to print a line per search (the default); it is logged (`autolrs_plugin`) without.
        mode: as in AutoLRSConfig, and so are those that follow.
        warmup: fraction of the steps over which the learning rate rises.
        final_decay: whether the run ends with a decay to zero.
        eval_cost_steps: what one evaluation costs, in training steps.
        evaluations: how many times the validation loss is evaluated along the run.
        parallel_probes: how many learning rates the search asks for at a time.
    """

    search_budget: float
    seed: int
    prior: float | str | None
    warm_start: str | os.PathLike[str] | None
    generators: Sequence[Generator]
    stateful: Mapping[str, Stateful] | None
    keep: str
    progress: bool
    mode: str
    warmup: float
    final_decay: bool
    eval_cost_steps: float
    evaluations: int
    parallel_probes: int


@dataclass(frozen=True)
class HostedSettings:
    """The settings of a run in a framework's loop.

    Attributes:
        name: the user's door, for errors.
        values: settings of AutoLRSConfig, as plain values.
        prior: as in HostedOptions, and so are those that follow.
        warm_start: the folder.
        earlier: the run that it holds.
        generators: random number generators.
        stateful: objects to roll back.
        keep: where the kept state is.
        progress: whether lines are printed.
    """

    name: str
    values: Mapping[str, Any]
    prior: float | str | None
    warm_start: str | os.PathLike[str] | None
    earlier: EarlierRun
    generators: tuple[Generator, ...]
    stateful: Mapping[str, Stateful]
    keep: str
    progress: bool

    @classmethod
    def checked(cls, name: str, lr_range: Any, options: HostedOptions) -> "HostedSettings":
        """Return the settings that a user has given.

        Raises:
            ConfigError: one that cannot be used; the message names it.
            ValueError: `progress` is neither True nor False.
            TypeError: `stateful` or `generators` is no such collection.
            JournalError: `warm_start` holds no run.
        """
        rest: dict[str, Any] = {"search_budget": SEARCH_BUDGET, "seed": 0, **options}
        prior, warm_start = rest.pop("prior", "optimizer"), rest.pop("warm_start", None)
        generators, stateful = rest.pop("generators", ()), rest.pop("stateful", None)
        keep, progress = rest.pop("keep", "host"), rest.pop("progress", True)
        check_collections(stateful, generators, (), None, progress)
        values = plain_numbers({"lr_range": lr_range, **rest})
        earlier = earlier_run(warm_start, lr_range)
        hosted_config(name, 1, False, {"warm_start": earlier.plateau, **values})
        prior = checked_prior(prior, lr_range)
        rolled_back = tuple(generators), dict(stateful or {})
        return cls(name, values, prior, warm_start, earlier, *rolled_back, keep, progress)

    def config(self, optimizer: torch.optim.Optimizer, max_steps: int, validation: bool) -> AutoLRSConfig:
        """Return the settings of a run of `max_steps` steps of `optimizer`, with validation or without."""
        known = {
            "prior_lr": prior_lr(self.prior, optimizer),
            "warm_start": self.earlier.plateau_for(optimizer),
        }
        return hosted_config(self.name, max_steps, validation, {**known, **self.values})

    def observer(self) -> Observer:
        """Return who shows the progress."""
        return StageLines() if self.progress else StageLog()

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that give these settings again, generators and objects left out, as plain values."""
        folder = None if self.warm_start is None else os.fspath(self.warm_start)
        own = {"prior": self.prior, "warm_start": folder, "keep": self.keep, "progress": self.progress}
        return {**own, **self.values}


def sign_of(metric: str | None, greater_is_better: bool | None) -> float:
    """Return what makes a metric one that is the smaller the better: 1, or -1 where a greater value is better."""
    greater = not (metric or "loss").endswith("loss") if greater_is_better is None else greater_is_better
    return -1.0 if greater else 1.0
