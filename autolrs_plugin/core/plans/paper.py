"""AutoLRS as published (Jin et al., ICLR 2021, algorithm 1), with durations that scale with the run.

Notation: a stage trains tau steps; each of k candidates is probed for tau' = tau / 10 of them from the stage's first
weights; the forecast of its loss at tau goes to the search, which asks by a lower confidence bound.

tau doubles from stage to stage, up to eight times the first one, as in the paper; the paper's 1000 steps are
FIRST_STAGE of the run here. Stages of the full tau are judged by the validation loss, earlier ones by the training
loss. The paper's warm-up is hand-made and needs to know the peak; here the first stage starts at step 0.
"""

import functools
import math
from collections.abc import Generator, Iterator

from autolrs_plugin.core.actions import Action, Done, Probe, Restore, Result, Snapshot
from autolrs_plugin.core.forecast import forecast
from autolrs_plugin.core.plans.training import diverged_above, train
from autolrs_plugin.core.search import LRSearch
from autolrs_plugin.core.state import Candidate, Plan, RunState, Stage, probe_together

CANDIDATES = 10
PROBE_SHARE = 10
FIRST_STAGE = 0.05
DOUBLINGS = 3
KAPPA = 1.96


def stages(steps: int) -> Iterator[tuple[int, bool]]:
    """Yield (stop, full) of each stage of a run: the step at which it ends, and whether its tau is the longest."""
    tau = max(1, round(FIRST_STAGE * steps))
    stop, longest = 0, tau * 2**DOUBLINGS
    while stop < steps:
        stop = min(steps, stop + tau)
        yield stop, tau == longest
        tau = min(longest, 2 * tau)


def probe_steps(steps: int) -> int:
    """Return tau' of a stage of `steps` steps."""
    return max(1, steps // PROBE_SHARE)


def search_cost(steps: int, eval_cost_steps: float) -> float:
    """Return what the search of a run of `steps` steps costs, in steps, if no probe diverges."""
    cost, start = 0.0, 0
    for stop, full in stages(steps):
        cost += CANDIDATES * (probe_steps(stop - start) + (eval_cost_steps if full else 0.0))
        start = stop
    return cost


def paper_plan(state: RunState) -> Plan:
    """Search and train stage by stage; the last stage ends the run, without a decay."""
    above = math.inf
    for stop, full in stages(state.config.max_steps):
        yield Snapshot()
        stage = yield from _search(state, stop - state.step, full, above)
        state.stages.append(stage)
        yield Restore()
        if not math.isfinite(above):
            above = diverged_above(next((c.losses[0] for c in stage.candidates if c.losses), math.inf))
        yield from train(state, functools.partial(_constant, stage.chosen_lr), stop)
    yield Done()


def _constant(lr: float, step: int) -> float:
    return lr


def _search(state: RunState, tau: int, full: bool, above: float) -> Generator[Action, Result, Stage]:
    """Probe k candidates for a stage of `tau` steps and return the Stage."""
    config = state.config
    search = LRSearch(*config.lr_range, kappa=KAPPA)
    index, before = len(state.stages), state.ledger.search.steps
    candidates: list[Candidate] = []
    evaluate = full and config.validation
    while len(candidates) < CANDIDATES:
        asked = search.ask(min(config.parallel_probes, CANDIDATES - len(candidates)))
        probes = [
            Probe(index, i, (lr,) * probe_steps(tau), above, evaluate, draw=i)
            for i, lr in enumerate(asked, start=len(candidates))
        ]
        results = yield from probe_together(state, probes, again=True)
        for lr, probe, result in zip(asked, probes, results, strict=True):
            loss, std = math.inf, 0.0
            if len(result.losses) == len(probe.lrs) and all(map(math.isfinite, result.losses)):
                predicted = forecast(result.losses, tau)
                loss, std = predicted.loss, predicted.std
                if evaluate and result.val_loss is not None:
                    loss, std = result.val_loss, 0.0
            search.tell(lr, loss, std)
            told, taken = search.observations[-1], len(result.losses)
            candidates.append(
                Candidate(lr, probe.lrs[:taken], result.losses, result.val_loss, told.loss, told.std)
            )
    decision = search.decide()
    spent = state.ledger.search.steps - before
    reason = f"the lowest forecast of the loss after {tau} steps"
    return Stage(index, state.step, "paper", tuple(candidates), decision.lr, spent, reason)
