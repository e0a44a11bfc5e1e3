"""What of an object is no value that it holds: its class, the order of its items, the memory of a tensor."""

import logging
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from autolrs_plugin.core.actions import Evaluate, Train
from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import (
    PLAN,
    Boom,
    Kind,
    check_as_without_probes,
    everything,
    plainly,
    tuner_of,
)
from tests.autolrs.test_reach import check_held_as_without_probes, drawing

ONES = torch.ones(2)


class Thing:
    def __init__(self, value: float) -> None:
        self.value = value


# Each of these makes what is held, and returns the function that uses it.


def the_order_of_objects() -> Any:
    items = {i: Thing(float(i)) for i in range(5)}
    ordered = OrderedDict(items)
    weak = weakref.WeakValueDictionary(items)

    def use() -> Any:
        first, second, third = next(iter(items)), next(iter(ordered)), next(iter(weak.keys()))
        items[first] = items.pop(first)
        ordered.move_to_end(second)
        weak[third] = weak.pop(third)
        return items[first].value + 3 * ordered[second].value + 7 * third, ONES

    return use


def the_last_item_of_a_dictionary() -> Any:
    items = {i: Thing(float(i)) for i in range(50)}
    return lambda: (items.popitem()[1].value, ONES)


class Tracked(dict):  # type: ignore[type-arg]
    """It counts what is written to it."""

    writes = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        self.writes += 1
        super().__setitem__(key, value)


def a_dictionary_that_counts() -> Any:
    items = Tracked()

    def use() -> Any:
        items["n"] = items.get("n", 0) + 1
        items["thing"] = Thing(1.0)
        return float(items["n"] + 10 * items.writes), ONES

    return use


LATER = 3
"""The step in which some change: the first of the first probe."""


class Warm:
    count = 0

    def value(self) -> float:
        self.count += 1
        if self.count == LATER:
            self.__class__ = Cold  # type: ignore[assignment]
        return 5.0


class Cold:
    def value(self) -> float:
        return 1.0


def the_class_of_an_object() -> Any:
    state = Warm()
    return lambda: (state.value(), ONES)


class Patched:
    def value(self) -> float:
        return 5.0


_value = Patched.value


def a_method_of_a_class() -> Any:
    Patched.value = _value  # type: ignore[method-assign]
    patched, calls = Patched(), [0]

    def use() -> Any:
        value = patched.value()
        calls[0] += 1
        if calls[0] == LATER:
            Patched.value = lambda self: 1.0  # type: ignore[method-assign]
        return value, ONES

    return use


helpers = types.ModuleType("json.helpers_of_a_library")


def a_function_of_a_library() -> Any:
    helpers.__file__ = logging.__file__
    helpers.mean = _first  # type: ignore[attr-defined]
    calls = [0]

    def use() -> Any:
        value = helpers.mean()
        calls[0] += 1
        if calls[0] == LATER:
            helpers.mean = _second  # type: ignore[attr-defined]
        return value, ONES

    return use


def _first() -> float:
    return 5.0


def _second() -> float:
    return 1.0


left = 5.0


def a_variable_that_is_deleted() -> Any:
    globals()["left"] = 5.0
    calls = [0]

    def use() -> Any:
        global left
        try:
            value = left
        except NameError:
            return 1.0, ONES
        calls[0] += 1
        if calls[0] == LATER:
            del left
        return value, ONES

    return use


def tensors_that_swap_their_memory() -> Any:
    one, other, grown = torch.zeros(2), torch.ones(2), torch.zeros(2)
    shares = one[:1]

    def use() -> Any:
        one.data, other.data = other.data, one.data
        one.add_(1)
        grown.resize_(grown.numel() + 1).fill_(grown.numel())
        return float(one[0] * 3 + other[0] + 7 * shares + grown.sum()), ONES

    return use


def tensors_of_inference() -> Any:
    with torch.inference_mode():
        average = torch.zeros(2)
    box: dict[str, torch.Tensor] = {}
    norm = nn.BatchNorm1d(2)

    def use() -> Any:
        with torch.inference_mode():
            average.mul_(0.5).add_(1)
            box.setdefault("made", torch.zeros(2)).add_(1)
            norm.running_mean = norm.running_mean * 0.5 + 1
        return float(average.sum() + box["made"].sum() + norm.running_mean.sum()), ONES

    return use


def a_set_of_tensors() -> Any:
    known, other = torch.ones(1), torch.zeros(1)
    members = {known}

    def use() -> Any:
        value = 5.0 * (known in members) + 2.0 * (other in members)
        members.add(other)
        return value, ONES

    return use


def a_record() -> Any:
    record = np.zeros(3, dtype=[("n", "i8"), ("x", "f4")])[1]
    holder = types.SimpleNamespace(record=record)

    def use() -> Any:
        record["n"] += 1
        return float(record["n"] + 10 * holder.record["n"]), ONES

    return use


def a_long_chain() -> Any:
    first = node = types.SimpleNamespace(next=None, count=0)
    for _ in range(100):
        node.next = types.SimpleNamespace(next=None, count=0)
        node = node.next
    del node

    def use() -> Any:
        last = first
        while last.next is not None:
            last = last.next
        last.count += 1
        return float(last.count), ONES

    return use


class Augmented(torch.utils.data.Dataset):
    """A generator for each of its many items."""

    def __init__(self) -> None:
        self.generators = [np.random.default_rng(i) for i in range(150)]

    def __getitem__(self, index: int) -> float:
        return float(self.generators[index].random())


def generators_of_a_data_set() -> Any:
    data = Augmented()
    return lambda: (5 * data[3], ONES)


