"""A step is taken at the rate that AutoLRS has set, or the run ends and says so."""

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


def train(step: Callable[[], Any], job: Job, plan: tuple[Action, ...], **options: Any) -> None:
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
