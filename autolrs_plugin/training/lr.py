"""Learning rates of an optimizer's groups: set with their ratios kept, and replayed from a schedule.

A rate of the search is that of the first parameter group; every other group keeps its ratio to it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autolrs_plugin.core.config import ConfigError, check_lr_range
from autolrs_plugin.training.checking import named, plain_numbers
from autolrs_plugin.training.inventory import Inventory


def group_ratios(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """Return each group's learning rate divided by the first group's.

    A group's own rate is `initial_lr` where a scheduler has noted one: a scheduler with a warm-up has already set
    `lr` to 0 before the first step.

    Raises:
        ValueError: a group has no rate, or the first one's is 0.
    """
    rates = []
    for index, group in enumerate(optimizer.param_groups):
        rate = group.get("initial_lr", group.get("lr"))
        if rate is None:
            raise ValueError(
                f"optimizer: the lr of param_groups[{index}] is None; an optimizer that sets its own learning rate "
                "(relative_step) cannot be tuned."
            )
        rates.append(float(rate))
    if not rates[0] > 0:
        raise ValueError(
            f"optimizer: the lr of param_groups[0] is {rates[0]:g}; it must be above 0, for the other groups keep "
            "their ratio to it."
        )
    return tuple(rate / rates[0] for rate in rates)


def checked_prior(prior: Any, lr_range: Any) -> float | str | None:
    """Return `prior`, a number as one of Python's.

    Raises:
        ConfigError: it says nothing of a learning rate, or of one outside of `lr_range`; or that is no range.
    """
    plain = plain_numbers({"prior": prior, "lr_range": lr_range})
    low, high = check_lr_range(plain["lr_range"])
    prior = plain["prior"]
    if prior is None or (isinstance(prior, str) and prior == "optimizer"):
        return prior
    if not isinstance(prior, Real) or isinstance(prior, bool) or not float(prior) > 0:
        raise ConfigError(f"prior={prior!r}: must be 'optimizer', a learning rate above 0, or None.")
    if not low <= float(prior) <= high:
        raise ConfigError(
            f"prior={prior!r}: is outside of lr_range=({low:g}, {high:g}); give a rate in it, or None."
        )
    return float(prior)


def prior_lr(prior: float | str | None, optimizer: torch.optim.Optimizer) -> float | None:
    """Return the learning rate that a search begins with: for "optimizer" that of the first group, as it was built.

    Raises:
        ConfigError: the optimizer's is negative or not finite.
    """
    if not isinstance(prior, str):
        return prior
    group = optimizer.param_groups[0]
    rate = float(group.get("initial_lr", group.get("lr")) or 0.0)
    if not (math.isfinite(rate) and rate >= 0):
        raise ConfigError(
            f"optimizer: the learning rate of its first parameter group is {rate:g}; it must be a finite number "
            "of at least 0."
        )
    return rate


class GroupRates:
    """Sets the learning rates of all groups of an optimizer at once, and of the optimizers that it holds.

    A group that is added later keeps the ratio to the first group's rate that it is added with; without a rate of its
    own, it has the rate that the optimizer was built with, and the ratio of that to the first group's then. One that
    takes the place of another with the same parameters, as load_state_dict() makes them, has that one's.

    Attributes:
        ratios: each group's rate divided by the first group's, as found at the start; 0 stays 0.

    Raises:
        ValueError: a group has no rate, or the first one's is 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.ratios = group_ratios(optimizer)
        groups = optimizer.param_groups
        self.look()
        self._first = _rate_of(groups[0])
        # With the groups themselves, for one that a rollback has removed must outlive its id.
        self._known = {id(group): (group, ratio) for group, ratio in zip(groups, self.ratios, strict=True)}
        self._places: dict[tuple[int, int], dict[str, Any]] = {}
        for place, group in self._groups():
            self._known.setdefault(id(group), (group, _rate_of(group) / self._first))
            self._places[place] = group
        self._given: list[tuple[dict[str, Any], Any]] = []
        self._hooks: list[Any] = []
        self._hooked: Any = None
        self._looking = False
        self._expected: dict[tuple[int, int], float] = {}
        self._other: str | None = None
        self._met: dict[int, Any] = {}
        self._stranger: str | None = None

    def look(self) -> None:
        """Find the optimizers that are held now: not for each step, for one that comes amid them is met at its own."""
        self._held = _optimizers_in(self._optimizer)

    def set(self, lr: float) -> None:
        """Give the first group the rate `lr` and the others theirs."""
        groups = list(self._groups())
        for place, group in groups:
            if (ratio := self._ratio_at(place, group)) is None:
                ratio = self._ratio_of_added(group)
            self._known[id(group)] = group, ratio
            self._places[place] = group
        self._given = []
        for _, group in groups:
            _set_rate(group, lr * self._known[id(group)][1])
            self._given.append((group, group["lr"]))

    def are(self, lr: float) -> bool:
        """Tell whether the groups still have the rates that `set` gave them."""
        if self._are_the_very_same():
            return True
        own = id(self._optimizer)
        groups = [(g, self._ratio_at((own, i), g)) for i, g in enumerate(self._optimizer.param_groups)]
        return all(ratio is None or _same_rate(group["lr"], lr * ratio) for group, ratio in groups)

    def _are_the_very_same(self) -> bool:
        """Tell whether there are the groups of the last `set` with the objects that it gave them: nearly always."""
        own, given = self._optimizer.param_groups, self._given
        return len(own) <= len(given) and all(
            group is before and group["lr"] is rate and isinstance(rate, float)
            for group, (before, rate) in zip(own, given, strict=False)
        )

    def _ratio_at(self, place: tuple[int, int], group: dict[str, Any]) -> float | None:
        """Return the ratio of a group, or of the one in whose place it is; None of one that was added."""
        if id(group) in self._known:
            return self._known[id(group)][1]
        before = self._places.get(place)
        if before is None or [id(p) for p in before["params"]] != [id(p) for p in group["params"]]:
            return None
        return self._known[id(before)][1]

    def _ratio_of_added(self, group: dict[str, Any]) -> float:
        rate, built = group["lr"], self._optimizer.defaults.get("lr")
        if isinstance(rate, float) and rate == built:
            return rate / self._first
        return float(rate) / (float(self._optimizer.param_groups[0]["lr"]) or self._first)

    def _meet(self, optimizer: Any, *_: Any) -> None:
        """Look at an optimizer that is about to take a step; nearly always it is known."""
        if not self._looking or torch.compiler.is_compiling() or id(optimizer) in self._met:
            return
        groups = [group for group in _with_rates(optimizer) if id(group) not in self._known]
        if not groups or self._is_around(optimizer):
            self._met[id(optimizer)] = optimizer
            return
        held = _optimizers_in(self._optimizer)
        if any(optimizer is inner for inner in held):
            self._held, self._met[id(optimizer)] = held, optimizer
            for group in groups:
                self._adopt(group, optimizer)
            return
        for group in groups:
            own = self._group_of(group)
            if own is not None and not _same_rate(own["lr"], group["lr"]):
                self._stranger = (
                    f"train_step: takes a step with {named(optimizer)} that AutoLRS was not given, which has weights "
                    f"of the one given and the lr {float(group['lr']):.6g}, where {float(own['lr']):.6g} was set; give "
                    "the one that train_step uses, with all parameters from the beginning (what has no gradient yet "
                    "it leaves alone), or one that holds both."
                )
                return
        if not any(map(self._group_of, groups)):
            self._met[id(optimizer)] = optimizer

    def _is_around(self, optimizer: Any) -> bool:
        """Tell whether an optimizer holds the given one: that one has the rates."""
        return any(inner is self._optimizer for inner in _optimizers_in(optimizer))

    def _group_of(self, group: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the group of the given optimizer that has a parameter of this one."""
        ids = {id(parameter) for parameter in group["params"]}
        own = self._optimizer.param_groups
        return next((g for g in own if any(id(parameter) in ids for parameter in g["params"])), None)

    def _adopt(self, group: dict[str, Any], optimizer: Any) -> None:
        """Give a group of an optimizer that is held only now its rate: it was made at that, or as the given one was."""
        rate, own, built = float(group["lr"]), self._group_of(group), self._optimizer.defaults.get("lr")
        if own is not None and _same_rate(rate, own["lr"]) and id(own) in self._known:
            ratio = self._known[id(own)][1]
        elif built is not None and _same_rate(rate, built):
            ratio = float(built) / self._first
        else:
            self._stranger = (
                f"optimizer: holds {named(optimizer)} since this step, with the lr {rate:.6g}, whose ratio to that of "
                "param_groups[0] nobody knows; make it when the optimizer is made, or at the rate of its groups."
            )
            return
        self._known[id(group)] = group, ratio
        _set_rate(group, float(self._optimizer.param_groups[0]["lr"]) * ratio)

    def watch(self, closely: bool = True) -> None:
        """From now on, see at which rates the optimizers take their steps.

        Args:
            closely: whether to look at rates in tensors of an accelerator, too, which waits for it.
        """
        if self._hooked is not self._held:
            self._hook()
        self._other, self._looking = None, True
        if closely:
            self._met = {}
        self._expected = {
            (id(optimizer), index): float(group["lr"])
            for optimizer in self._all()
            for index, group in enumerate(optimizer.param_groups)
            if group.get("lr") is not None and (closely or _is_at_hand(group["lr"]))
        }

    def unwatch(self) -> None:
        """See no more."""
        self._looking = False
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._hooked = [], None

    def check(self, going_on: bool = False) -> None:
        """Raise RuntimeError if a step since `watch` was taken at another rate than the one set; see no more.

        That of an optimizer that was not given, and trains weights of the one given, counts as well.

        Args:
            going_on: whether `watch` is to follow soon: hooks made anew cost more than what they see.
        """
        self._looking = False
        if not going_on:
            self.unwatch()
        if (wrong := self._stranger or self._other) is not None:
            raise RuntimeError(wrong)

    def _hook(self) -> None:
        self.unwatch()
        self._hooked = self._held
        self._hooks.append(register_optimizer_step_pre_hook(self._meet))
        for optimizer in self._all():
            # A container of others that is no whole Optimizer has none; those inside have.
            if hasattr(optimizer, "_optimizer_step_pre_hooks"):
                self._hooks.append(optimizer.register_step_pre_hook(self._before_step))

    def _all(self) -> Iterable[Any]:
        """Return the optimizer and those inside, each once."""
        return {id(optimizer): optimizer for optimizer in (self._optimizer, *self._held)}.values()

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at the rates as they are used: before the step, or after its closure, which Lightning trains in."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._look(optimizer)
            return None
        looking = partial(self._after_closure, closure, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": looking}
        return (args[0], looking, *args[2:]), kwargs

    def _after_closure(self, closure: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        loss = closure(*args, **kwargs)
        self._look(optimizer)
        return loss

    def _look(self, optimizer: Any) -> None:
        """Note the first rate that is another one than was set."""
        if not self._looking:
            return
        if torch.compiler.is_compiling() or (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        ):
            return  # its rates cannot be read now
        for index, group in enumerate(optimizer.param_groups):
            expected = self._expected.get((id(optimizer), index))
            if self._other is None and expected is not None and float(group["lr"]) != expected:
                self._other = (
                    f"optimizer: the lr of param_groups[{index}] ({type(optimizer).__name__}) was set to "
                    f"{expected:.6g}, and the step was taken at {float(group['lr']):.6g}, which something in it has "
                    "set; leave the rate to AutoLRS: remove the scheduler or the assignment from the step."
                )

    def _groups(self) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        """Yield the groups of the optimizer and of those inside, each once, with their places."""
        seen: set[int] = set()
        for optimizer in self._all():
            for index, group in enumerate(optimizer.param_groups):
                own = optimizer is self._optimizer
                if id(group) not in seen and (own or group.get("lr") is not None):
                    seen.add(id(group))
                    yield (id(optimizer), index), group


def _is_at_hand(rate: Any) -> bool:
    """Tell whether a rate can be read without waiting for an accelerator."""
    return not isinstance(rate, torch.Tensor) or rate.device.type == "cpu"


def _same_rate(one: Any, other: Any) -> bool:
    """Tell whether two rates are the same, of which one may be a tensor of less precision."""
    return math.isclose(float(one), float(other), rel_tol=1e-6)


def _set_rate(group: dict[str, Any], lr: float) -> None:
    # A tensor's identity matters to compiled and captured optimizers, which read it.
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _optimizers_in(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return an optimizer and those that it holds."""
    return list(Inventory({"optimizer": optimizer}, {}, code=False).optimizers.values())


def _with_rates(optimizer: Any) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if group.get("lr") is not None]


