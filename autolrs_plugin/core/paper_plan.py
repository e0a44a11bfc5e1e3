"""AutoLRS as published (Jin et al., ICLR 2021, algorithm 1), with durations that scale with the run.

Notation: a stage trains tau steps; each of k candidates is probed for tau' = tau / 10 of them from the stage's first
weights; the forecast of its loss at tau goes to the search, which asks by a lower confidence bound.

tau doubles from stage to stage, up to eight times the first one, as in the paper; the paper's 1000 steps are
FIRST_STAGE of the run here. Stages of the full tau are judged by the validation loss, earlier ones by the training
loss. The paper's warm-up is hand-made and needs to know the peak; here the first stage starts at step 0.
"""

import math

from autolrs_plugin.core.actions import Done, Probe, Restore, Snapshot
from autolrs_plugin.core.forecast import forecast
from autolrs_plugin.core.search import LRSearch
from autolrs_plugin.core.state import Candidate, Plan, RunState, Stage, probe_together
from autolrs_plugin.core.training_plan import diverged_above, train

CANDIDATES = 10
PROBE_SHARE = 10
FIRST_STAGE = 0.05
DOUBLINGS = 3
KAPPA = 1.96


def paper_plan(state: RunState) -> Plan:
    """Search and train stage by stage; the last stage ends the run, without a decay."""
    steps = state.config.max_steps
    tau, longest = max(1, round(FIRST_STAGE * steps)), max(1, round(FIRST_STAGE * steps)) * 2**DOUBLINGS
    above = math.inf
    while state.step < steps:
        stop = min(steps, state.step + tau)
        yield Snapshot()
        stage = yield from _search(state, stop - state.step, tau == longest, above)
        state.stages.append(stage)
        yield Restore()
        if not math.isfinite(above):
            above = diverged_above(next((c.losses[0] for c in stage.candidates if c.losses), math.inf))
        yield from train(state, lambda _, lr=stage.chosen_lr: lr, stop, above)  # type: ignore[misc]
        tau = min(longest, 2 * tau)
    yield Done()


def _search(state: RunState, tau: int, full: bool, above: float):  # type: ignore[no-untyped-def]
    """Probe k candidates for a stage of `tau` steps and return the Stage."""
    config = state.config
    search = LRSearch(*config.lr_range, kappa=KAPPA)
    index, before = len(state.stages), state.ledger.search.steps
    candidates: list[Candidate] = []
    evaluate = full and config.validation
    while len(candidates) < CANDIDATES:
        asked = search.ask(min(config.parallel_probes, CANDIDATES - len(candidates)))
        probes = [
            Probe(index, i, (lr,) * max(1, tau // PROBE_SHARE), above, evaluate, draw=i)
            for i, lr in enumerate(asked, start=len(candidates))
        ]
        results = yield from probe_together(state, probes)
        for lr, probe, result in zip(asked, probes, results, strict=True):
            loss, std = math.inf, 0.0
            if len(result.losses) == len(probe.lrs):
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
