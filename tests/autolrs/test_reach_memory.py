"""State in arrays, buffers, environment and the like: after a probe it is as it was, or it is named."""

import array
import concurrent.futures
import ctypes
import enum
import functools
import io
import multiprocessing
import os
import queue
import random
import sys
import types
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from tqdm import tqdm

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Done
from autolrs_plugin.training.checkpoint import CheckpointError, checkpoint_bytes, checkpoint_from_bytes
from autolrs_plugin.training.fingerprint import digest_of
from autolrs_plugin.training.tree import Copier
from autolrs_plugin.training.watched import data_seen
from tests.autolrs.scripted import script
from tests.autolrs.test_inventory import PLAN, Kind, check_as_without_probes, everything, plainly, tuner_of
from tests.autolrs.test_reach import check_held_as_without_probes, drawing

# Each of these makes what is held, and returns the function that uses it.


def gradients_of_leaves() -> Any:
    leaves = [torch.zeros(2, requires_grad=True), nn.Parameter(torch.ones(2))]

    def use() -> Any:
        (leaves[0] * leaves[1] + leaves[1]).sum().backward()  # they add up
        return 1, leaves[0].grad + leaves[1].grad

    return use


def optimizers_behind(hold: Callable[[Any], tuple[Any, Callable[[Any], Any]]]) -> Callable[[], Any]:
    @functools.wraps(hold)
    def make() -> Any:
        parameter = nn.Parameter(torch.zeros(2))
        held, get = hold(torch.optim.SGD([parameter], lr=0.1, momentum=0.9))

        def use() -> Any:
            parameter.grad = torch.ones(2)
            get(held).step()
            return 1, parameter.detach()

        return use

    return make


def a_storage() -> Any:
    storage = torch.UntypedStorage(4)
    storage.fill_(0)

    def use() -> Any:
        storage[1] += 1
        return 1, torch.tensor(list(storage)).float()

    return use


def a_function_that_is_iterated_over() -> Any:
    numbers = iter(random.Random(0).random, 2.0)
    return lambda: (1, torch.tensor(next(numbers)))


@optimizers_behind
def an_optimizer_in_a_proxy(optimizer: Any) -> Any:
    return types.MappingProxyType({"a": optimizer}), lambda held: held["a"]


@optimizers_behind
def an_optimizer_in_an_array(optimizer: Any) -> Any:
    held = np.empty(1, dtype=object)
    held[0] = optimizer
    return held, lambda held: held[0]


@optimizers_behind
def an_optimizer_in_a_view(optimizer: Any) -> Any:
    return {"a": optimizer}.values(), lambda held: next(iter(held))


@optimizers_behind
def an_optimizer_in_a_future(optimizer: Any) -> Any:
    future: Any = concurrent.futures.Future()
    future.set_result(optimizer)
    return future, lambda held: held.result()


def arrays_of_every_type() -> Any:
    records = np.zeros(4, dtype=[("priority", "f4"), ("n", "i4", (2,))])
    things, times = np.array([0, None], dtype=object), np.zeros(2, dtype="M8[s]")
    texts = np.array(["a", "b"])

    def use() -> Any:
        records["n"][0] += 1
        things[0] += 1
        times[1] += 1
        texts[0] = "b" if texts[0] == "a" else "a"
        count = records["n"].sum() + things[0] + times.astype(int).sum() + (texts[0] == "a")
        return float(count), torch.ones(1)

    return use


def bit_generators() -> Any:
    bits = np.random.PCG64(3)
    return lambda: (float(bits.random_raw() % 7), torch.ones(1))


class Tensors(torch.Tensor):
    """A type of the user's own."""


class Arrays(np.ndarray):
    """The same of numpy's."""


class Dicts(dict):  # type: ignore[type-arg]
    """The same of Python's."""


class Lists(list):  # type: ignore[type-arg]
    """The same."""


class Sets(set):  # type: ignore[type-arg]
    """The same."""


