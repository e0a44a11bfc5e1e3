"""A real controller that follows a list of actions, in place of a search."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from autolrs_plugin.core import plans
from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Restore, Snapshot, Train
from autolrs_plugin.core.state import Plan, RunState

HIGH, LOW = 0.5, 0.01

PROBING: tuple[Action, ...] = (
    Train(0, (0.05, 0.06)),
    Snapshot(),
    Probe(0, 0, (HIGH,) * 4, float("inf"), evaluate=True),
    Probe(0, 1, (LOW,) * 3, float("inf"), evaluate=True, draw=1),
    Restore(),
    Train(2, (0.07, 0.08, 0.09, 0.1)),  # will be taken back, over the end of an epoch
    Restore(),
    Train(2, (0.05, 0.04, 0.03)),
    Evaluate(5),
    Snapshot(),
    Probe(1, 0, (HIGH,) * 2, float("inf"), evaluate=False),
    Restore(),
    Train(5, (0.02, 0.01)),
    Evaluate(7),
)
"""Everything that a controller may ask for; the real steps are those of RATES."""

RATES = (0.05, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01)


@contextmanager
def script(actions: Sequence[Action] = PROBING) -> Iterator[None]:
    """Controllers made inside follow `actions`, then are done."""

    def plan(_: RunState) -> Plan:
        yield from (action for action in actions)  # a generator takes the results that are sent
        yield Done()

    # By the module's name: what tests hold is the job's, and a rollback puts it back.
    with patch.dict(plans.PLANS, {"staged": plan}):
        yield
