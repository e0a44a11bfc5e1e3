"""A step is taken at the rate that AutoLRS has set, or the run ends and says so."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autolrs_plugin import AutoLRS
from autolrs_plugin.core.actions import Action, Probe, Restore, Snapshot, Train
from autolrs_plugin.training.lr import GroupRates
from tests.autolrs.jobs import Job
from tests.autolrs.scripted import script

PROBED: tuple[Action, ...] = (Snapshot(), Probe(0, 0, (0.5,) * 2, float("inf"), evaluate=False), Restore())
PLAN: tuple[Action, ...] = (Train(0, (0.05,) * 2), *PROBED, Train(2, (0.02,) * 2))


def train(step: Callable[..., Any], job: Job, plan: tuple[Action, ...], **options: Any) -> None:
    with script(plan):
        AutoLRS(
            job.model,
            job.optimizer,
            train_step=step,
            max_steps=4,
            lr_range=(1e-3, 1.0),
            progress=False,
            **options,
        ).run()


def assigned(job: Job, closure: bool) -> Callable[[], Any]:
    """Return a step that sets the second group's rate itself, before the optimizer's step or in its closure."""

    def backward() -> torch.Tensor:
        loss = job.model(job.inputs).square().mean()
        loss.backward()
        job.optimizer.param_groups[1]["lr"] = 0.003
        return loss

    def step() -> torch.Tensor:
        job.optimizer.zero_grad()
        if closure:
            return job.optimizer.step(backward)
        loss = backward()
        job.optimizer.step()
        return loss

    return step


@pytest.mark.parametrize("closure", [False, True], ids=["before the step", "in its closure"])
@pytest.mark.parametrize("plan", [PLAN, PROBED], ids=["real step", "probe"])
def test_a_rate_that_the_step_sets_itself_ends_the_run(plan: tuple[Action, ...], closure: bool) -> None:
    job = Job("adamw")
    wanted = 0.05 if plan is PLAN else 0.5
    with pytest.raises(
        RuntimeError,
        match=rf"lr of param_groups\[1\] \(AdamW\) was set to {wanted}, and the step was taken at 0.003, .* leave the "
        "rate to AutoLRS: remove the scheduler or the assignment",
    ):
        train(assigned(job, closure), job, plan)
    assert not job.optimizer._optimizer_step_pre_hooks


def test_a_scheduler_in_the_step_may_set_the_rate_of_the_next_step_alone() -> None:
    """AutoLRS sets it anew then; before the optimizer's step, it is what the step is taken at."""
    for first in (False, True):
        job = Job("adam-capturable-lr")
        rates = [lambda n: 0.9**n, lambda n: 0.8**n]  # each group has its own
        scheduler = torch.optim.lr_scheduler.LambdaLR(job.optimizer, rates)

        def step(job: Job = job, scheduler: Any = scheduler, first: bool = first) -> torch.Tensor:
            if first:
                scheduler.step()
            loss = job.step()
            if not first:
                scheduler.step()
            return loss

        if first:
            with pytest.raises(
                RuntimeError, match=r"lr of param_groups\[0\] \(Adam\) was set to 0.05, and the"
            ):
                train(step, job, PLAN, scheduler=scheduler)
        else:
            train(step, job, PLAN, scheduler=scheduler)
            assert scheduler.last_epoch == 4


