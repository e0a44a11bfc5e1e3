"""The methods that `autolrs bench` compares, each with the same compute C on the same task.

C counts everything: training steps, and the evaluations that a method decides by, each at its measured cost in
training steps. Evaluations for the learning curve are the judge's, and are on nobody's account.

    constant, cosine, wsd   the task's default learning rate; cosine and wsd warm up for 5%
    sweep                   five cosines of C/5 steps at a practitioner's five learning rates, the best kept
    asha                    Optuna's successive halving over the span of those five: cosines of at most C/4 steps
    greedylr                transformers' GreedyLR from the default learning rate, fed 50 validation losses
    schedule-free           schedulefree's AdamW or SGD at its own default, 5% warm-up as its authors advise
    prodigy                 prodigyopt at lr=1 with cosine annealing, as its authors advise
    oracle                  the five cosines at C steps each: 5C in all, the reference that nobody can afford
    autolrs                 this package, told a range of seven decades and the optimizer with its default rate
    autolrs-no-prior        the same, with the default rate forgotten
    autolrs-once            the same, with the search before the first step alone
    autolrs-warm            the same, warm-started by its own run of another seed, which is not counted
    autolrs-paper           AutoLRS as published
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from autolrs_plugin.benchmark.tasks import Problem, Task

WARMUP = 0.05
CURVE_POINTS = 25
GREEDY_EVALUATIONS = 50
ASHA_TRIAL = 4
ASHA_REDUCTION = 4

Curve = list[tuple[float, float]]
"""(compute so far in steps, validation loss), in the order in which it was paid for."""


@dataclass(frozen=True)
class Assignment:
    """What a method is given.

    Attributes:
        task: the reference task.
        seed: of weights and minibatches.
        steps: C, the compute in training steps.
        eval_cost_steps: what one evaluation costs, in training steps, as measured.
        on_steps: told of training steps as they are taken.
    """

    task: Task
    seed: int
    steps: int
    eval_cost_steps: float
    on_steps: Callable[[int], None] = lambda steps: None


@dataclass
class Outcome:
    """What a method came to.

    Attributes:
        lr: the learning rate that it ended with (the peak, where it has one).
        final_val_loss: validation loss of the weights that it hands over; infinite if it diverged.
        steps_total: compute in all, in training steps.
        steps_search: what of that did not train the weights handed over.
        curve: validation losses along all of it.
        seconds: wall time, without the judge's evaluations.
        overheads: of ours: `deciding` (share of the wall time) and `snapshot_steps` (a snapshot or restore, in steps).
    """

    lr: float
    final_val_loss: float
    steps_total: float
    steps_search: float
    curve: Curve
    seconds: float = 0.0
    overheads: dict[str, float] = field(default_factory=dict)


@dataclass
class Training:
    """One training run from fresh weights: the plain loop that everybody but autolrs uses."""

    assignment: Assignment
    optimizer: Callable[[Problem], torch.optim.Optimizer]
    points: int = CURVE_POINTS
    curve: Curve = field(default_factory=list)
    judge_s: float = 0.0
    steps_taken: int = 0

    def __post_init__(self) -> None:
        self.problem = self.assignment.task.build(self.assignment.seed)
        self.problem.model.train()
        self._optimizer = self.optimizer(self.problem)
        self._rng = np.random.default_rng([self.assignment.seed, 1])

    def run(self, steps: int, lr_at: Callable[[int], float] | None, stop: int | None = None) -> float:
        """Train from the present step to `stop` of `steps`, and return the validation loss there."""
        loss = math.inf
        stop = steps if stop is None else stop
        every = max(1, steps // self.points)
        while self.steps_taken < stop:
            if lr_at is not None:
                for group in self._optimizer.param_groups:
                    group["lr"] = lr_at(self.steps_taken)
            self.problem.at(self.steps_taken / steps)
            value = self.assignment.task.step(self.problem, self._optimizer, self.problem.draw(self._rng))
            self.steps_taken += 1
            self.assignment.on_steps(1)
            if not math.isfinite(value):
                return math.inf  # the rest of its steps would only be burnt
            if self.steps_taken % every == 0 or self.steps_taken == stop:
                loss = self._judge()
                self.curve.append((self.steps_taken, loss))
        return loss

    def _judge(self) -> float:
        started = time.perf_counter()
        loss = validate(self.problem, self._optimizer, self._rng)
        self.judge_s += time.perf_counter() - started
        return loss if math.isfinite(loss) else math.inf


def validate(problem: Problem, optimizer: Any, rng: np.random.Generator) -> float:
    """Return the validation loss, at the averaged weights where the optimizer keeps such (Schedule-Free)."""
    if not hasattr(optimizer, "eval"):
        return problem.validate()
    weights = [p.detach().clone() for p in problem.parameters()]
    optimizer.eval()
    norms = [m for m in problem.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    if norms:
        # Their running statistics belong to other weights; its authors advise to refresh them before evaluating.
        with torch.no_grad():
            for _ in range(50):
                problem.model(problem.draw(rng)[0])
    loss = problem.validate()
    optimizer.train()
    with torch.no_grad():  # there and back again rounds
        for parameter, weight in zip(problem.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return loss


def cosine(peak: float, steps: int) -> Callable[[int], float]:
    """Return linear warm-up over 5% and a half cosine to zero."""
    warmup = round(WARMUP * steps)

    def lr_at(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return lr_at


def wsd(peak: float, steps: int) -> Callable[[int], float]:
    """Return linear warm-up over 5%, a plateau, and a linear decay to zero over the last 20%."""
    warmup, decay = round(WARMUP * steps), max(1, round(0.2 * steps))
    return lambda step: peak * min((step + 1) / (warmup + 1), 1.0, (steps - step) / decay)


def simple(a: Assignment, lr_at: Callable[[int], float], peak: float) -> Outcome:
    """One run of C steps with a given schedule."""
    training = Training(a, lambda problem: a.task.optimizer(problem, peak))
    final = training.run(a.steps, lr_at)
    return _outcome(peak, final, training, a.steps)


def _outcome(lr: float, final: float, training: Training, steps: float) -> Outcome:
    return Outcome(lr, final, steps, 0.0, training.curve, -training.judge_s)


def cosines(a: Assignment, total: float) -> Outcome:
    """Five cosines that share `total` steps; the best one is kept."""
    each = int(total / len(a.task.grid) - a.eval_cost_steps)
    cost, curve, judge_s, best = 0.0, [], 0.0, (math.inf, a.task.grid[0])
    for lr in a.task.grid:
        training = Training(a, functools.partial(a.task.optimizer, lr=lr))
        best = min(best, (training.run(each, cosine(lr, each)), lr))
        curve += [(cost + step, loss) for step, loss in training.curve]
        cost += each + a.eval_cost_steps
        judge_s += training.judge_s
    return Outcome(best[1], best[0], cost, cost - each, curve, -judge_s)


def asha(a: Assignment) -> Outcome:
    """Successive halving with Optuna: trials at learning rates of its own choice until C is spent."""
    import optuna  # heavy, and only this method needs it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    most = a.steps // ASHA_TRIAL
    rungs = sorted({most // ASHA_REDUCTION**k for k in (0, 1, 2)})
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=a.seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=ASHA_REDUCTION),
    )
    cost, curve, judge_s, best = 0.0, [], 0.0, (math.inf, a.task.grid[0], 0)
    # A trial is only begun if it can be finished: what is handed over must have had its decay.
    while cost + most + len(rungs) * a.eval_cost_steps <= a.steps:
        trial = study.ask()
        lr = trial.suggest_float("lr", a.task.grid[0], a.task.grid[-1], log=True)
        training = Training(a, functools.partial(a.task.optimizer, lr=lr))
        loss, pruned = math.inf, False
        for rung, stop in enumerate(rungs):
            loss = training.run(most, cosine(lr, most), stop)
            curve += [(cost + stop, loss)]
            trial.report(loss if math.isfinite(loss) else 1e6, ASHA_REDUCTION**rung)
            pruned = not math.isfinite(loss) or (rung < len(rungs) - 1 and trial.should_prune())
            if pruned:
                break
        cost += training.steps_taken + (rung + 1) * a.eval_cost_steps
        judge_s += training.judge_s
        if pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, loss)
            best = min(best, (loss, lr, most))
    return Outcome(best[1], best[0], cost, cost - best[2], curve, -judge_s)


def greedylr(a: Assignment) -> Outcome:
    """transformers' GreedyLR at its defaults, stepped by the validation loss as its Trainer does."""
    from transformers.optimization import GreedyLR  # heavy, and only this method needs it

    lr = a.task.default_lr
    # Half of C at most goes into the evaluations that it needs.
    count = max(2, min(GREEDY_EVALUATIONS, int(0.5 * a.steps / max(a.eval_cost_steps, 1e-9))))
    steps = int(a.steps - count * a.eval_cost_steps)
    training = Training(a, lambda problem: a.task.optimizer(problem, lr), points=count)
    scheduler = GreedyLR(training._optimizer, mode="min")
    final = math.inf
    for i in range(count):
        final = training.run(steps, None, round((i + 1) * steps / count))
        if not math.isfinite(final):
            break
        scheduler.step(final)
    scale = a.steps / steps
    curve = [(step * scale, loss) for step, loss in training.curve]
    return Outcome(training._optimizer.param_groups[0]["lr"], final, a.steps, 0.0, curve, -training.judge_s)


