"""Whatever a training step changes is as it was when a probe is over, wherever it is kept; or it is named."""

import copy
import functools
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Sampler

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Action, Evaluate, Probe, Restore, Result, Snapshot, Train
from autolrs_plugin.training.fingerprint import digest_of
from tests.autolrs.jobs import bits
from tests.autolrs.scripted import script

PLAN: tuple[Action, ...] = (
    Train(0, (0.05, 0.06)),
    Snapshot(),
    Probe(0, 0, (0.5,) * 4, float("inf"), evaluate=True),
    Probe(0, 1, (0.01,) * 5, float("inf"), evaluate=True, draw=1),
    Restore(),
    Train(2, (0.05, 0.04, 0.03)),
    Evaluate(5),
    Snapshot(),
    Probe(1, 0, (0.5,) * 2, float("inf"), evaluate=False),
    Restore(),
    Train(5, (0.02, 0.01)),
)
RATES = (0.05, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01)
"""The rates of the real steps in PLAN."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


class Kind:
    """A job with some state beside the weights: `step` changes it, and uses it; `seen` returns all of it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(64, 16)
        self.y = (self.x @ torch.randn(16, 4)).argmax(1)
        self.model: nn.Module = Net()
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.data: Any = list(torch.arange(64).split(16))
        self.options: dict[str, Any] = {}
        self.prepare()

    def prepare(self) -> None:
        """Make the state."""

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        """Change the state."""

    def seen(self) -> Any:
        return None

    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.model(self.x[index]), self.y[index])

    def step(self, index: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(index)
        loss.backward()
        self.optimizer.step()
        self.after(loss.detach(), index)
        return loss

    def validate(self) -> float:
        with torch.no_grad():
            return cross_entropy(self.model(self.x), self.y).item()


class Teacher(Kind):
    """A momentum teacher inside of the model (BYOL, MoCo, DINO, mean teacher)."""

    def prepare(self) -> None:
        self.student, self.teacher = self.model, copy.deepcopy(self.model).requires_grad_(False)
        self.model = nn.ModuleDict({"student": self.student, "teacher": self.teacher})

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        out = self.student(self.x[index])
        return cross_entropy(out, self.y[index]) + (out - self.teacher(self.x[index])).square().mean()

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        for p, q in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            p.data.lerp_(q.data, 0.05)

    def seen(self) -> Any:
        return self.teacher.state_dict()

    def validate(self) -> float:
        with torch.no_grad():
            return cross_entropy(self.student(self.x), self.y).item()


class TeacherOutside(Teacher):
    """The same beside the model, of another type: it is reached from the step alone."""

    def prepare(self) -> None:
        super().prepare()
        self.model, self.teacher = self.student, self.teacher.double()

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        out = self.student(self.x[index])
        far = out - self.teacher(self.x[index].double()).float()
        return cross_entropy(out, self.y[index]) + far.square().mean()

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        for p, q in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            p.data = p.data * 0.9 + q.data.double() * 0.1  # another tensor each time


class ModuleAttributes(Kind):
    """Tensors, counts and lists in plain attributes of modules; hidden state between steps."""

    def prepare(self) -> None:
        self.model.hidden, self.model.count = torch.zeros(4), 0
        self.model.body.recent = deque(maxlen=3)
        self.model.norm.table = {"a": [torch.zeros(2)]}

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        return super().loss(index) + (self.model.head.bias * self.model.hidden).sum() / (1 + self.model.count)

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.model.hidden = self.model(self.x[index]).detach().mean(0)
        self.model.count += 1
        self.model.body.recent.append(loss)
        self.model.norm.table["a"][0].add_(1)
        self.model.norm.table["made"] = self.model.hidden

    def seen(self) -> Any:
        return self.model.hidden, self.model.count, self.model.body.recent, self.model.norm.table


class Closure(Kind):
    """State in variables around the step: tensors, a recurrent state, an object of the user's own."""

    def prepare(self) -> None:
        hidden, state, user = torch.zeros(4), {"previous": None}, User()
        plain = self.step

        def step(index: torch.Tensor) -> torch.Tensor:
            nonlocal hidden
            loss = plain(index)
            with torch.no_grad():
                self.model.head.bias.add_(hidden, alpha=1e-3 * user.count)
                if state["previous"] is not None:
                    self.model.head.bias.add_(state["previous"], alpha=1e-3)
            hidden, state["previous"] = self.model(self.x[index]).detach().mean(0), hidden
            user.use()
            return loss

        self.step = step  # type: ignore[method-assign]
        self.seen = lambda: (hidden, state, user.count, user.rows)  # type: ignore[method-assign]


class User:
    """An object of a user's own, without state_dict()."""

    __slots__ = ("__dict__", "count")

    def __init__(self) -> None:
        self.count, self.rows = 0, list[Any]()

    def use(self) -> None:
        self.count += 1
        self.rows.append(self.count)


class Chained(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, in a list; their groups are its own."""

    def __init__(self, model: nn.Module) -> None:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        self.optimizers = [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(rest, lr=0.01)]
        super().__init__(list(model.parameters()), {"lr": 0.1})
        self.param_groups = [group for inner in self.optimizers for group in inner.param_groups]

    def step(self, closure: Any = None) -> None:
        for inner in self.optimizers:
            inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for inner in self.optimizers:
            inner.zero_grad()


class InAList(Kind):
    def prepare(self) -> None:
        self.optimizer = Chained(self.model)

    def seen(self) -> Any:
        return [list(inner.state.values()) for inner in self.optimizer.optimizers]


class Holder:
    """A container that is no optimizer."""

    def __init__(self, **optimizers: torch.optim.Optimizer) -> None:
        self.by_name = optimizers


class OwnGroups(torch.optim.Optimizer):
    """An optimizer with groups of its own: its inner ones, in a container, have others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(list(model.parameters()), {"lr": 0.1})
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        self.held = Holder(
            a=torch.optim.SGD(matrices, lr=0.1, momentum=0.9), b=torch.optim.Adam(rest, lr=0.02)
        )

    def step(self, closure: Any = None) -> None:
        for inner in self.held.by_name.values():
            inner.step()


class InAContainer(Kind):
    def prepare(self) -> None:
        self.optimizer = OwnGroups(self.model)

    def seen(self) -> Any:
        return [list(inner.state.values()) for inner in self.optimizer.held.by_name.values()]

    def rates(self) -> list[float]:
        inner = self.optimizer.held.by_name.values()
        return [*super().rates(), *(float(group["lr"]) for o in inner for group in o.param_groups)]


class Odd(torch.optim.SGD):
    """An optimizer with a deque, a generator, a shape and numpy's own things in its state."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.norms, self.own = deque[float](maxlen=50), torch.Generator().manual_seed(1)
        self.numpys, self.sums = np.random.default_rng(3), np.zeros(3)

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("shape", p.shape).numel()
            self.norms.append(float(p.grad.norm()))
            p.grad += 1e-3 * torch.rand(p.shape, generator=self.own) * (1 + len(self.norms))
        self.sums += self.numpys.random(3)
        return super().step(closure)


class OddState(Kind):
    def prepare(self) -> None:
        self.optimizer = Odd(self.model.parameters())

    def seen(self) -> Any:
        o = self.optimizer
        return o.norms, o.own.get_state(), o.numpys.random(2), o.sums, [s["shape"] for s in o.state.values()]


class Metric(Kind):
    """A metric whose state_dict() is empty, beside the model and given."""

    def prepare(self) -> None:
        metrics = pytest.importorskip("torchmetrics")
        self.metric, self.model.inside = metrics.MeanMetric(), metrics.SumMetric()
        self.options = {"stateful": {"metric": self.metric}}

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.metric.update(loss)
        self.model.inside(loss)

    def seen(self) -> Any:
        return self.metric.compute(), self.metric._update_count, self.model.inside.compute()


class Growing(Kind):
    """A frozen layer that the step lets train later, in a group of its own."""

    def prepare(self) -> None:
        self.model.norm.requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.count = torch.optim.AdamW(trained, lr=0.1), 0

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.count += 1
        if self.count == 4:
            self.model.norm.requires_grad_(True)
            lr = self.optimizer.param_groups[0]["lr"]
            self.optimizer.add_param_group({"params": list(self.model.norm.parameters()), "lr": lr / 10})

    def seen(self) -> Any:
        return self.count, [len(group["params"]) for group in self.optimizer.param_groups]


class Thawing(Kind):
    """The same with the group there from the beginning: what a run that is resumed needs."""

    def prepare(self) -> None:
        self.model.norm.requires_grad_(False)
        late = list(self.model.norm.parameters())
        first = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.count = (
            torch.optim.AdamW([{"params": first}, {"params": late, "lr": 0.01}], lr=0.1),
            0,
        )

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.count += 1
        if self.count == 4:
            self.model.norm.requires_grad_(True)

    def seen(self) -> Any:
        return self.count, [p.requires_grad for p in self.model.parameters()]


class Numbered(Dataset):
    """A data set that is told of epochs, with a transform of a library's kind that has a generator."""

    def __init__(self) -> None:
        self.epoch, self.transform = 0, functools.partial(self.noise, np.random.default_rng(5))

    @staticmethod
    def noise(own: np.random.Generator, i: int) -> int:
        return int(i + own.integers(0, 60)) % 64

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> int:
        self.epoch += 1
        return (self.transform(i) + self.epoch) % 64


class Counting(Sampler):
    """Another order in each iteration, by a count of its own."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return 64

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        yield from torch.randperm(64, generator=torch.Generator().manual_seed(self.epoch)).tolist()


class Lazy:
    """A collator that makes its generator at its first call."""

    generator: torch.Generator | None = None

    def __call__(self, items: list[int]) -> torch.Tensor:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(42)
        return (torch.tensor(items) + torch.randint(0, 64, (1,), generator=self.generator)) % 64


class Loader(Kind):
    """Sampler, data set and collator, each with state of its own."""

    def prepare(self) -> None:
        self.data = DataLoader(Numbered(), batch_size=16, sampler=Counting(), collate_fn=Lazy())

    def seen(self) -> Any:
        return self.data.dataset.epoch, self.data.sampler.epoch, self.data.collate_fn.generator.get_state()


class ScheduleFree(Kind):
    """An optimizer that evaluates at other weights than it trains."""

    def prepare(self) -> None:
        free = pytest.importorskip("schedulefree")
        self.optimizer = free.AdamWScheduleFree(self.model.parameters(), lr=0.1)
        self.optimizer.train()

    def validate(self) -> float:
        self.optimizer.eval()
        loss = super().validate()
        self.optimizer.train()
        return loss


class GradientsLeft(Kind):
    """Gradients are accumulated without end; validation leaves some behind, too."""

    def step(self, index: torch.Tensor) -> torch.Tensor:
        loss = self.loss(index)
        loss.backward()
        self.optimizer.step()
        return loss

    def validate(self) -> float:
        loss = cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return loss.item()

    def plain_validate(self) -> None:
        """What validation leaves behind is no part of the run without it."""


class Muon(Kind):
    def prepare(self) -> None:
        self.model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
        self.optimizer = torch.optim.Muon(self.model.parameters(), lr=0.1)


class TensorRates(Kind):
    """A fused optimizer whose rates are tensors."""

    def prepare(self) -> None:
        groups = [
            {"params": list(self.model.body.parameters()), "lr": torch.tensor(0.1)},
            {"params": list(self.model.head.parameters()), "lr": torch.tensor(0.01)},
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True)

    def seen(self) -> Any:
        return [group["lr"] for group in self.optimizer.param_groups]


class Adafactor(Kind):
    def prepare(self) -> None:
        self.optimizer = torch.optim.Adafactor(self.model.parameters(), lr=0.1)


class EightBits(Kind):
    """States of 8 bits by bitsandbytes: bytes, with a table and a scale for each block, as tensors beside them."""

    def prepare(self) -> None:
        self.model = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 4))
        self.optimizer = self.made()

    def made(self) -> torch.optim.Optimizer:
        found = pytest.importorskip("bitsandbytes.optim")
        return found.AdamW8bit(self.model.parameters(), lr=0.1, min_8bit_size=16)

    def seen(self) -> Any:
        """Return that there is a tensor of bytes."""
        states = self.optimizer.state.get(self.model[0].weight, {}).values()
        return {leaf.dtype for leaf in states if isinstance(leaf, torch.Tensor)} >= {torch.uint8}


class EightBitTensors(EightBits):
    """The same by torchao: tensors that consist of others, and whose own copying gives the same memory."""

    def made(self) -> torch.optim.Optimizer:
        return pytest.importorskip("torchao.optim").AdamW8bit(self.model.parameters(), lr=0.1)

    def step(self, index: torch.Tensor) -> torch.Tensor:
        with torch.compiler.set_stance("force_eager"):  # it compiles its step, which takes half a minute
            return super().step(index)

    def seen(self) -> Any:
        state = self.optimizer.state.get(self.model[0].weight, {})
        return [type(value).__name__ for value in state.values()]


class Scheduled(Kind):
    """An LR scheduler and a scaler that nobody was told of: the step calls them."""

    def prepare(self) -> None:
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)

    def after(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.scaler.scale(loss)
        self.scheduler.step()

    def seen(self) -> Any:
        return self.scheduler.last_epoch, self.scaler.state_dict()


KINDS: list[type[Kind]] = [
    *(
        Teacher,
        TeacherOutside,
        ModuleAttributes,
        Closure,
        InAList,
        InAContainer,
        OddState,
        Metric,
        Growing,
        Thawing,
    ),
    *(
        Loader,
        ScheduleFree,
        GradientsLeft,
        Muon,
        TensorRates,
        Adafactor,
        Scheduled,
        EightBits,
        EightBitTensors,
    ),
]


def everything(job: Kind) -> dict[str, Any]:
    """Return every bit of a job, as values that compare."""

    def plain(value: Any) -> Any:
        if hasattr(value, "__tensor_flatten__"):
            return [plain(getattr(value, name)) for name in value.__tensor_flatten__()[0]]
        if isinstance(value, torch.Tensor):
            return str(value.dtype), bits(value)
        if isinstance(value, np.ndarray):
            return value.tolist()
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        return [type(value), *map(plain, value)] if isinstance(value, list | tuple | deque) else value

    found = {"model": plain(job.model.state_dict()), "seen": plain(job.seen()), "rates": plain(job.rates())}
    found["optimizer"] = plain([job.optimizer.state.get(p, {}) for p in job.model.parameters()])
    found["gradients"] = plain([p.grad for p in job.model.parameters()])
    return found


def tuner_of(job: Kind, **options: Any) -> AutoLRS:
    arguments = {
        "validate": job.validate,
        "max_steps": 7,
        "lr_range": (1e-3, 1.0),
        "progress": False,
        **job.options,
    }
    arguments |= options
    return AutoLRS(job.model, job.optimizer, train_step=job.step, train_data=job.data, **arguments)


def plainly(job: Kind) -> dict[str, Any]:
    """Train as a user does without AutoLRS, at the same rates."""
    with script([Train(0, RATES)]):
        tuner_of(job, validate=None).run()
    return everything(job)


def check_as_without_probes(kind: type[Kind]) -> None:
    """See that a run with two searches ends with the bits of one without."""
    torch.manual_seed(0)
    without = plainly(kind())
    torch.manual_seed(0)
    job = kind()
    with script(PLAN):
        tuner = tuner_of(job)
        tuner.run()
    assert tuner.ledger.search.steps == 11  # the probes took place
    assert everything(job) == without


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_run_with_probes_is_the_run_without(kind: type[Kind]) -> None:
    check_as_without_probes(kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_run_that_ends_in_a_probe_goes_on_from_its_folder(kind: type[Kind], tmp_path: Path) -> None:
    if kind is Growing:
        with script(PLAN):
            tuner = tuner_of(kind(), run_dir=tmp_path)
            for _ in range(9):
                tuner.tell(tuner.perform(tuner.next_action()))
            tuner.close()
            with pytest.raises(
                ValueError, match=r"param_groups\[1\] \(a parameter group\); .* from the beginning"
            ):
                tuner_of(kind(), run_dir=tmp_path)
        return
    whole = plainly(kind())
    for last in (3, 6, 9):
        folder = tmp_path / str(last)
        with script(PLAN):
            tuner = tuner_of(kind(), run_dir=folder)
            for _ in range(last):
                tuner.tell(tuner.perform(tuner.next_action()))
            tuner.close()
            job = kind()
            tuner_of(job, run_dir=folder).run()
        assert everything(job) == whole


class Boom(Exception):
    """An error of the user's own."""


ERRORS = (Boom, KeyboardInterrupt, MemoryError)


@pytest.mark.parametrize(
    "kind", [Kind, Teacher, InAContainer, OddState, Loader, Closure], ids=lambda k: k.__name__
)
def test_a_probe_that_ends_in_an_error_has_changed_nothing(kind: type[Kind]) -> None:
    """At random points of its steps: before, in and after the optimizer's, and in validation; by each kind of error."""
    draw = random.Random(kind.__name__)
    torch.manual_seed(0)
    whole = plainly(kind())
    points = [(where, error) for where in ("forward", "step", "after", "validate") for error in ERRORS]
    for point in draw.sample(points, 6):
        torch.manual_seed(0)
        job, left = kind(), draw.randrange(1, 4)
        armed = [0]

        def at(here: str, function: Callable[..., Any], point: Any = point, armed: Any = armed) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                result = function(*args, **kwargs)
                if armed[0] and here == point[0]:
                    armed[0] -= 1
                    if not armed[0]:
                        raise point[1]("boom")
                return result

            return wrapped

        job.after = at("after", job.after)  # type: ignore[method-assign]
        job.loss = at("forward", job.loss)  # type: ignore[method-assign]
        job.optimizer.step = at("step", job.optimizer.step)
        job.validate = at("validate", job.validate)  # type: ignore[method-assign]
        with script(PLAN):
            tuner = tuner_of(job)
        for _ in range(2):
            tuner.tell(tuner.perform(tuner.next_action()))
        before, state = everything(job), torch.get_rng_state()
        armed[0] = 1 if point[0] == "validate" else left
        with pytest.raises(point[1], match="boom"):
            tuner.perform(tuner.next_action())
        armed[0] = 0
        assert everything(job) == before
        assert torch.equal(torch.get_rng_state(), state)
        tuner.run()  # and it goes on
        assert everything(job) == whole


def test_an_iterator_of_a_step_with_batches_is_named() -> None:
    job = Kind()
    unlabelled = iter(itertools.cycle(list(torch.randn(5, 16))))
    stream = (x for x in unlabelled)

    def step(index: torch.Tensor) -> torch.Tensor:
        next(stream)
        return job.step(index)

    with script(PLAN):
        tuner = AutoLRS(
            job.model, job.optimizer, train_step=step, train_data=job.data, max_steps=7, lr_range=(1e-3, 1.0),
            validation=True, validate=job.validate, progress=False,
        )  # fmt: skip
        with pytest.raises(RuntimeError, match=r"train_step\.stream \(a generator\): was changed by a probe"):
            tuner.run()
    assert len(tuner.schedule) == 2  # before the run went on


def test_a_frozen_weight_that_cannot_be_told_from_data_is_named() -> None:
    job = Kind()
    job.model.table = nn.Parameter(
        torch.zeros(3, 5), requires_grad=False
    )  # no trainable weight has its shape

    def step(index: torch.Tensor) -> torch.Tensor:
        job.model.table.data.add_(1)
        return Kind.step(job, index)

    job.step = step  # type: ignore[method-assign]
    with (
        script(PLAN),
        pytest.raises(RuntimeError, match=r"table \(a frozen weight\): was changed by a probe"),
    ):
        tuner_of(job).run()


def test_a_log_that_grows_stays_and_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    job, losses, calls = Kind(), [0.0], [0]

    def step(index: torch.Tensor) -> torch.Tensor:
        losses.append(1.0)
        calls[0] += 1
        return Kind.step(job, index)

    job.step = step  # type: ignore[method-assign]
    with script(PLAN), caplog.at_level(logging.WARNING, "autolrs_plugin"):
        tuner_of(job).run()
    assert len(losses) == 1 + 7 + 11
    assert calls == [7]  # a count is state: it may decide about the next step
    assert (
        caplog.text.count("train_step.losses (a list that grows): grew in a probe, and was not set back") == 1
    )


def test_constants_of_the_script_are_not_written_and_not_set_back(tmp_path: Path) -> None:
    """A state on disk holds what the run has changed: a script may be started again with other constants."""
    table, settings = torch.arange(5.0), {"clip": [torch.tensor(1.0)]}

    def run(job: Kind, last: int) -> None:
        def step(index: torch.Tensor) -> torch.Tensor:
            table.sum(), settings["clip"]
            return Kind.step(job, index)

        job.step = step  # type: ignore[method-assign]
        with script(PLAN):
            tuner = tuner_of(job, run_dir=tmp_path)
            for _ in range(last):
                tuner.tell(tuner.perform(tuner.next_action()))
            tuner.close()

    run(Kind(), 5)
    table.add_(1)
    settings["clip"][0].fill_(2.0)
    run(Kind(), 3)
    assert table.tolist() == [1, 2, 3, 4, 5]
    assert settings["clip"][0].item() == 2.0


class Several:
    """A container that is no optimizer and holds some."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizers = {"main": [optimizer]}


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda o: [o], r"a list is no .*; put AdamW into one torch.optim.Optimizer that holds them"),
        (lambda o: {"a": o}, r"a dict is no .*; put AdamW into one"),
        (
            Several,
            r"a Several is no torch.optim.Optimizer; put AdamW into one .* whose step\(\) calls theirs\.",
        ),
        (type, r"the class AdamW is no .*, but makes one; give AdamW\(model.parameters\(\), lr=...\)"),
        (
            lambda o: functools.partial(o.__class__, lr=1.0),
            r"a partial is no .*, but makes one; give AdamW\(",
        ),
        (lambda o: 3, r"an int is no torch.optim.Optimizer\."),
    ],
    ids=["list", "dict", "object", "class", "partial", "number"],
)
def test_what_is_no_optimizer_is_told_what_works(made: Callable[[Any], Any], says: str) -> None:
    job = Kind()
    with pytest.raises(TypeError, match=f"optimizer: {says}"):
        AutoLRS(job.model, made(job.optimizer), max_steps=7, lr_range=(1e-3, 1.0), train_step=job.validate)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (type, r"the class Net is no torch.nn.Module, but makes one; give Net\(\)"),
        (lambda m: [m], r"a list is no torch.nn.Module; put Net into one, such as a torch.nn.ModuleDict"),
        (lambda m: {}, r"a dict is no torch.nn.Module\."),
    ],
    ids=["class", "list", "nothing"],
)
def test_what_is_no_model_is_told_what_works(made: Callable[[Any], Any], says: str) -> None:
    job = Kind()
    with pytest.raises(TypeError, match=f"model: {says}"):
        AutoLRS(made(job.model), job.optimizer, max_steps=7, lr_range=(1e-3, 1.0), train_step=job.validate)


def test_misuse_of_functions_and_folders(tmp_path: Path) -> None:
    job = Kind()
    with pytest.raises(TypeError, match=r"validate: a list cannot be called; give a function"):
        tuner_of(job, validate=[1, 2])
    with pytest.raises(
        TypeError, match=r"validate: a DataLoader cannot be called; .* goes through your loader"
    ):
        tuner_of(job, validate=DataLoader([1, 2]))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir='.*file': is a file; give a folder"):
        tuner_of(job, run_dir=tmp_path / "file")
    for under in ("run", "some/run"):
        with pytest.raises(
            ValueError, match=r"run_dir='.*run': is under '.*file', which is a file; give a fold"
        ):
            tuner_of(job, run_dir=tmp_path / "file" / under)


@pytest.mark.parametrize(
    "numbers",
    [
        {"max_steps": np.int64(7), "lr_range": (np.float64(1e-3), np.float32(1.0)), "seed": np.int32(0)},
        {"max_steps": np.array(7), "lr_range": np.array([1e-3, 1.0]), "prior": np.float64(0.1)},
        {"max_steps": torch.tensor(7), "lr_range": torch.tensor([1e-3, 1.0], dtype=torch.float64)},
        {"max_steps": np.uint8(7), "lr_range": [torch.tensor(0.5), np.float16(1.0)]},
    ],
    ids=["scalars", "arrays", "tensors", "mixed"],
)
def test_numbers_of_numpy_and_torch_will_do(numbers: dict[str, Any], tmp_path: Path) -> None:
    with script(PLAN):
        tuner = tuner_of(Kind(), run_dir=tmp_path, **numbers)
        tuner.run()
    assert len(tuner.schedule) == 7
    assert tuner.ledger.search.steps == 11


def test_after_close_nothing_is_trained(tmp_path: Path) -> None:
    job = Kind()
    with script(PLAN):
        tuner = tuner_of(job, run_dir=tmp_path)
        action = tuner.next_action()
        tuner.close()
        before = everything(job)
        for call in (tuner.run, tuner.find, tuner.next_action, lambda: tuner.perform(action)):
            with pytest.raises(RuntimeError, match=r"AutoLRS: was closed; make a new one"):
                call()
        with pytest.raises(RuntimeError, match=r"AutoLRS: was closed"):
            tuner.tell(Result((1.0, 1.0)))
        assert everything(job) == before
        assert len(tuner.schedule) == 0  # what was found can still be read
        tuner_of(Kind(), run_dir=tmp_path).run()


def test_what_a_signal_handler_saves_in_a_probe_is_of_the_real_step() -> None:
    job, whole, saved = Kind(), Kind(), []
    with script(PLAN):
        tuner = tuner_of(job)

    def after(loss: torch.Tensor, index: torch.Tensor) -> None:
        with tuner.as_trained():
            saved.append(({n: bits(v) for n, v in job.model.state_dict().items()}, job.rates()))

    job.after = after  # type: ignore[method-assign]
    tuner.run()
    with script(PLAN):
        tuner_of(whole).run()
    assert everything(job) == everything(whole)
    real, probed = saved[1], saved[2 : 2 + 9]
    assert len(saved) == 7 + 11
    assert probed == [real] * 9


def test_a_lock_that_workers_have_inherited_ends_with_close(tmp_path: Path) -> None:
    job = Kind()
    with script(PLAN):
        tuner = tuner_of(job, run_dir=tmp_path)
        workers = iter(DataLoader(list(range(4)), num_workers=1, persistent_workers=True))  # a fork
        next(workers)
        tuner.close()
        tuner_of(Kind(), run_dir=tmp_path).run()
    del workers


def test_a_set_counts_by_what_is_in_it() -> None:
    """Two that are equal may be iterated over in another order."""
    assert list({0, 8}) != list({8, 0})
    assert digest_of({"seen": {0, 8}}) == digest_of({"seen": {8, 0}}) != digest_of({"seen": {0, 9}})


@pytest.mark.parametrize("kind", [str, str.encode, lambda text: bytearray(text.encode())])
def test_a_long_value_counts_by_all_of_it(kind: Callable[[str], Any]) -> None:
    assert digest_of(kind("a" * 999)) == digest_of(kind("a" * 999)) != digest_of(kind("a" * 998 + "b"))


def test_the_rate_reaches_optimizers_that_are_held() -> None:
    job = InAContainer()
    with script(PLAN):
        tuner_of(job).run()
    assert job.rates() == pytest.approx([0.01, 0.01, 0.002])