def _rate_of(group: Mapping[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


class ReplayLR(LRScheduler):  # type: ignore[misc]  # torch has no types here
    """Plays a list of learning rates, one per step, then stays at the last; groups keep their ratios.

    Args:
        optimizer: its groups' rates now give the ratios.
        lrs: the first group's rate at each step.
        last_epoch: the last step that was played, -1 for none (as in every scheduler of torch).

    Raises:
        ValueError: `lrs` is empty, or a group has no ratio.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, lrs: Sequence[float], last_epoch: int = -1) -> None:
        if not lrs:
            raise ValueError("lrs: is empty; a schedule has at least one step.")
        self.lrs = tuple(float(lr) for lr in lrs)
        self.ratios = group_ratios(optimizer)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """Return each group's rate for the current step."""
        lr = self.lrs[min(self.last_epoch, len(self.lrs) - 1)]
        return [lr * ratio for ratio in self.ratios]


class TunedLR(LRScheduler):  # type: ignore[misc]  # torch has no types here
    """A scheduler whose learning rates come from AutoLRS: for a framework that asks its scheduler for them.

    Args:
        optimizer: its groups' rates now give the ratios.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.ratios = group_ratios(optimizer)
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the rates that the groups have: `step` leaves them alone."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float]:
        """Return the rates in use."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]