def schedule_free(a: Assignment) -> Outcome:
    """Schedule-Free SGD or AdamW at its default learning rate."""
    import schedulefree  # only this method needs it

    def optimizer(problem: Problem) -> torch.optim.Optimizer:
        kind = schedulefree.SGDScheduleFree if a.task.sgd else schedulefree.AdamWScheduleFree
        made = kind(problem.parameters(), warmup_steps=round(WARMUP * a.steps))
        made.train()
        return made

    training = Training(a, optimizer)
    lr = training._optimizer.param_groups[0]["lr"]
    return _outcome(lr, training.run(a.steps, None), training, a.steps)


def prodigy(a: Assignment) -> Outcome:
    """Prodigy at lr=1 under a cosine."""
    from prodigyopt import Prodigy  # only this method needs it

    training = Training(a, lambda problem: Prodigy(problem.parameters(), lr=1.0))

    def lr_at(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / a.steps))

    return _outcome(1.0, training.run(a.steps, lr_at), training, a.steps)


PEERS: dict[str, Callable[[Assignment], Outcome]] = {
    "constant": lambda a: simple(a, lambda _: a.task.default_lr, a.task.default_lr),
    "cosine": lambda a: simple(a, cosine(a.task.default_lr, a.steps), a.task.default_lr),
    "wsd": lambda a: simple(a, wsd(a.task.default_lr, a.steps), a.task.default_lr),
    "sweep": lambda a: cosines(a, a.steps),
    "asha": asha,
    "greedylr": greedylr,
    "schedule-free": schedule_free,
    "prodigy": prodigy,
    "oracle": lambda a: cosines(a, (a.steps + a.eval_cost_steps) * len(a.task.grid)),
}
"""Each peer by its name; the oracle comes last, because it takes five times as long."""
