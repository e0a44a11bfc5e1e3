"""A run that is resumed has each object where the run had it: what steps have chosen, moved, or made anew."""

import ctypes
import enum
import logging
import multiprocessing
import threading
import types
from collections import deque
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, Kind, everything, plainly, tuner_of
from tests.autolrs.test_reach import held_by

ONES = torch.ones(2)


class Phase(enum.Enum):
    WARM = 5.0
    COOL = 1.0


class Name(enum.StrEnum):
    WARM = "warm"
    COOL = "cool"


class Sides(enum.Flag):
    LEFT = enum.auto()
    RIGHT = enum.auto()


class Thing:
    def __init__(self, value: float) -> None:
        self.value = value


def of(**held: Any) -> Any:
    return types.SimpleNamespace(count=0, **held)


# Each of these makes what is held, and returns the function that uses it.


def numbers_that_are_not_finite() -> Any:
    at = of(
        best=np.full(3, np.inf), last=np.float32("nan"), both=complex("nan+infj"), single=torch.tensor(np.inf),
        kind=np.dtype("f8"),
    )  # fmt: skip

    def use() -> Any:
        at.count += 1
        at.best[at.count % 3], at.last, at.both = at.count, np.float32("inf"), at.both.conjugate()
        at.kind = np.dtype("f4" if at.count > 1 else "f8")
        return float(np.isfinite(at.best).sum() + np.isinf(at.last) + at.kind.itemsize), ONES

    return use


def members_of_enumerations() -> Any:
    at = of(phase=Phase.WARM, name=Name.WARM, sides=Sides.LEFT)

    def use() -> Any:
        at.count += 1
        if at.count == 2:
            at.phase, at.name, at.sides = Phase.COOL, Name.COOL, Sides.LEFT | Sides.RIGHT
        return at.phase.value + (at.name is Name.COOL) + 10 * (Sides.RIGHT in at.sides), ONES

    return use


def values_of_every_kind() -> Any:
    at = of(
        path=Path("a"), day=date(2020, 1, 1), time=datetime(2020, 1, 1, tzinfo=UTC), span=timedelta(0),
        number=Decimal(1), part=Fraction(1, 3),
    )  # fmt: skip

    def use() -> Any:
        at.path, at.day, at.time = at.path / "b", at.day + timedelta(1), at.time + timedelta(hours=1)
        at.span, at.number, at.part = at.span + timedelta(seconds=3), at.number * 2, at.part * 2 + 1
        numbers = (len(at.path.parts), at.day.day, at.time.hour, at.span.seconds, at.number, at.part % 5)
        return sum(map(float, numbers)), ONES

    return use


def memory_and_locks() -> Any:
    """Numbers of C, a record, and a lock that this thread holds."""
    number, shared = ctypes.c_int(0), multiprocessing.Value("i", 0)
    record, lock = np.zeros(3, dtype=[("n", "i8")])[1], threading.Lock()

    def use() -> Any:
        number.value += 1
        shared.value += 2
        record["n"] += 3
        # Beside other threads, which a test before may have left, locks are let be.
        first = threading.active_count() == 1 and lock.acquire(blocking=False)
        return float(number.value + 3 * shared.value + 7 * record["n"] + 5 * first), ONES

    return use


def a_chosen_function() -> Any:
    at = of(use=_high, all=(_high, _low))

    def use() -> Any:
        at.count += 1
        if at.count == 2:
            at.use = _low
        return at.use(), ONES

    return use


def _high() -> float:
    return 5.0


def _low() -> float:
    return 1.0


class Machine:
    """Its state is which of its methods comes next."""

    def __init__(self) -> None:
        self.count = 0
        self.next = self.warm

    def warm(self) -> float:
        self.count += 1
        if self.count == 2:
            self.next = self.cool
        return 5.0

    def cool(self) -> float:
        return 1.0


def a_chosen_method() -> Any:
    machine = Machine()
    return lambda: (machine.next(), ONES)


