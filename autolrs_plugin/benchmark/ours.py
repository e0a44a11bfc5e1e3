"""AutoLRS as a method of the benchmark: told nothing but a range of seven decades and C steps in all."""

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from autolrs_plugin.benchmark.methods import CURVE_POINTS, Assignment, Curve, Outcome, validate
from autolrs_plugin.benchmark.tasks import Batch, Problem, Task
from autolrs_plugin.core.actions import Action, Done, Evaluate, Probe, Result, Train
from autolrs_plugin.core.config import SEARCH_BUDGET
from autolrs_plugin.core.plans.paper import search_cost
from autolrs_plugin.integrations.torch_loop import AutoLRS

LR_RANGE = (1e-6, 10.0)
EPOCH = 50
"""Minibatches in one pass of the stream that AutoLRS is given: they are drawn at random, without end."""

EARLIER = 1000
"""The seed of the run that a warm start comes from is so far away from all others."""


def as_arguments(task: Task, seed: int) -> dict[str, Any]:
    """Return a reference task as AutoLRS takes it, keyword by keyword."""
    return _arguments(task, task.build(seed), seed)


def _arguments(task: Task, problem: Problem, seed: int) -> dict[str, Any]:
    problem.model.train()
    optimizer = task.optimizer(problem, task.default_lr)
    rng = np.random.default_rng([seed, 1])

    def batches() -> Iterator[Batch]:
        for _ in range(EPOCH):
            yield problem.draw(rng)

    return {
        "model": problem.model,
        "optimizer": optimizer,
        "train_step": lambda batch: task.step(problem, optimizer, batch),
        "validate": lambda: validate(problem, optimizer, np.random.default_rng(0)),
        "train_data": batches,
        "generators": [rng],
    }


def autolrs(a: Assignment) -> Outcome:
    """The default: told the optimizer, and so its learning rate."""
    return tuned(a, _steps(a), "staged")


def autolrs_no_prior(a: Assignment) -> Outcome:
    """The default, with the optimizer's learning rate forgotten."""
    return tuned(a, _steps(a), "staged", prior=None)


def autolrs_once(a: Assignment) -> Outcome:
    """The search before the first step alone."""
    return tuned(a, _steps(a), "once")


def autolrs_warm(a: Assignment) -> Outcome:
    """The default, warm-started by its own run with other weights and minibatches, which is on nobody's account."""
    with tempfile.TemporaryDirectory(prefix="autolrs-") as folder:
        tuned(
            Assignment(a.task, a.seed + EARLIER, a.steps, a.eval_cost_steps),
            _steps(a),
            "staged",
            run_dir=folder,
        )
        return tuned(a, _steps(a), "staged", warm_start=folder)


def _steps(a: Assignment) -> int:
    """Return the steps of the run: what the largest search that it may do leaves of C."""
    return int(a.steps / (1 + SEARCH_BUDGET))


def autolrs_paper(a: Assignment) -> Outcome:
    """AutoLRS as published: the longest run whose search and training come to C."""
    steps = a.steps
    while steps > 1 and steps + search_cost(steps, a.eval_cost_steps) > a.steps:
        steps -= 1
    return tuned(a, steps, "paper")


def tuned(a: Assignment, steps: int, mode: str, **settings: Any) -> Outcome:
    """Return what one run of `steps` steps comes to, on the same weights and minibatches as the peers'."""
    problem = a.task.build(a.seed)
    tuner = AutoLRS(
        **_arguments(a.task, problem, a.seed),
        max_steps=steps,
        lr_range=LR_RANGE,
        seed=a.seed,
        progress=False,
        mode=mode,
        **settings,
        eval_cost_steps=a.eval_cost_steps,
        evaluations=CURVE_POINTS,
    )
    curve: Curve = []
    cost = 0.0
    while not isinstance(action := tuner.next_action(), Done):
        if isinstance(action, Train):
            problem.at(action.first_step / steps)
        result = tuner.perform(action)
        tuner.tell(result)
        cost += _cost(action, result, a.eval_cost_steps)
        a.on_steps(len(result.losses))
        if isinstance(action, Evaluate) and result.val_loss is not None:
            curve.append((cost, result.val_loss))
    tuner.close()
    ledger = tuner.ledger
    return Outcome(
        lr=max(tuner.schedule.lrs),
        final_val_loss=curve[-1][1],
        steps_total=cost,
        steps_search=cost - steps,
        curve=curve,
        seconds=-ledger.evaluation.seconds,
        overheads={
            "deciding": ledger.deciding_s / (ledger.seconds - ledger.evaluation.seconds),
            "snapshot_steps": ledger.snapshot.seconds / max(1, ledger.snapshot.times) / ledger.step_seconds,
        },
    )


def _cost(action: Action, result: Result, eval_cost_steps: float) -> float:
    """Return what an action cost in training steps; evaluations along the run are the judge's."""
    if not isinstance(action, Probe | Train):
        return 0.0
    evaluated = isinstance(action, Probe) and result.val_loss is not None
    return len(result.losses) + (eval_cost_steps if evaluated else 0.0)