USES: list[Callable[[], Any]] = [
    *(the_order_of_objects, the_last_item_of_a_dictionary, a_dictionary_that_counts, the_class_of_an_object),
    *(a_method_of_a_class, a_function_of_a_library, a_variable_that_is_deleted),
    *(tensors_that_swap_their_memory, tensors_of_inference, a_set_of_tensors, a_record, a_long_chain),
    generators_of_a_data_set,
]


@pytest.mark.parametrize("make", USES, ids=lambda make: make.__name__)
def test_the_forms_of_what_a_step_holds_are_as_without_probes(make: Callable[[], Any]) -> None:
    check_held_as_without_probes(make)


def pop_of_a_set() -> Any:
    left_over = set(range(100))
    return lambda: left_over.pop()


def einsum_in_another_order() -> Any:
    def draw() -> None:
        torch.backends.opt_einsum.enabled = not torch.backends.opt_einsum.enabled

    return draw


def flushing_small_numbers() -> Any:
    calls = [0]

    def draw() -> None:
        calls[0] += 1
        torch.set_flush_denormal(calls[0] > 2)

    return draw


def many_generators() -> Any:
    generators = [np.random.default_rng(0) for _ in range(10_050)]
    return lambda: generators[3].random()


NAMED: dict[Callable[[], Any], str] = {
    pop_of_a_set: r"left_over \(a set, by pop\(\)\).*take from a list or a deque",
    einsum_in_another_order: r"torch\.backends\.opt_einsum.*Set it back in train_step",
    flushing_small_numbers: "torch.get_flush_denormal",
    many_generators: r"generators \(a list of 10050 items\)",
}


@pytest.mark.parametrize("make", NAMED, ids=lambda make: make.__name__)
def test_forms_that_cannot_be_set_back_are_named(make: Callable[[], Any]) -> None:
    try:
        with script(PLAN):
            tuner = tuner_of(drawing(make()))
            says = NAMED[make].replace(".*", r".*: was changed by a probe.*", 1)
            with pytest.raises(RuntimeError, match=says):
                tuner.run()
        assert len(tuner.schedule) == 2
    finally:
        torch.backends.opt_einsum.enabled = True
        torch.set_flush_denormal(False)


def test_the_order_of_a_set_that_is_another_one_afterwards_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A set that was large, and is filled again in a smaller table."""
    members = {i for i in range(3_000) if i % 250 == 1}
    for i in range(3_000):
        members.add(i)
    for i in range(3_000):
        if i % 250 != 1:
            members.discard(i)
    if list(members) == list(set(members)):
        pytest.skip("both tables give one order here")
    job = drawing(lambda: members.symmetric_difference_update({1, 7}))
    with script(PLAN), caplog.at_level(logging.WARNING, "autolrs_plugin"):
        tuner_of(job).run()
    (warning,) = [text for text in caplog.messages if "(the order of a set)" in text]
    assert warning.endswith("iterate over sorted(...) where the order matters.")


def swapped(job: Kind, average: list[torch.Tensor]) -> list[torch.Tensor]:
    """Put the memory of an average in the place of the weights'; return that."""
    own = [p.data for p in job.model.parameters()]
    for p, value in zip(job.model.parameters(), average, strict=True):
        p.data = value
    return own


@pytest.mark.parametrize("where", ["step", "validate"])
def test_weights_that_were_swapped_when_an_error_came_are_in_their_own_memory_again(where: str) -> None:
    """As an average of the weights is put in their place, without `finally`."""
    torch.manual_seed(0)
    whole = plainly(Kind())
    torch.manual_seed(0)
    job = Kind()
    average = [2 * p.detach() for p in job.model.parameters()]
    kept, armed = [value.clone() for value in average], [False]

    def swapping(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            own = swapped(job, average)
            loss = Kind.validate(job)
            if armed[0]:
                raise Boom("boom")
            swapped(job, own)
            return function(*args) if where == "step" else loss

        return wrapped

    setattr(job, where, swapping(getattr(job, where)))
    rest = Train(2, (0.05, 0.04, 0.03, 0.02, 0.01))
    with script(PLAN if where == "step" else [Train(0, (0.05, 0.06)), Evaluate(2), Evaluate(2), rest]):
        tuner = tuner_of(job)
    for _ in range(3 if where == "step" else 2):
        tuner.tell(tuner.perform(tuner.next_action()))
    before, armed[0] = everything(job), True
    with pytest.raises(Boom):
        tuner.perform(tuner.next_action())
    armed[0] = False
    assert everything(job) == before
    assert all(torch.equal(a, b) for a, b in zip(average, kept, strict=True))
    tuner.run()
    assert everything(job) == whole
    assert all(torch.equal(a, b) for a, b in zip(average, kept, strict=True))


class Pruned(Kind):
    """Weights become others, of other names, amid the run."""

    count = 0

    def change(self) -> None:
        prune.l1_unstructured(self.model.head, "weight", amount=0.5)

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.count == 3:  # in the first probe, and again in the run
            self.change()
        return super().loss(index)


class Parametrized(Pruned):
    """The module is of another class from then on."""

    def change(self) -> None:
        weight_norm(self.model.head)


class Replaced(Pruned):
    """The optimizer keeps a state of a weight that is in no group any more."""

    def change(self) -> None:
        old, self.model.head = self.model.head, nn.Linear(8, 4)
        with torch.no_grad():
            self.model.head.weight.copy_(old.weight / 2)
            self.model.head.bias.zero_()
        self.optimizer.param_groups[0]["params"] = list(self.model.parameters())


@pytest.mark.parametrize("kind", [Pruned, Parametrized, Replaced], ids=lambda kind: kind.__name__)
def test_weights_that_become_others_are_as_without_probes(kind: type[Kind]) -> None:
    check_as_without_probes(kind)
