"""State wherever Python can hold it, reached from the step alone: after a probe it is as it was, or it is named."""

import array
import contextvars
import csv
import functools
import gc
import importlib.util
import io
import itertools
import logging
import queue
import random
import sys
import threading
import time
import types
import weakref
from argparse import Namespace
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Action, Probe, Restore, Snapshot, Train
from autolrs_plugin.training.inventory import Inventory
from autolrs_plugin.training.watched import position
from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, Kind, check_as_without_probes, everything, plainly, tuner_of


class Held(Kind):
    """A number and a tensor somewhere: `use` counts the one, adds to the other, and returns both."""

    def use(self) -> tuple[float, torch.Tensor]:
        raise NotImplementedError

    def prepare(self) -> None:
        self.drawn: list[Any] = []
        self.step = self.made_step()  # type: ignore[method-assign, assignment]

    def made_step(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a step that uses what is held; the job itself has none of it."""
        use, model, plain = self.use, self.model, functools.partial(Kind.step, self)

        def step(index: torch.Tensor) -> torch.Tensor:
            loss = plain(index)
            count, tensor = use()
            with torch.no_grad():
                model.head.bias.add_(tensor.float().sum() * count, alpha=1e-4)
            return loss

        return step


def held_by(name: str, use: Callable[[], tuple[float, torch.Tensor]]) -> type[Held]:
    return type(name, (Held,), {"use": staticmethod(use)})


# Each of these makes what is held, and returns the function that uses it.


def check_held_as_without_probes(make: Callable[[], Any]) -> None:
    """See that a job that holds something ends as it does without a search."""

    def trained(run: Callable[[Kind], Any]) -> dict[str, Any]:
        torch.manual_seed(0)
        return run(held_by("Job", make())())

    def searched(job: Kind) -> Any:
        with script(PLAN):
            tuner = tuner_of(job)
            tuner.run()
        assert tuner.ledger.search.steps == 11
        return everything(job)

    assert trained(searched) == trained(plainly)


def default_arguments() -> Any:
    def use(
        memory: torch.Tensor = torch.zeros(2),  # noqa: B008
        calls: list[int] = [0],  # noqa: B006
        *,
        named: dict[str, Any] = {"n": 0},  # noqa: B006
    ) -> Any:
        memory.add_(1)
        calls[0] += 1
        named["n"] += 1
        return calls[0] + named["n"], memory

    return use


def attributes_of_a_function() -> Any:
    def use() -> Any:
        use.count += 1  # type: ignore[attr-defined]
        use.memory = use.memory + 1  # type: ignore[attr-defined]
        use.__dict__.setdefault("made", []).append(use.count)  # type: ignore[attr-defined]
        return use.count + len(use.made), use.memory  # type: ignore[attr-defined]

    use.count, use.memory = 0, torch.zeros(2)  # type: ignore[attr-defined]
    return use


class Counted:
    """State in the class, and in a base of it."""

    count = 0
    memory = torch.zeros(2)

    @classmethod
    def use(cls) -> Any:
        cls.count += 1
        Counted.memory = Counted.memory + 1
        cls.made = getattr(cls, "made", 0) + 1  # type: ignore[attr-defined]
        return cls.count + cls.made, cls.memory  # type: ignore[attr-defined]


def attributes_of_a_class() -> Any:
    kind: Any = type("Inherited", (Counted,), {"__module__": __name__})
    Counted.count, Counted.memory = 0, torch.zeros(2)
    return lambda: kind.use()


def attributes_of_a_class_through_an_object() -> Any:
    class Memory:
        bank: ClassVar[list[torch.Tensor]] = [torch.zeros(2)]
        seen = 0

        def __call__(self) -> Any:
            type(self).seen += 1
            self.bank[0].add_(self.seen)
            return self.seen, self.bank[0]

    return Memory()


def weak_keys() -> Any:
    owners = [nn.Linear(1, 1), nn.Linear(1, 1)]
    table: Any = weakref.WeakKeyDictionary({owners[0]: torch.zeros(2)})

    def use() -> Any:
        table[owners[0]].add_(1)
        table[owners[1]] = table.get(owners[1], 0) + 1
        return table[owners[1]], table[owners[0]]

    return use


def weak_values() -> Any:
    first, second = torch.zeros(2), torch.ones(2)
    table: Any = weakref.WeakValueDictionary({"now": first})

    def use() -> Any:
        first.add_(1)
        table["now"] = second if table["now"] is first else first
        return len(table), table["now"]

    return use


def variables_of_a_module() -> Any:
    """A module of the user's own: one function sets a global, another reads it."""
    module = types.ModuleType("tests.autolrs.users_own")
    module.__file__ = __file__
    sys.modules[module.__name__] = module
    code = """
import torch
count, memory = 0, torch.zeros(2)
def change():
    global count, memory, made
    count += 1
    memory = memory + count
    made = globals().get("made", 0) + 1
def use():
    change()
    return count + made, memory
"""
    exec(code, vars(module))
    return module.use


def through_the_name_of_a_module() -> Any:
    variables_of_a_module()
    namespace: dict[str, Any] = {
        "__name__": "no_module_of_this_name",
        "own": sys.modules["tests.autolrs.users_own"],
    }
    exec(
        "def use():\n    own.count += 1\n    own.memory.add_(1)\n    return own.count, own.memory", namespace
    )
    return namespace["use"]


def rebound_in_a_closure() -> Any:
    count, memory = 0, torch.zeros(2)

    def use() -> Any:
        nonlocal count, memory
        count += 1
        memory = memory + count
        return count, memory

    return use


def numbers_in_a_dict() -> Any:
    state = {"step": 0, "mean": 0.0}

    def use() -> Any:
        state["step"] += 1
        state["mean"] = 0.9 * state["mean"] + 1
        return state["step"], torch.tensor(state["mean"])

    return use


def beside_other_things() -> Any:
    """Plain values in containers that hold objects, too."""
    state: dict[str, Any] = {"model": nn.Linear(1, 1), "memory": torch.zeros(2), "n": 0}
    pair = nn.Linear(1, 1), torch.zeros(2)
    row: list[Any] = [print, 0, {"x": [torch.zeros(2), print]}]

    def use() -> Any:
        state["n"] += 1
        state["memory"] = state["memory"] + 1
        state[f"made {state['n']}"] = print
        pair[1].add_(1)
        row[1] += 1
        row[2]["x"][0].add_(1)
        row.append(print)
        return state["n"] + len(state) + len(row), state["memory"] + pair[1] + row[2]["x"][0]

    return use


def by_parameters() -> Any:
    model = nn.Linear(2, 2)
    averages = {p: p.detach().clone() for p in model.parameters()}

    def use() -> Any:
        for p in averages:
            averages[p] = averages[p] * 0.9 + 1
        return 1, sum(a.sum() for a in averages.values())

    return use


class Thing:
    def __init__(self, n: int) -> None:
        self.n = n


def in_a_set() -> Any:
    things = [Thing(i) for i in range(3)]
    seen = {things[0]}

    def use() -> Any:
        seen.add(things[len(seen) % 3])
        for thing in seen:
            thing.n += 1
        return len(seen), torch.tensor([thing.n for thing in things])

    return use


def partial_arguments() -> Any:
    def add(memory: torch.Tensor, box: list[Any], named: Any = None) -> Any:
        memory.add_(1)
        box[0] += 1
        named.add_(1)
        return box[0], memory + named

    return functools.partial(add, torch.zeros(2), [0], named=torch.zeros(2))


def bound_methods_of_built_ins() -> Any:
    memory = torch.zeros(2)
    add, push = memory.add_, deque[Any](maxlen=3).append

    def use() -> Any:
        push(add(1))
        return len(push.__self__), memory  # type: ignore[attr-defined]

    del memory
    memory = add.__self__
    return use


@dataclass(slots=True)
class Slotted:
    __private: int = 0
    memory: torch.Tensor = field(default_factory=lambda: torch.zeros(2))

    def use(self) -> Any:
        self.__private += 1
        self.memory = self.memory + 1
        return self.__private, self.memory


@dataclass(frozen=True)
class Frozen:
    inner: dict[str, Any] = field(default_factory=lambda: {"n": 0, "memory": torch.zeros(2)})

    def use(self) -> Any:
        self.inner["n"] += 1
        self.inner["memory"].add_(1)
        return self.inner["n"], self.inner["memory"]


def data_classes() -> Any:
    slotted, frozen = Slotted(), Frozen()

    def use() -> Any:
        (a, b), (c, d) = slotted.use(), frozen.use()
        return a + c, b + d

    return use


def name_spaces() -> Any:
    one, two, three, local = (
        types.SimpleNamespace(n=0),
        Namespace(memory=torch.zeros(2)),
        UserDict(n=0),
        threading.local(),
    )
    waiting: queue.Queue[int] = queue.Queue()
    left = threading.Semaphore(100)
    local.n = 0

    def use() -> Any:
        one.n += 1
        two.memory = two.memory + 1
        three["n"] += 1
        local.n += 1
        waiting.put(1)
        left.acquire()
        return one.n + three["n"] + local.n + waiting.qsize() + left._value, two.memory

    return use


def context_variables() -> Any:
    count = contextvars.ContextVar[int]("count")
    count.set(0)

    def use() -> Any:
        count.set(count.get() + 1)
        return count.get(), torch.ones(1)

    return use


def containers_of_every_type() -> Any:
    window: deque[Any] = deque([0], maxlen=4)
    groups: Any = defaultdict(lambda: torch.zeros(2))
    counts, order = Counter({"a": 1}), OrderedDict(a=1)
    raw, numbers = bytearray(4), array.array("d", [0.0])
    members = {1}

    def use() -> Any:
        window.append(window[-1] + 1)
        groups[window[-1] % 3].add_(1)
        counts["a"] += 1
        order.setdefault("b", 0)
        order.move_to_end("a")
        raw[0] += 1
        numbers[0] += 1
        members.add(len(members) + 1)
        return sum(window) + counts["a"] + raw[0] + numbers[0] + len(members), sum(groups.values())

    return use


def generators_of_every_kind() -> Any:
    owned = nn.Linear(1, 1)
    owned.own = torch.Generator().manual_seed(1)
    numpys, old, pythons = np.random.default_rng(1), np.random.RandomState(1), random.Random(1)

    def use() -> Any:
        number = numpys.random() + old.rand() + pythons.random()
        return number, torch.rand(2, generator=owned.own)

    return use


def cached_results() -> Any:
    """A cache of random numbers: what a probe has cached, a real step would draw anew."""

    @functools.cache
    def noise(i: int) -> torch.Tensor:
        return torch.rand(2)

    @functools.lru_cache(maxsize=32)
    def others(i: int, scale: float = 1.0) -> Any:
        return [torch.rand(2) * scale]

    state = {"n": 0}
    noise(0), others(0, scale=2.0)

    def use() -> Any:
        state["n"] += 1
        noise(0).add_(1)
        others(0, scale=2.0)[0].add_(1)
        return state["n"], noise(state["n"]) + noise(0) + others(state["n"])[0] + others(0, scale=2.0)[0]

    return use


def attributes_of_parameters() -> Any:
    model = nn.Linear(2, 2)
    model.weight.average = torch.zeros(2)

    def use() -> Any:
        model.weight.average = model.weight.average + 1
        model.bias.seen = getattr(model.bias, "seen", 0) + 1
        return model.bias.seen, model.weight.average

    return use


class Forgetful:
    """Its state_dict() has a part of its state."""

    def __init__(self) -> None:
        self.told, self.count, self.memory = 0, 0, torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"told": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.told = state["told"]

    def __call__(self) -> Any:
        self.told, self.count, self.memory = self.told + 1, self.count + 1, self.memory + 1
        return self.told + self.count, self.memory


def parameters_of_no_module() -> Any:
    average = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1), requires_grad=False)]
    by_name = {"copy": nn.Parameter(torch.zeros(1))}

    def use() -> Any:
        with torch.no_grad():
            for parameter in (*average, by_name["copy"]):
                parameter.add_(1)
        return float(by_name["copy"].detach()), torch.cat([p.detach() for p in average])

    return use