def chosen_objects() -> Any:
    things = [Thing(1.0), Thing(5.0)]
    at = of(chosen=things[0], all=things)

    def use() -> Any:
        at.count += 1
        at.chosen.value += 1
        at.chosen = things[at.count // 2 % 2]
        return things[0].value + 10 * things[1].value, ONES

    return use


def chosen_containers() -> Any:
    at = of(row=None, mask=None, rows=[[1.0], [5.0]], masks={"a": torch.zeros(2), "b": torch.full((2,), 3.0)})
    at.row, at.mask = at.rows[0], at.masks["a"]

    def use() -> Any:
        at.count += 1
        at.row[0] += 1
        at.row, at.mask = at.rows[at.count // 2 % 2], at.masks["ab"[at.count // 2 % 2]]
        sums = [float(mask.sum()) for mask in at.masks.values()]
        return at.rows[0][0] + 10 * at.rows[1][0] + float(at.mask.sum()) + sums[0] + 7 * sums[1], ONES

    return use


def chosen_modules() -> Any:
    blocks = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    for index, block in enumerate(blocks):
        nn.init.constant_(block.weight, float(index))
    at = of(all=blocks, chosen=[blocks[0]])

    def use() -> Any:
        at.count += 1
        with torch.no_grad():
            at.chosen[0].weight.add_(1)
        at.chosen[0] = blocks[at.count // 2 % 2]
        return float(blocks[0].weight + 10 * blocks[1].weight), ONES

    return use


def turned() -> Any:
    things, queue = [Thing(float(i)) for i in range(6)], deque(Thing(float(i)) for i in range(6))
    items = {str(i): Thing(float(i)) for i in range(6)}

    def use() -> Any:
        things.append(things.pop(0))
        queue.rotate(2)
        first = next(iter(items))
        items[first] = items.pop(first)
        things[0].value += 1
        return things[0].value + 3 * queue[0].value + 7 * items[next(iter(items))].value, ONES

    return use


def new_at_each_step() -> Any:
    """What was there at first is somebody else's as well, and stays."""
    zero = Thing(0.0)
    rows = [torch.zeros(2), torch.ones(2)]
    at = of(last=zero, zero=zero, row=rows[0], rows=rows)

    def use() -> Any:
        at.last = Thing(at.last.value + 1)
        at.row = at.row + 1
        return at.last.value + 10 * at.zero.value + float(at.row.sum() + 7 * at.rows[0].sum()), ONES

    return use


USES: list[Callable[[], Any]] = [
    *(members_of_enumerations, values_of_every_kind, a_chosen_function, a_chosen_method, chosen_objects),
    *(chosen_containers, chosen_modules, turned, new_at_each_step, memory_and_locks),
    numbers_that_are_not_finite,
]


def fresh(make: Callable[[], Any]) -> Kind:
    torch.manual_seed(0)
    return held_by("Job", make())()


def stopped(job: Kind, run_dir: Path, actions: int) -> None:
    with script(PLAN):
        tuner = tuner_of(job, run_dir=run_dir)
    for _ in range(actions):
        tuner.tell(tuner.perform(tuner.next_action()))
    tuner.close()


def check_resumed(make: Callable[[], Any], tmp_path: Path) -> None:
    """See that a run that was stopped in a search, in a probe or between two ends on the bits of a whole one."""
    whole = plainly(fresh(make))
    for actions in (3, 6, 9):
        stopped(fresh(make), tmp_path / str(actions), actions)
        job = fresh(make)
        with script(PLAN):
            tuner_of(job, run_dir=tmp_path / str(actions)).run()
        assert everything(job) == whole


@pytest.mark.parametrize("make", USES, ids=lambda make: make.__name__)
def test_a_run_that_is_resumed_has_each_object_where_it_was(make: Callable[[], Any], tmp_path: Path) -> None:
    check_resumed(make, tmp_path)


@pytest.mark.parametrize("make", USES, ids=lambda make: make.__name__)
def test_a_state_that_is_kept_on_disk_has_each_object_where_it_was(make: Callable[[], Any]) -> None:
    whole, job = plainly(fresh(make)), fresh(make)
    with script(PLAN):
        tuner_of(job, keep="disk").run()
    assert everything(job) == whole


def test_a_dictionary_to_which_a_step_gives_attributes_is_named(tmp_path: Path) -> None:
    def make() -> Any:
        items = Tracked()

        def use() -> Any:
            items["n"] = items.get("n", 0) + 1
            return float(items["n"] + 10 * items.writes), ONES

        return use

    stopped(fresh(make), tmp_path, 1)
    with script(PLAN), pytest.raises(ValueError, match=r"run_dir: .*items.* \(a Tracked\)"):
        tuner_of(fresh(make), run_dir=tmp_path)


def another_function() -> Any:
    at = of(use=_high)

    def use() -> Any:
        at.use = lambda: 1.0
        return at.use(), ONES

    return use


def a_moving_view() -> Any:
    row = torch.arange(10.0)
    at = of(row=row, view=row[:3])

    def use() -> Any:
        at.count += 1
        at.view.add_(at.count)
        at.view = at.row[at.count : at.count + 3]
        return float(at.row.sum()), ONES

    return use


class Warm:
    def value(self) -> float:
        self.__class__ = Cold  # type: ignore[assignment]
        return 5.0


class Cold:
    def value(self) -> float:
        return 1.0


def another_class() -> Any:
    at = of(state=Warm())
    return lambda: (at.state.value(), ONES)


def another_member_of_a_set() -> Any:
    one, other = Thing(1.0), Thing(2.0)
    members = {one}

    def use() -> Any:
        members.add(other)
        return float(len(members)), ONES

    return use


class Tracked(dict):  # type: ignore[type-arg]
    writes = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        self.writes += 1
        super().__setitem__(key, value)


NOWHERE = {
    another_member_of_a_set: r"members\.members \(a set of other objects than at first\)",
    another_class: r"at\.state\.class \(a Cold, and was one of Warm\)",
    another_function: r"at\.use \(a function in the place of a function\)",
    a_moving_view: r"at\.view \(a tensor in the memory of another one\)",
}


@pytest.mark.parametrize("make", NOWHERE, ids=lambda make: make.__name__)
def test_what_no_other_process_has_is_named_and_a_resume_refused(
    make: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "autolrs_plugin"):
        stopped(fresh(make), tmp_path, 1)
    assert [text for text in caplog.messages if text.startswith("run_dir: steps have made")]
    with script(PLAN), pytest.raises(ValueError, match=rf"{NOWHERE[make]}, which is not in this process"):
        tuner_of(fresh(make), run_dir=tmp_path)
    whole, job = plainly(fresh(make)), fresh(make)
    with script(PLAN):
        tuner_of(job, keep="disk").run()
    assert everything(job) == whole
