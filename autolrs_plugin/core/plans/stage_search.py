"""The probes of one stage of a run, and what they say together."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from autolrs_plugin.core.actions import Action, Probe, Result
from autolrs_plugin.core.plans.bracket import FAR, LEAST_SHARE, bracket_rates, fallen, far_rates
from autolrs_plugin.core.plans.horizon import long_run
from autolrs_plugin.core.plans.probing import (
    Tried,
    ends_alike,
    hopeless_above,
    losses_of,
    no_fault_of_the_rate,
    probe_rates,
    shortfalls,
    tried,
)
from autolrs_plugin.core.posterior import APART_DECADES, BRACKET, GUESS, RatePosterior, Seen, Verdict
from autolrs_plugin.core.state import RunState, probe_together

Stages: TypeAlias = Generator[Action, Result, bool]
"""A part of a plan: yields actions and is sent their results; returns whether it was left before its end."""

WIDTHS = (1.0, 0.5)
"""Decades over which a stage expects rates to differ."""

NO_PRIOR_WIDTH = 1.5
REACH, REACH_WIDE = 0.6, 1.5
"""The decades up and down that a stage looks at along the run, and after a change."""

LOST, LOST_STD = 1.0, 0.8
"""Of a probe that did not hold, the shortfall: it gained nothing, at best; so rates near to it are worth little. A
smaller standard deviation makes a stage miss good rates nearby; without the shortfall it probes beyond."""

LOOK_BELOW = 0.4
"""Where the present rate gains nothing, though the run has gained, this multiple of it is probed next."""

COLD_STD = 0.05
"""Standard deviation of a shortfall from the first weights, for what so early probes cannot know."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a stage is asked for.

    Attributes:
        present: the learning rate in use.
        known: whether that is somebody's choice; otherwise it is only where the search begins.
        index: which of the planned stages it is like.
        steps: length of its probes.
        evaluate: whether they are evaluated.
        even: whether a lower rate is as likely to be better as a higher one: where the run has gone wrong, or has
            changed, or where the present rate is a guess from the first weights.
        wide: whether the best rate may be a decade and more away.
        undecided: whether the stage before would have gone far, had the evidence been clearer.
        far: the rate that it would have gone to; its probes are then those of `bracket.far_rates`.
        above: a loss above this has exploded.
        bracket: whether its probes are those of `bracket`, if they are long enough.
        guess: whether the present rate was chosen by an earlier stage, and not by the user.
        first_loss: the training loss before the first step; nan before that.
        run_gained: whether the run has gained something so far.
        earlier: what the probes of earlier stages said.
        again: whether a probe that was stopped is taken again.
    """

    present: float
    known: bool
    index: int
    steps: int
    evaluate: bool
    even: bool
    wide: bool
    undecided: bool
    far: float | None
    above: float
    bracket: bool
    guess: bool
    first_loss: float
    run_gained: bool
    earlier: tuple[Seen, ...]
    again: bool


class StageSearch:
    """The probes of one stage."""

    def __init__(self, state: RunState, ask: Asked) -> None:
        config = state.config
        self._state, self._asked = state, ask
        self._width = WIDTHS[0 if ask.undecided else ask.index] if ask.known or state.step else NO_PRIOR_WIDTH
        self.number = len(state.stages)
        self.cold = not state.step
        self.present = ask.present
        self.done: list[Tried] = []
        self._sign = -1.0 if config.greater_is_better else 1.0
        self._steps = ask.steps
        self._blind = False
        self._bracket = ask.bracket and ask.steps >= LEAST_SHARE * config.max_steps

    @property
    def _free(self) -> bool:
        """Whether there is nothing to be kept: no prior, or one that does not hold."""
        return (self.cold and not self._asked.known) or (bool(self.done) and not self.done[0].held)

    @property
    def far(self) -> float | None:
        """The rate for the long run of the best probe, if a bracket around the present rate would not reach it."""
        apart = math.log10(self._best / self.present)
        if abs(apart) <= FAR:
            return None
        return long_run(self._best, None) if apart > 0 else self._best

    @property
    def looks_far(self) -> bool:
        """Whether its probes are those of `bracket.far_rates`."""
        return self._asked.far is not None

    @property
    def held(self) -> list[Tried]:
        """The probes that held."""
        return [p for p in self.done if p.held]

    @property
    def seen(self) -> list[Seen]:
        """What this stage's probes say; nothing where none held."""
        if not self.held:
            return []
        progress = self._state.step / self._state.config.max_steps
        return shortfalls(self.held, self._before, progress, COLD_STD if self.cold else 0.0)

    @property
    def _before(self) -> float:
        """The training loss before the stage."""
        recent = [loss for loss in self._state.losses[-self._steps :] if math.isfinite(loss)]
        recent = recent or [loss for p in self.held for loss in p.losses[:2]]
        return (
            float(np.mean(recent)) if recent else math.nan
        )  # none: no probe held, and nothing is asked of it

    @property
    def _ceiling(self) -> float:
        return min((p.lr for p in self.done if not p.held), default=math.inf)

    @property
    def _best(self) -> float:
        """The rate of the probe that came lowest; the present one before any."""
        held = self.held
        return held[int(np.argmin(losses_of(held)))].lr if held else self.present

    @property
    def _too_high(self) -> bool:
        """Whether the present rate gains nothing, though the run has gained, and no lower one has been looked at.

        A probe ends with a decay, and comes below the losses before it, unless its rate has moved the weights too far.
        """
        reference = self.done[0] if self.done else None
        if not self._asked.run_gained or reference is None or not reference.held:
            return False
        if any(p.lr < self.present for p in self.done):
            return False
        return float(losses_of(self.held)[0]) >= self._before

    def _posterior(self) -> RatePosterior:
        low, high = self._state.config.lr_range
        cold, wide = self.cold or self._free or self._asked.undecided, self._asked.wide
        reach = 10 ** (3 * self._width if cold else REACH_WIDE if wide else REACH)
        top = self.present * reach
        if self.cold and self._best * 10**APART_DECADES > top:
            top *= 10**self._width  # it is lowest at the very edge: the prior is too low by more than that
        low, high = max(low, self.present / reach), min(high, top)
        if self._ceiling <= high:
            below = [p.lr for p in self.held if p.lr < self._ceiling]
            fails = sum(not p.held for p in self.done)
            top = (
                math.sqrt(max(below) * self._ceiling)
                if below
                else self._ceiling * 10 ** (-self._width * fails)
            )
            high = min(high, max(top, low * 1.001))
        progress = self._state.step / self._state.config.max_steps
        lost = [Seen(math.log10(p.lr), progress, LOST, LOST_STD) for p in self.done if not p.held]
        seen = [*self._asked.earlier, *self.seen, *lost]
        evidence = (GUESS if self._asked.guess else BRACKET) if self._bracket else None
        return RatePosterior(self.present, self._width, progress, seen, low, high, evidence)

    def ask(self, count: int, least_hope: float) -> list[float]:
        """Return rates to probe next, the present one first of all; none where nothing is to be hoped for."""
        low, high = self._state.config.lr_range
        if not self.done or self.done[0].held:
            if self._bracket:
                return bracket_rates(self.done, self.present, count, low, high, self._too_high)
            if self._asked.far is not None:
                return far_rates(self.done, self.present, self._asked.far, count, low, high)
        rates = [] if self.done or count < 1 else [self.present]
        if count and self._too_high:
            rates = [max(LOOK_BELOW * self.present, low)]
        while len(rates) < count:
            taken = [math.log10(lr) for lr in (*(p.lr for p in self.held), *rates)]
            lr, hope = self._posterior().ask(taken, self._asked.even, self._free)
            failed = any(not p.held and abs(math.log10(p.lr / lr)) < 0.05 for p in self.done)
            if hope < least_hope or failed:
                break
            rates.append(lr)
        return rates

    def probe(self, rates: Sequence[float], retry_room: float) -> Stages:
        """Probe rates; one that ended on a loss that is not finite, without its fault, is repeated once.

        Returns whether one was stopped: then the stage is to be left.
        """
        reference = self.done[0] if self.done else None
        holds, above = reference is not None and reference.held, self._hopeless_above
        start = None if self.cold else self.present
        first = len(self.done)

        def made(i: int, lr: float, draw: int) -> Probe:
            curve = tuple(
                min(rate, self._state.config.lr_range[1]) for rate in probe_rates(lr, start, self._steps)
            )
            # Without one that holds, there is no telling yet what is too high.
            return Probe(self.number, i, curve, above if holds else math.inf, self._asked.evaluate, draw)

        probes = [made(first + i, lr, 0) for i, lr in enumerate(rates)]
        results = yield from probe_together(self._state, probes, self._asked.again)
        if results[-1].stopped:
            return True
        for lr, probe, result in zip(rates, probes, results, strict=True):
            attempt = tried(lr, probe, self._judged(result), above, self._sign)
            if retry_room >= 0 and no_fault_of_the_rate(attempt, self.done[0] if self.done else None):
                retry_room = -1.0
                again = made(probe.index, lr, 1)
                (result,) = yield from probe_together(self._state, [again], self._asked.again)
                if result.stopped:
                    return True
                attempt = tried(lr, again, self._judged(result), above, self._sign)
            self.done.append(attempt)
        self._let_stand()
        return False

    @property
    def _hopeless_above(self) -> float:
        """The loss on which a probe is ended; a bracket's are long enough to come back from all that was gained."""
        above = hopeless_above(self.done[0] if self.done else None, self._asked.above)
        first = self._asked.first_loss
        return max(above, min(first, self._asked.above)) if self._bracket and math.isfinite(first) else above

    def _let_stand(self) -> None:
        """Let probes hold whose losses are too high, the present rate's among them, but as high at the lowest rate."""
        lowest = min(self.done, key=lambda p: p.lr)
        if lowest.lr < self.done[0].lr and ends_alike(self.done[0], lowest):
            self.done = [replace(p, held=p.held or ends_alike(p, lowest)) for p in self.done]

    def _judged(self, result: Result) -> Result:
        """Return a result without its validation loss, where that of the present rate has no value but its losses do.

        It is the validation's fault then, and not a rate's.
        """
        if not self.done and result.val_loss is not None:
            self._blind = not math.isfinite(result.val_loss) and all(map(math.isfinite, result.losses))
        return replace(result, val_loss=None) if self._blind else result

    def fallen(self) -> float:
        """Return the decades by which the rate is to be lower than decided; see `bracket`."""
        stages = self._state.stages
        if not (self._bracket and stages and self.done[0].held):
            return 0.0
        if not stages[0].moved:
            return 0.0  # what was best there was not clearly so
        before = min(stages[0].candidates, key=lambda c: c.forecast)
        held = [p.lr for p in self.held]
        best = self._posterior().best([math.log10(lr) for lr in held])
        return fallen(None if before.diverged else before.lr, best, held)

    def decide(self) -> tuple[Verdict, str]:
        """Return the verdict and the reason, the words of a sentence."""
        present = self.present
        if all(no_fault_of_the_rate(p, None) for p in self.done):
            return Verdict(
                present, False, 0.0, 0.0, present, present
            ), "every probe met losses that are not finite, and not by its learning rate"
        if not self.held:
            lr = self._posterior().grid[-1] if not self.done[0].held else math.log10(present)
            lr = min(present, 10 ** float(lr))
            return Verdict(lr, lr != present, 0.0, 0.0, lr, lr), "every probe diverged"
        held = [math.log10(p.lr) for p in self.held]
        free = self._free and len(held) > 1
        verdict = self._posterior().decide(
            held, must_move=free or not self.done[0].held, even=self._asked.even
        )
        if not self.done[0].held:
            return verdict, f"the present rate of {present:.3g} diverged"
        more = f"{verdict.gain:.2f} ± {verdict.doubt:.2f} of the best probe's gain"
        if verdict.moved:
            return verdict, f"it lowers the loss further than {present:.3g}, by {more}"
        return verdict, f"no evidence for leaving {present:.3g}: the best rate is ahead by {more}"