def variables_of_a_module_in_a_package() -> Any:
    package, inner = types.ModuleType("package_of_ours"), types.ModuleType("package_of_ours.inner")
    package.__file__ = inner.__file__ = "package_of_ours.py"
    package.inner, inner.count, inner.table = inner, 0, {"n": torch.zeros(2)}  # type: ignore[attr-defined]
    code = """
def use():
    package_of_ours.inner.count += 1
    package_of_ours.inner.table["n"] = package_of_ours.inner.table["n"] + 1
    return package_of_ours.inner.count, package_of_ours.inner.table["n"]
"""
    variables: dict[str, Any] = {"package_of_ours": package, "__name__": "a_script_of_ours"}
    exec(compile(code, "a_script_of_ours.py", "exec"), variables)
    return variables["use"]


def beside_tensors_that_are_not_dense() -> Any:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    inert = [torch.eye(2).to_sparse(), torch.empty(2, device="meta"), nested]
    memory = torch.zeros(2)

    def use() -> Any:
        memory.add_(1)
        return float(len(inert)), torch.sparse.mm(inert[0], memory[:, None])[:, 0]

    return use


def counts() -> Any:
    """Of every kind, at every kind of place; one of them at two."""
    twice = itertools.count(7)
    held: dict[str, Any] = {"steps": itertools.count(0, 3), "list": [itertools.count(0.5, 0.25), twice]}

    class Numbered:
        numbers = itertools.count(-2, 1j)

    def use(numbers: Iterator[int] = itertools.count()) -> Any:  # noqa: B008
        drawn = next(held["steps"]) + next(held["list"][0]) + next(twice) + next(held["list"][1])
        return float(drawn + next(numbers) + abs(next(Numbered.numbers))), torch.ones(2)

    return use