def attributes_beside_the_content() -> Any:
    def counting() -> list[Any]:
        inside = [torch.zeros(1)]
        own = [np.zeros(2).view(Arrays), Dicts(n=0), Lists([0]), Sets([0])]
        return [torch.zeros(1), torch.zeros(1).as_subclass(Tensors), inside[0], inside, *own]

    given, made = counting(), counting()
    for thing in given:
        if type(thing) is not list:
            thing.n = 0

    def use() -> Any:
        for thing in given + made:
            if type(thing) is not list:
                thing.n = getattr(thing, "n", 0) + 1
        given[5]["n"] += 1
        given[6][0] += 1
        return given[0].n + made[0].n + sum(t.n for t in given[4:]) + given[5]["n"] + given[6][0], torch.ones(
            1
        )

    return use


def memory_of_every_kind() -> Any:
    number, numbers, shared = ctypes.c_int(0), (ctypes.c_double * 2)(), multiprocessing.Value("i", 0)
    view, typed = memoryview(bytearray(4)), memoryview(array.array("d", [0.0]))

    def use() -> Any:
        number.value += 1
        numbers[1] += 1
        shared.value += 1
        view[0] += 1
        typed[0] += 1
        return number.value + numbers[1] + shared.value + view[0] + typed[0], torch.ones(1)

    return use


def members_of_an_enumeration() -> Any:
    class Phase(enum.Enum):
        A = 1
        B = 2

    Phase.A.seen = 0  # type: ignore[attr-defined]

    def use() -> Any:
        Phase.A.seen += 1  # type: ignore[attr-defined]
        Phase.B.made = getattr(Phase.B, "made", 0) + 1  # type: ignore[attr-defined]
        return Phase.A.seen + Phase.B.made, torch.ones(1)  # type: ignore[attr-defined]

    return use


def cached_dictionaries() -> Any:
    calls = {"n": 0}

    @functools.lru_cache(maxsize=4)
    def bounded(i: int) -> dict[str, int]:
        return {"n": 0}

    @functools.cache
    def unbounded(i: int) -> dict[str, int]:
        return {"n": 0}

    bounded(0), unbounded(0)

    def use() -> Any:
        calls["n"] += 1
        for cached in (bounded(0), bounded(calls["n"] % 3), unbounded(0)):
            cached["n"] += 1
        return bounded(0)["n"] + bounded(1)["n"] + unbounded(0)["n"], torch.ones(1)

    return use


def a_count_in_a_list() -> Any:
    count, recent, best = [0], [0.0] * 3, [{"loss": 0.0}]

    def use() -> Any:
        count[0] += 1
        recent.append(float(count[0]))
        recent.pop(0)
        best[0]["loss"] += 1
        return count[0] + sum(recent) + best[0]["loss"], torch.ones(1)

    return use


def variables_by_their_names() -> Any:
    module = types.ModuleType("tests.autolrs.named_by_strings")
    module.__file__ = __file__
    module.count = module.seen = module.known = 0  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    code = """
import sys
def use():
    globals()["count"] += 1
    here = sys.modules["tests.autolrs.named_by_strings"]
    here.seen += 1
    setattr(here, "known", getattr(here, "known") + 1)
    return count + seen + known, sys.torch.ones(1)
"""
    exec(code.replace("sys.torch", "sys.modules['torch']"), vars(module))
    return module.use


def environment_variables() -> Any:
    os.environ["AUTOLRS_TEST_COUNT"] = "0"
    os.environ.pop("AUTOLRS_TEST_MADE", None)

    def use() -> Any:
        os.environ["AUTOLRS_TEST_COUNT"] = str(int(os.environ["AUTOLRS_TEST_COUNT"]) + 1)
        os.environ["AUTOLRS_TEST_MADE"] = os.environ.get("AUTOLRS_TEST_MADE", "") + "."
        return int(os.environ["AUTOLRS_TEST_COUNT"]) + len(os.environ["AUTOLRS_TEST_MADE"]), torch.ones(1)

    return use


