"""Probes that are decided on together: what the plans announce, and what a cluster makes of it."""

import itertools
import math

import pytest

from autolrs_plugin.benchmark.parallel import Done, makespan, untuned
from autolrs_plugin.core.actions import Action, Evaluate, Probe, Result, Train
from autolrs_plugin.core.config import AutoLRSConfig, ConfigError
from autolrs_plugin.core.controller import Controller
from autolrs_plugin.core.journal import Entry, journal_text, read_text
from autolrs_plugin.core.replay import replay


def answer(action: Action, shift: float = 0.0) -> Result:
    """What a run would answer whose best learning rate is 1e-2."""
    if isinstance(action, Probe | Train):
        level = 1.0 + abs(math.log10(max(action.lrs)) + 2) + shift
        losses = tuple(level + 2.0 * math.exp(-t / 5) for t in range(len(action.lrs)))
        evaluated = isinstance(action, Probe) and action.evaluate
        return Result(losses, val_loss=level if evaluated else None, seconds=0.1)
    return Result(val_loss=1.0 if isinstance(action, Evaluate) else None, seconds=0.1)


def config(mode: str, parallel_probes: int) -> AutoLRSConfig:
    return AutoLRSConfig(400, (1e-6, 1.0), search_budget=0.25, mode=mode, parallel_probes=parallel_probes)


def played(mode: str, parallel_probes: int) -> tuple[Controller, list[tuple[Action, int]]]:
    """Return a controller that has been told a whole run, and each action with how many probes it announced."""
    controller = Controller(config(mode, parallel_probes))
    actions = []
    while not controller.done:
        action = controller.next()
        actions.append((action, len(controller.ahead)))
        controller.tell(answer(action))
    return controller, actions


@pytest.mark.parametrize("mode", ["once", "paper"])
@pytest.mark.parametrize("parallel_probes", [1, 3])
def test_what_is_announced_comes_whatever_the_losses_are(mode: str, parallel_probes: int) -> None:
    """Else a probe that was begun in parallel would have been begun in vain."""
    controller = Controller(config(mode, parallel_probes))
    groups = 0
    while not controller.done:
        ahead = controller.ahead
        groups += len(ahead) > 1
        for i, probe in enumerate(ahead):
            assert controller.next() == probe
            assert controller.ahead == ahead[i:]
            controller.tell(answer(probe, shift=10.0 * i))
        if not ahead:
            controller.tell(answer(controller.next()))
    if parallel_probes > 1:
        assert groups > 0


def test_more_at_a_time_are_fewer_groups_of_as_many_probes() -> None:
    one, three = played("paper", 1)[1], played("paper", 3)[1]
    assert sum(ahead > 0 for _, ahead in one) == sum(ahead > 0 for _, ahead in three)
    # A group ends with a probe that announces none but itself.
    assert sum(ahead == 1 for _, ahead in three) < sum(ahead == 1 for _, ahead in one)


@pytest.mark.parametrize("parallel_probes", [1, 2, 3, 4])
def test_one_search_announces_its_groups_whole(parallel_probes: int) -> None:
    """No probe of a group waits for another, and the first group has one for each prober."""
    ahead = [n for action, n in played("once", parallel_probes)[1] if isinstance(action, Probe)]
    assert ahead[0] == parallel_probes
    assert all(later == now - 1 for now, later in itertools.pairwise(ahead) if now > 1)
    assert ahead[-1] == 1


def test_a_run_goes_on_in_the_midst_of_a_group() -> None:
    controller, entries = Controller(config("once", 3)), []
    while len(controller.ahead) != 2:
        result = answer(controller.next())
        entries.append(Entry(controller.next(), result))
        controller.tell(result)
    journal = read_text(journal_text(controller.config.to_mapping(), {}, entries), "here")
    again = Controller(controller.config)
    assert len(list(replay(journal, again))) == len(entries)
    assert again.ahead == controller.ahead


@pytest.mark.parametrize("bad", [0, 1.5, True, "2"])
def test_the_number_is_checked(bad: object) -> None:
    with pytest.raises(ConfigError, match=r"parallel_probes=.*: must be a whole number of at least 1"):
        AutoLRSConfig(10, (1e-3, 1.0), parallel_probes=bad)  # type: ignore[arg-type]


ACTIONS = [
    Done("Snapshot", 0.5),
    *(Done("Probe", seconds, ahead) for seconds, ahead in ((4.0, 3), (2.0, 2), (2.0, 1), (1.0, 1))),
    Done("Restore", 0.5),
    Done("Train", 10.0),
    Done("Evaluate", 1.0),
]


def test_the_makespan_is_that_of_the_workers() -> None:
    # One worker: all in turn. Two: 4 beside 2 + 2, then 1 alone. Each group is sent a state.
    assert makespan(ACTIONS, 1, 0.25) == pytest.approx(0.5 + 8.0 + 1.0 + 0.5 + 11.0 + 2 * 0.25)
    assert makespan(ACTIONS, 2, 0.25) == pytest.approx(0.5 + 4.0 + 1.0 + 0.5 + 11.0 + 2 * 0.25)
    assert makespan(ACTIONS, 10, 0.0) == pytest.approx(0.5 + 4.0 + 1.0 + 0.5 + 11.0)
    assert untuned(ACTIONS) == 11.0