def test_a_group_that_is_added_without_a_rate_has_that_of_the_others() -> None:
    """Whatever the warm-up has come to by then; one with a rate of its own keeps the ratio that it is added with."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(4)]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:2], "lr": 0.02}], lr=0.1)
    rates = GroupRates(optimizer)
    rates.set(0.011)
    optimizer.add_param_group({"params": parameters[2:3]})
    optimizer.add_param_group({"params": parameters[3:], "lr": 0.0011})
    rates.set(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.01, 0.05, 0.005])


class Container(torch.optim.Optimizer):
    """Trains with another optimizer, which it makes at its first step, or makes anew at a later one."""

    def __init__(self, params: Any, make: Callable[["Container"], Any], at: int, begin: bool) -> None:
        super().__init__(params, {"lr": 0.1})
        self.make, self.at, self.steps = make, at, 0
        self.inner: Any = torch.optim.SGD(self.parameters(), lr=0.1) if begin else None
        self.used: list[float] = []

    def parameters(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        if self.steps == self.at:
            self.inner = self.make(self)
        self.inner.step()
        self.used.append(float(self.inner.param_groups[0]["lr"]))


def stepping(job: Job, optimizer: Any) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        job.optimizer.zero_grad()
        loss = job.model(job.inputs).square().mean()
        loss.backward()
        (optimizer if not callable(optimizer) else optimizer()).step()
        return loss.detach()

    return step


MAKES: dict[str, Callable[[Container], Any]] = {
    "as the container was": lambda c: torch.optim.AdamW(c.parameters(), lr=0.1),
    "at the rate of its groups": lambda c: torch.optim.SGD(
        [{"params": g["params"], "lr": g["lr"]} for g in c.param_groups], lr=1.0
    ),
    "at a tensor": lambda c: torch.optim.Adam(c.parameters(), lr=torch.tensor(0.1), capturable=False),
}


@pytest.mark.parametrize(("at", "begin"), [(1, False), (2, True), (4, True)], ids=["first", "amid", "later"])
@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
def test_an_optimizer_that_another_makes_on_the_way_has_its_rate_from_its_first_step_on(
    make: Callable[[Container], Any], at: int, begin: bool
) -> None:
    job = Job("sgd")
    job.optimizer = container = Container(job.model.parameters(), make, at, begin)
    train(stepping(job, container), job, PLAN)
    assert container.used == pytest.approx([0.05, 0.05, 0.02, 0.02])  # a rollback takes the probe's away


def test_an_optimizer_that_another_makes_at_a_rate_of_its_own_is_named() -> None:
    job = Job("sgd")
    make = lambda c: torch.optim.SGD(c.parameters(), lr=0.033)  # noqa: E731
    job.optimizer = container = Container(job.model.parameters(), make, 2, True)
    with pytest.raises(
        RuntimeError, match=r"optimizer: holds an? SGD since this step, with the lr 0.033, whose ratio"
    ):
        train(stepping(job, container), job, PLAN)


@pytest.mark.parametrize("since", [0, 3])
def test_a_step_with_another_optimizer_of_the_same_weights_ends_the_run(since: int) -> None:
    job, taken = Job("adamw"), [0]
    other = torch.optim.SGD(job.model.parameters(), lr=0.1)

    def chosen() -> Any:
        taken[0] += 1
        return other if taken[0] > since else job.optimizer

    with pytest.raises(
        RuntimeError,
        match=r"train_step: takes a step with an? SGD that AutoLRS was not given, .* lr 0.1, where 0.\d+ was set",
    ):
        train(stepping(job, chosen), job, PLAN)


class Around(torch.optim.Optimizer):
    """Holds the optimizer that AutoLRS was given, and has groups of its own, whose rate nobody uses."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], {"lr": 7.0})

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_optimizers_of_other_weights_and_those_around_the_given_one_are_left_alone() -> None:
    job, other = Job("adamw"), torch.nn.Parameter(torch.ones(2))
    second, around = torch.optim.SGD([other], lr=0.3), Around(job.optimizer)

    def both() -> Any:
        other.grad = torch.ones(2)
        second.step()
        return around

    train(stepping(job, both), job, PLAN)
    assert second.param_groups[0]["lr"] == 0.3
    assert around.param_groups[0]["lr"] == 7.0
    assert other.tolist() == pytest.approx([1 - 4 * 0.3] * 2)


@pytest.mark.parametrize("when", [1, 2, 4])
def test_a_rate_that_a_loaded_state_brings_along_is_named(when: int) -> None:
    """load_state_dict() makes the groups anew, at its own rates; in whichever step it comes."""
    job = Job("momentum")
    first, taken = copy.deepcopy(job.optimizer.state_dict()), [0]

    def step() -> Any:
        taken[0] += 1
        if taken[0] == when:
            job.optimizer.load_state_dict(first)
        return job.step()

    plan = (Train(0, (0.05,) * 3), Train(3, (0.02,) * 3))
    with script(plan):
        tuner = AutoLRS(
            job.model, job.optimizer, train_step=lambda batch: step(), train_data=[0], max_steps=6,
            lr_range=(1e-3, 1.0), progress=False,
        )  # fmt: skip
    rate = 0.05 if when < 4 else 0.02
    with pytest.raises(RuntimeError, match=rf"lr of param_groups\[0\].* set to {rate}, .* taken at 0\.1,"):
        tuner.run()


def test_groups_that_are_made_anew_keep_their_ratios() -> None:
    job = Job("momentum")
    job.optimizer.param_groups[1]["lr"] = 0.2
    rates = []

    def step(_: int) -> Any:
        loss = job.step()
        rates.append([group["lr"] for group in job.optimizer.param_groups])
        job.optimizer.load_state_dict(job.optimizer.state_dict())
        return loss

    train(step, job, (Train(0, (0.05,) * 2), Train(2, (0.02, 0.04))), train_data=[0])
    assert rates == [[0.05, 0.1], [0.05, 0.1], [0.02, 0.04], [0.04, 0.08]]


class OfItsOwn(torch.optim.Optimizer):
    """Trains at a rate that it noted when it was made."""

    def __init__(self, params: Any, lr: float, reads: str) -> None:
        super().__init__(params, {"lr": lr})
        self.lr, self.reads = lr, reads

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=self.lr if self.reads == "its own" else group["lr"])


@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("reads", ["its own", "the group's"])
def test_an_optimizer_on_which_the_rate_has_no_effect_is_named(
    reads: str, driven: bool, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job("sgd")
    job.optimizer = OfItsOwn(job.model.parameters(), 0.01, reads)
    probes = [Probe(0, i, (lr,) * 2, float("inf"), evaluate=False) for i, lr in enumerate((0.5, 0.02, 0.1))]
    options = {"observers": [Silent()]} if driven else {}
    train(stepping(job, job.optimizer), job, (Snapshot(), *probes, Restore()), **options)
    said = [text for text in caplog.messages if "have come to the same weights, so an OfItsOwn" in text]
    assert len(said) == (reads == "its own")


class Silent:
    """An observer, for which more is looked at."""

    def on_action(self, *_: Any) -> None: ...

    def on_step(self, *_: Any) -> None: ...

    def on_result(self, *_: Any) -> None: ...

    def close(self) -> None: ...