def values_of_a_sparse_tensor() -> Any:
    sparse = torch.eye(2).to_sparse().coalesce()

    def use() -> Any:
        sparse.values().add_(1)
        return 1, sparse.to_dense()

    return use


def files_in_memory() -> Any:
    written, text = io.BytesIO(b"begun"), io.StringIO()
    read = io.BytesIO(bytes(range(1, 200)))
    written.seek(0, io.SEEK_END)

    def use() -> Any:
        written.write(b"step ")
        text.write("step ")
        return read.read(1)[0], torch.tensor([float(len(written.getvalue())), float(text.tell())])

    return use


def counts_of_bars() -> Any:
    bar = tqdm(total=1000, file=io.StringIO())
    tasks = Progress(disable=True)
    task = tasks.add_task("steps", total=1000)

    def use() -> Any:
        bar.update(1)
        tasks.advance(task)
        return bar.n, torch.tensor(tasks.tasks[0].completed)

    return use


def members_of_long_containers() -> Any:
    """Banks and replay buffers: of tensors, numbers and objects, beyond what is copied item by item."""

    class Transition:
        def __init__(self, reward: float) -> None:
            self.reward = reward

    rows, numbers = [torch.zeros(1) for _ in range(11_000)], [0.0] * 150_000
    replay, by_key = (
        deque((Transition(0.0) for _ in range(11_000)), maxlen=11_000),
        dict.fromkeys(range(11_000), 0),
    )
    calls = {"n": 0}

    def use() -> Any:
        calls["n"] = n = calls["n"] + 1
        rows[7_001 + n] = torch.full((1,), float(n))
        numbers[70_001] += 1
        replay.append(Transition(float(n)))
        by_key[n] += 1
        by_key[-n] = 1
        told = sum(t.reward for t in list(replay)[-20:]) + numbers[70_001] + len(by_key) + by_key[1]
        return told, torch.stack(rows[7_001:7_030])

    return use


def a_table_of_pandas() -> Any:
    """Written in place, given a new column in place of one, and lengthened; one table is the attribute of a module."""
    pandas = pytest.importorskip("pandas")
    table, holder = pandas.DataFrame({"n": [0.0, 0.0], "m": [0.0, 1.0]}), nn.Identity()
    holder.row = pandas.Series([0.0, 0.0])

    def use() -> Any:
        table.loc[1, "n"] += 1
        table["m"] = table["m"] + 1
        holder.row.iloc[1] += 1
        table.loc[len(table)] = [1.0, 2.0]
        return table["n"].sum() + holder.row.sum(), torch.tensor(table["m"].sum())

    return use


def a_subclass_of_a_queue() -> Any:
    class Queue(queue.SimpleQueue[int]):
        """Python's, on a base of C."""

    numbers = Queue()
    numbers.put(0)

    def use() -> Any:
        numbers.put(numbers.get() + 1)
        numbers.put(n := numbers.get())
        return n, torch.tensor(n)

    return use


def configurations_of_every_kind() -> Any:
    """Their __getattr__ raises KeyError or RuntimeError, or has an answer for any name."""

    class ByItems(dict[str, Any]):
        __getattr__ = dict.__getitem__

    class ByDictionary:
        def __init__(self) -> None:
            self.__dict__["_values"] = {"n": 0}

        def __getattr__(self, name: str) -> Any:
            return self.__dict__["_values"][name]

    class Forgiving(ByDictionary):
        def __getattr__(self, name: str) -> Any:
            return self.__dict__["_values"].get(name)

    class Unconnected:
        n = 0

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("not connected")

    items: Any
    items, by_dictionary, forgiving, unconnected = ByItems(n=0), ByDictionary(), Forgiving(), Unconnected()

    def use() -> Any:
        items["n"] += 1
        unconnected.n += 1
        for configuration in (by_dictionary, forgiving):
            configuration._values["n"] += 1
        return items.n + unconnected.n, torch.tensor(by_dictionary.n + forgiving.n)

    return use


