"""Plans: the ways in which a run searches and trains, by name. A new one is a file and a line here."""

from collections.abc import Callable

from autolrs_plugin.core.plans.paper import paper_plan
from autolrs_plugin.core.plans.staged import find_plan, once_plan, staged_plan
from autolrs_plugin.core.state import Plan, RunState

PLANS: dict[str, Callable[[RunState], Plan]] = {
    "staged": staged_plan,
    "once": once_plan,
    "paper": paper_plan,
    "find": find_plan,
}