def histories() -> Any:
    """Lists that grow, and that a step looks at: by itself, through another function, and where it is built up."""
    norms: list[float] = []
    losses: list[float] = []
    sums: list[float] = []

    def median() -> float:
        return sorted(losses)[len(losses) // 2]

    def use() -> Any:
        nonlocal sums
        limit = max(norms[-3:]) if norms else 1.0
        norms.append(limit + 0.5)
        losses.append(float(len(norms) % 3))
        sums += [limit]
        return limit + median() + sums[-1], torch.ones(2)

    return use


USES: list[Callable[[], Any]] = [
    *(counts, histories),
    *(parameters_of_no_module, variables_of_a_module_in_a_package, beside_tensors_that_are_not_dense),
    *(default_arguments, attributes_of_a_function, attributes_of_a_class),
    *(attributes_of_a_class_through_an_object, weak_keys, weak_values, variables_of_a_module),
    *(
        through_the_name_of_a_module,
        rebound_in_a_closure,
        numbers_in_a_dict,
        beside_other_things,
        by_parameters,
    ),
    *(in_a_set, partial_arguments, bound_methods_of_built_ins, data_classes, name_spaces, context_variables),
    *(
        containers_of_every_type,
        generators_of_every_kind,
        cached_results,
        attributes_of_parameters,
        Forgetful,
    ),
]


@pytest.mark.parametrize("make", USES, ids=lambda make: make.__name__)
def test_what_a_step_holds_anywhere_is_as_without_probes(make: Callable[[], Any]) -> None:
    def trained(search: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        job = held_by("Job", make())()
        if not search:
            return plainly(job)
        calls = job.step
        taken: list[int] = []

        def step(index: torch.Tensor) -> torch.Tensor:
            taken.append(1)
            return calls(index)

        job.step = step  # type: ignore[method-assign]
        with script(PLAN):
            tuner_of(job).run()
        assert len(taken) == 7 + 11  # the probes took place
        return everything(job)

    assert trained(search=True) == trained(search=False)


class Scheduled(Kind):
    """A scheduler that drives the groups of another optimizer: they are reached through it alone."""

    def prepare(self) -> None:
        other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.StepLR(other, 2, gamma=0.5)
        self.options = {"scheduler": self.scheduler}

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        driven = self.scheduler.optimizer
        for p in driven.param_groups[0]["params"]:
            p.grad = torch.ones(2)
            self.model.head.bias.data += 1e-3 * driven.param_groups[0]["lr"] * p.detach().sum()
        driven.step()
        self.scheduler.step()

    def seen(self) -> Any:
        driven = self.scheduler.optimizer
        return driven.param_groups[0]["lr"], driven.param_groups[0]["params"], list(driven.state.values())


class ScheduledByALambda(Scheduled):
    """The same, reached from the step, with state in the function that gives the rate."""

    def prepare(self) -> None:
        super().prepare()
        calls = {"n": 0}

        def rate(epoch: int) -> float:
            calls["n"] += 1
            return 1.0 / calls["n"]

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.scheduler.optimizer, rate)
        self.options = {}


class Hooked(Kind):
    """State that hooks alone hold: of modules, parameters and the optimizer; one is added and removed on the way."""

    def prepare(self) -> None:
        def hook(name: str) -> Callable[..., None]:
            state = {"n": 0, "mean": torch.zeros(())}

            def called(*args: Any) -> None:
                state["n"] += 1
                state["mean"] = 0.9 * state["mean"] + state["n"]
                with torch.no_grad():
                    self.model.head.bias.add_(state["mean"], alpha=1e-5)

            return called

        class Bound:
            def __init__(self, model: nn.Module) -> None:
                self.count, self.model = 0, model

            def called(self, *args: Any) -> None:
                self.count += 1
                self.model.head.bias.data.add_(self.count, alpha=1e-5)

        body = self.model.body
        body.register_forward_hook(hook("forward"))
        body.register_forward_pre_hook(Bound(self.model).called)
        body.register_full_backward_hook(hook("backward"))
        body.weight.register_hook(hook("gradient"))
        self.model.norm.weight.register_post_accumulate_grad_hook(hook("accumulated"))
        self.optimizer.register_step_post_hook(functools.partial(hook("step")))
        self.optimizer.register_step_pre_hook(Bound(self.model).called)
        body.bias.register_hook(torch.utils.hooks.warn_if_has_hooks)  # a library's: it has no state
        self.added = hook("added")

    def validate(self) -> float:
        """Hooks that change weights would do so here, too."""
        return 1.0

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.model.head.register_forward_hook(self.added)
        self.model.head.weight.register_hook(self.added)

    def seen(self) -> Any:
        return len(self.model.head._forward_hooks), len(self.model.head.weight._backward_hooks or ())


class OfAClass(Kind):
    """State in the class of a module, and of an optimizer; a method uses a variable that nobody else does."""

    def prepare(self) -> None:
        memory = {"bank": torch.zeros(4)}

        class Own(type(self.model)):  # type: ignore[misc]
            calls, last = 0, torch.zeros(4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                out: torch.Tensor = (
                    super().forward(x) + type(self).last / (1 + type(self).calls) + memory["bank"]
                )
                if self.training and torch.is_grad_enabled():
                    type(self).calls += 1
                    type(self).last = out.detach().mean(0)
                    memory["bank"].add_(0.01)
                return out

        self.model = Own()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.kind = Own

    def seen(self) -> Any:
        return self.kind.calls, self.kind.last


class Changed(Kind):
    """Data that the step changes in place."""

    def seen(self) -> Any:
        return self.data

    def step(self, index: torch.Tensor) -> torch.Tensor:
        loss = super().step(index)
        index.add_(1).remainder_(64)
        return loss


@pytest.mark.parametrize(
    "kind", [Scheduled, ScheduledByALambda, Hooked, OfAClass], ids=lambda kind: kind.__name__
)
def test_what_schedulers_hooks_and_classes_hold_is_as_without_probes(kind: type[Kind]) -> None:
    check_as_without_probes(kind)


def test_an_optimizer_that_a_hook_steps_keeps_its_own_rate() -> None:
    job = Kind()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.3)
    job.optimizer.register_step_post_hook(lambda *args: other.step())
    job.optimizer.remembered = lambda: other
    with script(PLAN):
        tuner_of(job).run()
    assert other.param_groups[0]["lr"] == 0.3
    assert job.rates() == pytest.approx([0.01])


def drawing(draw: Callable[[], Any]) -> Kind:
    job = Kind()
    plain = job.step

    def step(index: torch.Tensor) -> torch.Tensor:
        draw()
        return plain(index)

    job.step = step  # type: ignore[method-assign]
    return job


def cycled() -> Any:
    source = itertools.cycle([1, 2, 3])
    for _ in range(4):
        next(source)  # it goes by its own memory now
    return lambda: next(source)


def through_a_method() -> Any:
    return iter(range(100)).__next__


def nested() -> Any:
    def inner() -> Iterator[int]:
        yield from itertools.repeat(1, 100)

    source = (x for x in inner())
    return lambda: next(source)


def delegated() -> Any:
    def outer() -> Iterator[int]:
        yield from itertools.chain([1] * 50, [1] * 50)

    source = outer()
    return lambda: next(source)


def lines_of_a_file(tmp_path: Path) -> Any:
    path = tmp_path / "lines"
    path.write_text("a\n" * 100)
    file = path.open()
    return lambda: next(file)


def rows_of_a_table() -> Any:
    rows = csv.reader(io.StringIO("a,b\n" * 100))
    return lambda: next(rows)


def zipped() -> Any:
    pairs = zip(itertools.repeat(1), range(100), strict=False)
    return lambda: next(pairs)


def teed() -> Any:
    a, b = itertools.tee(iter([1] * 100))
    return lambda: (next(a), next(b))


class Library:
    """Stands for an iterator of a library's, such as a bar around another one."""

    __module__ = "numpy"

    def __init__(self, inner: Iterator[int]) -> None:
        self.inner = inner

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> int:
        return next(self.inner)


def wrapped() -> Any:
    bar = Library(iter([1] * 100))
    return lambda: next(bar)


def spawning() -> Any:
    generator = np.random.default_rng(0)
    return lambda: generator.spawn(1)


def evicting() -> Any:
    @functools.lru_cache(maxsize=2)
    def square(i: int) -> int:
        return i * i

    numbers = {"n": 0}
    square(-1), square(-2)

    def draw() -> None:
        numbers["n"] += 1
        square(numbers["n"])

    return draw


def switching() -> Any:
    return lambda: torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())