USES: list[Callable[[], Any]] = [
    *(
        a_storage,
        gradients_of_leaves,
        an_optimizer_in_a_proxy,
        an_optimizer_in_an_array,
        an_optimizer_in_a_view,
    ),
    *(an_optimizer_in_a_future, arrays_of_every_type, bit_generators, attributes_beside_the_content),
    *(memory_of_every_kind, members_of_an_enumeration, cached_dictionaries, a_count_in_a_list),
    *(variables_by_their_names, environment_variables, values_of_a_sparse_tensor),
    *(files_in_memory, counts_of_bars, members_of_long_containers),
    *(a_table_of_pandas, a_subclass_of_a_queue, configurations_of_every_kind),
]


@pytest.mark.parametrize("make", USES, ids=lambda make: make.__name__)
def test_what_a_step_holds_there_is_as_without_probes(make: Callable[[], Any]) -> None:
    check_held_as_without_probes(make)


class OfAnOptimizer(Kind):
    """Its defaults, and hooks of all optimizers and all modules with state of their own."""

    def prepare(self) -> None:
        calls = {"step": 0, "forward": 0}

        def before_step(optimizer: Optimizer, *args: Any) -> None:
            calls["step"] += 1
            optimizer.defaults["n"] = optimizer.defaults.get("n", 0) + 1

        def after_forward(module: nn.Module, *args: Any) -> None:
            calls["forward"] += torch.is_grad_enabled()

        self.handles = [register_optimizer_step_pre_hook(before_step)]
        self.handles.append(register_module_forward_hook(after_forward))
        self.watch = lambda: (dict(calls), self.optimizer.defaults["n"])

    def validate(self) -> float:
        return 1.0

    def seen(self) -> Any:
        for handle in self.handles:
            handle.remove()
        return self.watch()


def test_the_defaults_and_the_hooks_of_all_optimizers_are_as_without_probes() -> None:
    check_as_without_probes(OfAnOptimizer)


class Accumulated(Kind):
    """Sparse gradients that add up over two steps."""

    def prepare(self) -> None:
        self.model = nn.Embedding(64, 4, sparse=True)
        self.optimizer = torch.optim.SparseAdam(list(self.model.parameters()), lr=0.1)
        self.state = {"n": 0}

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(index), self.y[index])

    def step(self, index: torch.Tensor) -> torch.Tensor:
        loss = self.loss(index)
        loss.backward()
        self.state["n"] += 1
        if self.state["n"] % 2 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    def validate(self) -> float:
        return 1.0

    def seen(self) -> Any:
        gradient = self.model.weight.grad
        return self.state["n"], None if gradient is None else gradient.to_dense()


def test_sparse_gradients_that_add_up_are_as_without_probes(tmp_path: Path) -> None:
    whole, job = plainly(Accumulated()), Accumulated()
    with script(PLAN):
        tuner_of(job, run_dir=tmp_path).run()
    assert everything(job) == whole


def test_gradients_sparse_tensors_and_records_are_in_files() -> None:
    leaf = torch.ones(2, requires_grad=True)
    leaf.sum().backward()
    records = np.array([(1.5, [1, 2])], dtype=[("r", "f4"), ("n", "i4", (2,))])
    state = {
        "a": [leaf, records, np.array([1j]), np.array(["x"]), np.zeros(2, "M8[s]")],
        "b": torch.eye(2).to_sparse(),
    }
    copied = Copier().copy(state, note=True)
    read = checkpoint_from_bytes(checkpoint_bytes(copied))
    assert digest_of(read) == digest_of(copied)
    leaf.grad.add_(1)
    assert digest_of(Copier().copy(state, note=True)) != digest_of(copied)


