"""Controller: gives one action at a time, takes its result, and decides what comes next.

A pure state machine: the same settings and the same results give the same actions, so a journal of both is the
whole state of a search. Seconds are booked, never decided by.
"""

import math
import time
from collections.abc import Callable, Iterable

from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.core.config import AutoLRSConfig
from autolrs_plugin.core.ledger import Ledger
from autolrs_plugin.core.plans import PLANS
from autolrs_plugin.core.schedule import Schedule
from autolrs_plugin.core.state import Plan, RunState, Stage


class Controller:
    """Decides a run, action by action.

    Args:
        config: the run's settings.
        plan: where the actions come from; by default the plan of the mode.
    """

    def __init__(self, config: AutoLRSConfig, plan: Callable[[RunState], Plan] | None = None) -> None:
        self.config = config
        self.state = RunState(config)
        self._plan = (plan or PLANS[config.mode])(self.state)
        self._action: Action = next(self._plan)

    @classmethod
    def replayed(cls, config: AutoLRSConfig, results: Iterable[Result]) -> "Controller":
        """Return a controller that has been told these results, in order: how a journal resumes a run."""
        controller = cls(config)
        for result in results:
            controller.tell(result)
        return controller

    def next(self) -> Action:
        """Return the action to carry out now; the same one until its result is told."""
        return self._action

    def tell(self, result: Result) -> None:
        """Take the result of the present action.

        Raises:
            ValueError: the run is complete, or the result does not fit the action.
        """
        action = self._action
        check_result(action, result)
        started = time.perf_counter()
        self.state.observe(action, result)
        self._action = self._plan.send(result)
        leaves_probe = isinstance(self._action, Probe | Restore)
        assert leaves_probe or not self.state.on_probe_weights, f"{self._action} would use a probe's weights"
        self.ledger.deciding_s += time.perf_counter() - started

    @property
    def ahead(self) -> tuple[Probe, ...]:
        """The probes that are next whatever comes of them, the present one first: they may run in parallel."""
        action, ahead = self._action, self.state.ahead
        if not isinstance(action, Probe):
            return ()
        return ahead[ahead.index(action) :] if action in ahead else (action,)

    @property
    def done(self) -> bool:
        """Whether the run is complete."""
        return isinstance(self._action, Done)

    @property
    def step(self) -> int:
        """Real steps taken and kept so far."""
        return self.state.step

    @property
    def ledger(self) -> Ledger:
        """What everything has cost so far."""
        return self.state.ledger

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The searches so far, with their candidates."""
        return tuple(self.state.stages)

    @property
    def schedule(self) -> Schedule:
        """The learning rate of each real step so far."""
        return Schedule(tuple(self.state.lrs))

    @property
    def losses(self) -> tuple[float, ...]:
        """The training loss of each real step so far."""
        return tuple(self.state.losses)

    @property
    def val_losses(self) -> tuple[tuple[int, float], ...]:
        """(real step, validation loss) of each evaluation along the run so far."""
        return tuple(self.state.val_losses)


def check_result(action: Action, result: Result) -> None:
    """Raise ValueError if a result cannot be that of this action."""
    taken = len(result.losses)
    if isinstance(action, Done):
        raise ValueError("the run is complete: there is no action to give a result for.")
    if isinstance(action, Train) and taken != len(action.lrs):
        raise ValueError(f"result.losses: {taken} losses for {len(action.lrs)} training steps.")
    if isinstance(action, Probe) and not result.stopped:
        if not 1 <= taken <= len(action.lrs):
            raise ValueError(f"result.losses: {taken} losses for a probe of {len(action.lrs)} steps.")
        last = result.losses[-1]
        held = math.isfinite(last) and last <= action.abort_above
        if held and taken < len(action.lrs):
            raise ValueError(
                f"result.losses: the probe ended after {taken} of {len(action.lrs)} steps on a loss of {last:g}, "
                f"which is finite and not above {action.abort_above:g}."
            )
        if held and action.evaluate and result.val_loss is None:
            raise ValueError("result.val_loss: is missing; the probe was to be evaluated.")
    if isinstance(action, Evaluate) and result.val_loss is None:
        raise ValueError("result.val_loss: is missing.")
    if isinstance(action, Snapshot | Restore | Evaluate) and taken:
        raise ValueError(f"result.losses: {taken} losses for an action that trains nothing.")