def once() -> Any:
    unset = contextvars.ContextVar[int]("unset")
    calls = {"n": 0}

    def draw() -> None:
        calls["n"] += 1
        if calls["n"] > 2:
            unset.set(1)

    return draw


NAMED: dict[Callable[..., Any], str] = {
    cycled: r"source \(a cycle\)",
    through_a_method: r"\(a range_iterator\)",
    nested: r"source \(a generator\)",
    delegated: r"source \(a generator\)",
    lines_of_a_file: r"file \(a TextIOWrapper\)",
    rows_of_a_table: r"rows \(a _csv.reader\)|rows \(a reader\)",
    zipped: r"pairs \(a zip\)",
    teed: r"a \(a _tee\)",
    wrapped: r"bar \(a Library\)",
    spawning: r"generator \(its spawned generators\)",
    evicting: r"square \(a cache\)",
    switching: r"torch.are_deterministic_algorithms_enabled\(\)",
    once: r"unset.value",
}


@pytest.mark.parametrize("make", NAMED, ids=lambda make: make.__name__)
def test_what_cannot_be_set_back_is_named_before_the_run_goes_on(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    job = drawing(make(tmp_path) if make is lines_of_a_file else make())
    try:
        with script(PLAN):
            tuner = tuner_of(job)
            with pytest.raises(RuntimeError, match=rf"{NAMED[make]}.*: was changed by a probe"):
                tuner.run()
        assert len(tuner.schedule) == 2
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_only_a_later_probe_draws_is_named_then() -> None:
    numbers, calls = iter(range(100)), {"n": 0}

    def draw() -> None:
        calls["n"] += 1
        if calls["n"] == 2 + 5:  # the fifth step of the second probe: the first has four
            next(numbers)

    with script(PLAN):
        tuner = tuner_of(drawing(draw))
        with pytest.raises(RuntimeError, match=r"numbers \(a range_iterator\): was changed by a probe"):
            tuner.run()
    assert len(tuner.schedule) == 2
    assert len(tuner.stages) == 0


def test_what_only_a_later_probe_changes_is_named_before_training_goes_on() -> None:
    table, calls = {i: torch.zeros(1) for i in range(12_000)}, {"n": 0}

    def draw() -> None:
        calls["n"] += 1
        if calls["n"] == 2 + 5:
            table[7] += 1  # in place: who is in the table is set back, what is in them is not

    with script(PLAN):
        tuner = tuner_of(drawing(draw))
        with pytest.raises(RuntimeError, match=r"table \(a dict of 12000 items\): was changed by a probe"):
            tuner.run()
    assert len(tuner.schedule) == 2


def test_data_that_a_step_changes_in_place_is_named_where_nothing_else_holds_it() -> None:
    """A job that holds it, as an attribute, has it put back."""
    whole, job = plainly(Changed()), Changed()
    with script(PLAN):
        tuner_of(job).run()
    assert everything(job) == whole
    job = Changed()
    data, job.data = job.data, None
    with script(PLAN):
        tuner = AutoLRS(
            job.model,
            job.optimizer,
            max_steps=7,
            lr_range=(1e-3, 1.0),
            train_step=job.step,
            train_data=data,
            validate=job.validate,
            progress=False,
        )
        with pytest.raises(RuntimeError, match=r"train_data \(a list of 4 items\): was changed by a probe"):
            tuner.run()


def test_a_log_stays_and_an_iterator_at_rest_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    losses: list[float] = []
    written: list[Path] = []
    totals: list[float] = []
    untouched = itertools.cycle([1, 2])

    def draw() -> None:
        nonlocal totals
        totals += [1.0]
        losses.append(1.0)
        written.append(Path("checkpoint"))
        assert untouched is not None

    with script(PLAN), caplog.at_level(logging.WARNING, "autolrs_plugin"):
        tuner_of(drawing(draw)).run()
    assert len(losses) == len(written) == len(totals) == 7 + 11
    assert "losses (a list that grows)" in caplog.text
    assert "written (a list that grows)" in caplog.text


def test_a_script_that_is_in_no_module_is_the_users(tmp_path: Path) -> None:
    """As a notebook, or a file that is loaded by its path, and stands in no list of modules."""
    path = tmp_path / "job.py"
    path.write_text(
        """
import torch
memory = torch.zeros(2)
class Own:
    count = 0
    def use(self):
        type(self).count += 1
        memory.add_(1)
        return self.count, memory
own = Own()
def use():
    return own.use()
"""
    )
    spec = importlib.util.spec_from_file_location("job_of_no_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def trained(run: Callable[[Held], Any]) -> Any:
        module.memory.zero_()
        module.Own.count = 0
        return run(held_by("Job", module.use)())

    def searched(job: Held) -> Any:
        with script(PLAN):
            tuner_of(job).run()
        return everything(job)

    assert trained(searched) == trained(plainly)


def test_what_was_held_under_a_key_of_the_earlier_process_is_named_at_a_resume(tmp_path: Path) -> None:
    plan: tuple[Action, ...] = (
        *(Train(0, (0.1, 0.1)), Snapshot(), Probe(0, 0, (0.1,), float("inf"), evaluate=False), Restore()),
        Train(2, (0.1, 0.1)),
    )

    class Lazily(Kind):
        def prepare(self) -> None:
            self.table: Any = weakref.WeakKeyDictionary()

        def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
            self.table[self.model] = self.table.get(self.model, torch.zeros(2)) + 1

    with script(plan):
        tuner = tuner_of(Lazily(), run_dir=tmp_path, validate=None, max_steps=4)
        for _ in range(3):
            tuner.tell(tuner.perform(tuner.next_action()))
        tuner.close()
        with pytest.raises(ValueError, match=r"held under a key that only the earlier process knew"):
            tuner_of(Lazily(), run_dir=tmp_path, validate=None, max_steps=4)


def test_a_librarys_wrapper_around_a_function_is_not_the_users() -> None:
    """It bears the name and the module of the function; torch puts one around the step of every optimizer's class."""

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = nn.Linear(1, 1)
    found = Inventory({"": model, "optimizer": Own(model.parameters(), lr=0.1)}, {})
    names = [name for slots in found.slots.values() for name in slots.get()]
    assert not [name for name in names if "global_optimizer" in name]


def test_the_walk_is_bounded() -> None:
    """Much data and many objects cost little, and libraries are not walked into."""
    rows = [{"ids": np.arange(20), "text": "x"} for _ in range(8000)]
    chain: Any = None
    for _ in range(3000):
        chain = types.SimpleNamespace(next=chain)
    started = time.perf_counter()
    found = Inventory({"step": lambda: (rows, chain, np, torch, sys)}, {})
    assert time.perf_counter() - started < 1.0
    assert list(found.data) == ["step.rows"]
    assert len(found.slots) < 3_100
    assert max(map(len, found.slots)) < 1_000
    gc.collect()


def test_what_lies_beyond_the_walk_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("autolrs_plugin.training.inventory.REACH", 50)
    things = [types.SimpleNamespace(n=i) for i in range(100)]
    tuner_of(drawing(lambda: things[0]))
    assert caplog.text.count("neither rolled back nor seen") == 1


def test_an_iterator_at_rest_tells_the_same_and_one_that_nobody_can_see_never_does() -> None:
    class Opaque:
        """Stands for an iterator of a library in C."""

        def __iter__(self) -> Any:
            return self

        __slots__ = ()

        def __next__(self) -> int:
            return 1

    for iterator in (
        iter([1, 2]),
        itertools.cycle([1]),
        zip([1], [2], strict=True),
        (x for x in [1]),
        map(abs, [1]),
    ):
        assert position(iterator) == position(iterator)
    assert position(Opaque()) != position(Opaque())