class Bank(Kind):
    """The latest losses of each example, in a deque too long to be copied item by item."""

    objects = False

    def prepare(self) -> None:
        self.bank: deque[Any] = deque([0.0] * 10_500)

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        for i in index.tolist():
            self.bank[i] = object() if self.objects else self.bank[i] + float(loss)

    def seen(self) -> Any:
        return list(self.bank)[:64]


def test_members_of_a_long_deque_are_in_files(tmp_path: Path) -> None:
    whole = plainly(Bank())
    with script(PLAN):
        tuner = tuner_of(Bank(), run_dir=tmp_path)
        for _ in range(6):
            tuner.tell(tuner.perform(tuner.next_action()))
        tuner.close()
        job = Bank()
        tuner_of(job, run_dir=tmp_path).run()
    assert everything(job) == whole
    job = Bank()
    job.objects = True
    with (
        script(PLAN),
        pytest.raises(CheckpointError, match=r"bank.* a .*Members cannot be written .* leave run_dir"),
    ):
        tuner_of(job, run_dir=tmp_path / "objects").run()


# Each of these makes what cannot be set back, and returns the function that changes it.


def a_seed_sequence() -> Any:
    seed = np.random.SeedSequence(3)
    return lambda: seed.spawn(1)


def a_tensor_amid_many() -> Any:
    rows = [torch.zeros(1) for _ in range(12_000)]

    def draw() -> None:
        rows[7_001].data[0] += 1  # torch does not count this

    return draw


def a_structure_of_a_sparse_tensor() -> Any:
    sparse, more = torch.eye(3).to_sparse(), torch.ones(3, 3).to_sparse()
    return lambda: sparse.add_(more)


def a_variable_by_a_computed_name() -> Any:
    module = types.ModuleType("tests.autolrs.named_by_computed_strings")
    module.__file__ = __file__
    sys.modules[module.__name__] = module
    exec("parts = ['cou', 'nt']\ncount = 0\ndef draw():\n    globals()[''.join(parts)] += 1", vars(module))
    return module.draw


NAMED: dict[Callable[[], Any], str] = {
    a_seed_sequence: r"seed \(a SeedSequence\)",
    a_tensor_amid_many: r"rows \(a list of 12000 items\)",
    a_structure_of_a_sparse_tensor: r"sparse \(a Tensor\)",
    a_variable_by_a_computed_name: r"named_by_computed_strings.count \(a variable\)",
}


@pytest.mark.parametrize("make", NAMED, ids=lambda make: make.__name__)
def test_what_cannot_be_set_back_there_is_named(make: Callable[[], Any]) -> None:
    with script(PLAN):
        tuner = tuner_of(drawing(make()))
        with pytest.raises(RuntimeError, match=rf"{NAMED[make]}.*: was changed by a probe"):
            tuner.run()
    assert len(tuner.schedule) == 2


def test_a_change_of_any_item_of_much_data_is_seen() -> None:
    wide = [list(range(1000)) for _ in range(300)]
    before = data_seen(wide)
    assert data_seen(wide) == before
    wide[123][567] += 1
    assert data_seen(wide) != before
    members = set(range(20_000))
    before = data_seen(members)
    members.remove(77)
    members.add(-77)
    assert data_seen(members) != before


ACTIONS = 0


def test_a_variable_of_the_script_that_no_step_reads_is_its_own() -> None:
    """A loop of one's own that counts what it does, in the module that has the step."""
    global ACTIONS
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def train_step(batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(batch) - 1).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    settings: dict[str, Any] = {"max_steps": 200, "lr_range": (1e-4, 1.0), "progress": False}
    tuner = AutoLRS(
        model, optimizer, train_step=train_step, train_data=list(torch.randn(9, 8, 4)), **settings
    )
    while not isinstance(action := tuner.next_action(), Done):
        ACTIONS += 1
        tuner.tell(tuner.perform(action))
    assert ACTIONS > 10
    assert tuner.ledger.search.steps > 0
