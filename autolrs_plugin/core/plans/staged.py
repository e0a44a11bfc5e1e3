"""The staged plan, the default: tune on the fly, stage by stage, and never without evidence.

A run is a warm-up, a plateau and a linear decay to zero over the last DECAY of it (`schedule`); what is tuned is the
rate of the plateau, "the rate". It begins as the prior: the rate that the user's optimizer was built with.

    stage     at SHARES of the run: a snapshot; a probe of the present rate; then one at each rate of the greatest
              expected improvement (`posterior`), as long as that is more than HOPE and the stage's part of the budget
              lasts; back to the snapshot. The rate changes only if the evidence test of `posterior` says so. The
              second stage has longer probes, at rates that lie around the present one (`bracket`).
    climb     where a tenth of the run or more has gained nothing, and probes show nothing either, the rate itself is at
              fault or harmless: it rises from chunk to chunk, until something is gained, or taken back. From a plateau
              after a gain it comes back if that was in vain (`climb`).
    progress  probes of earlier stages count in the later ones, the less the longer ago.
    watch     every chunk of the run is compared with those before it and with a forecast (`watch`). A chunk that has
              risen is taken back and repeated at RETREAT of the rate, again as long as that makes it lower. If not, it
              was not the rate: the run has changed (other data, layers unfrozen), the rate is what it was, and a
              stage opens at once. So it does where a chunk stalls.

The figures by which the constants were chosen are in docs/explanation/what-lost.md. In short: a stage that may reach
far takes rates that only suit the moment (REACH); a run on a plateau needs a higher rate, little by little (CLIMB);
where a stage was undecided, the next one looks as far as from the first weights.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from autolrs_plugin.core.actions import Action, Done, Evaluate, Restore, Result, Snapshot, Train
from autolrs_plugin.core.plans.budget import left_for_planned, planned_part, unplanned_part
from autolrs_plugin.core.plans.climb import CLIMB, Climb, probes_gain
from autolrs_plugin.core.plans.extent import LEAST_STEPS, extent
from autolrs_plugin.core.plans.finite import Finite
from autolrs_plugin.core.plans.following import below, points_ahead
from autolrs_plugin.core.plans.horizon import after_a_change, long_run
from autolrs_plugin.core.plans.probing import candidates_of
from autolrs_plugin.core.plans.retreat import Retreats, ends_badly
from autolrs_plugin.core.plans.stage_search import Asked, Stages, StageSearch
from autolrs_plugin.core.plans.training import evaluation_steps
from autolrs_plugin.core.plans.watch import FELL, FINE, LOST, RISEN, STALLED, Watch
from autolrs_plugin.core.posterior import COLD, Seen
from autolrs_plugin.core.schedule import curve_of, ramp_steps
from autolrs_plugin.core.state import Plan, RunState, Stage

SHARES = (0.0, 0.1)
"""Progress at which stages are planned."""

HOPE, HOPE_COLD, EAGER = 0.02, 0.01, 0.04
"""No probe is taken for a lesser expected improvement of the shortfall (from the first weights HOPE_COLD, so that a
look downwards follows where up was worse); and of later stages' part, for no lesser one than EAGER: from a rate far
too low, a stage climbs as long as each probe is far better than the one before."""

CHUNKS, LEAST_CHUNK, RETREAT = 40, 4, 0.4

LATEST = 0.8
"""After this progress no stage opens: the decay is nearly over."""

APART_CHUNKS = 4
"""A stall opens no stage sooner after the one before."""


def chunk_steps(max_steps: int) -> int:
    """Return the most steps of a run that are trained, and watched, at once; fewer do not tell how losses scatter."""
    return max(LEAST_CHUNK, math.ceil(max_steps / CHUNKS))


def staged_plan(state: RunState) -> Plan:
    """Tune stage by stage."""
    yield from StagedRun(state, SHARES).course()


def once_plan(state: RunState) -> Plan:
    """Search before the first step alone: the staged plan's twin without stages, to compare with."""
    yield from StagedRun(state, SHARES[:1], unplanned=False).course()


def find_plan(state: RunState) -> Plan:
    """Search before the first step, take everything back, and train nothing."""
    run = StagedRun(state, SHARES[:1])
    yield from run.stage("find", 0, state.budget_left_steps)
    yield Done()


@dataclass
class StagedRun:
    """A run of the staged plan.

    Attributes:
        shares: progress at which stages are planned.
        unplanned: whether the watch opens stages and takes back what has risen; what has exploded is taken back anyway.
        rate: that of the plateau.
        watch: forecast against reality.
        seen: what all probes so far have said.
    """

    state: RunState
    shares: Sequence[float]
    unplanned: bool = True
    rate: float = 0.0
    watch: Watch = field(default_factory=Watch)
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.state.config
        self._low, self._high = config.lr_range
        self._curve = curve_of(config)
        prior = config.starting_lr
        self._known = prior is not None
        self.rate = prior if prior is not None else math.sqrt(self._low * self._high)
        self._planned = self._stages_ahead(0)
        self._former, self._changed_at = self.rate, 0
        self._retreats = Retreats(self._chunk_steps)
        self._finite = Finite(self.state, self._chunk_steps)
        self._repeated_to = self._staged_at = 0
        self._ceiling = math.inf
        self._climbed, self._climbing = False, Climb()
        self._following = config.warm_start is not None
        self._far: float | None = None  # where a stage would have gone, had the evidence been clearer
        self._holds = False  # whether a probe has seen that the earlier run's rate does
        if config.warm_start is not None:
            self._planned = points_ahead(config)

    # The run itself.

    def course(self) -> Plan:
        """Return the whole run."""
        state, config = self.state, self.state.config
        marks = evaluation_steps(state)
        pending = again = ""
        while state.step < config.max_steps:
            pending = pending or self._climb()
            planned = [i for at, i in self._planned if at <= state.step]
            self._planned = [(at, i) for at, i in self._planned if at > state.step]
            if planned and self._following:
                yield from self._follow(planned[-1])
            elif planned:
                # The rate that a climb came to is nobody's choice.
                kind = "climb" if self._climbed and not self._flat else "planned"
                if (yield from self.stage(kind, planned[-1], self._allotted(planned[-1]))):
                    self._planned.insert(0, (state.step + self._chunk_steps, planned[-1]))
            elif pending and state.step < LATEST * config.max_steps:
                allotted = unplanned_part(state, pending, self._chunk_steps)
                left_early = yield from self.stage(pending, pending != "change", allotted)
                again = pending if left_early else ""
            pending = (yield from self._chunk(marks)) or again
            again = ""
        yield Done()

    @property
    def _flat(self) -> bool:
        return self.watch.flat(self.state.config.max_steps - self.state.step)

    def _climb(self) -> str:
        """Raise the rate where nothing is gained; return why a stage is to open, where that has come to an end."""
        can_go_back = self.state.config.rewind and self.state.budget_left_steps >= self._chunk_steps
        if self.unplanned and self.state.stages and can_go_back and self._flat:
            self._stop_following()
            self._change(max(self.rate, min(self.rate * CLIMB, self._ceiling / CLIMB**2)))
            self._climbed = True
            return ""
        if self.unplanned and self.state.stages and not self._following and not self._planned:
            if self._climbing.start is not None:
                self._change(self._climbing.next_rate(self.state, self.rate, self._ceiling, self.watch))
                self._climbed = self._climbing.start is None and not self._climbing.in_vain
            elif can_go_back and self._climbing.due(self.state, self.watch):
                gain = probes_gain(self.state, self.watch)
                if gain is False:
                    self._change(self._climbing.begin(self.state, self.rate, self._ceiling, self.watch))
                return "stall" if gain is None and self._apart else ""
        return "climb" if self._climbed and self.watch.chunks and not self._planned else ""

    @property
    def _apart(self) -> bool:
        """Whether the last stage is long enough ago for an unplanned one."""
        return self.state.step - self._staged_at >= APART_CHUNKS * self._chunk_steps

    def _chunk(self, marks: Sequence[int]) -> Generator[Action, Result, str]:
        """Train a chunk; return why a stage is to open after it, if one is."""
        state, config = self.state, self.state.config
        first = state.step
        whole = max(first + self._chunk_steps, self._repeated_to)
        stops = [whole, config.max_steps, *marks, *(at for at, _ in self._planned)]
        end = min(stop for stop in stops if stop > first)
        if config.rewind and not ends_badly(state, self.watch, self._chunk_steps):
            yield Snapshot()
        rates = self._rates(first, end)
        result = yield Train(first, rates)
        self._finite.check(result.losses, first, self.rate)
        found = self.watch.judge(result.losses, end)
        if found != LOST and not self.unplanned:
            found = FINE
        fault = found in (RISEN, LOST) and self._retreats.suspects_rate(
            first, result.losses, found, self.watch
        )
        if found in (RISEN, LOST):
            self._ceiling = min(self._ceiling, max(rates))
            kept = state.kept_step if config.rewind else None
            may_go_back = kept is not None and end - kept <= state.budget_left_steps
            if may_go_back and fault:
                losses = tuple(state.losses[kept:])
                yield Restore()
                if found == LOST:
                    self._stop_following()
                lower = max(self.rate * RETREAT ** self._retreats.steps(first, found), self._low)
                rate = self._climbing.start or self.rate
                self._retreats.take_back(state.step, losses, found, rate, lower, self.watch)
                self._repeated_to = end
                self.watch.back_to(state.step)
                self._change(lower)
                return ""
        pending = self._gone_on(found, first, fault)
        self.watch.take(result.losses, end)
        if end in marks:
            yield Evaluate(end)
        return pending

    def _gone_on(self, found: str, first: int, fault: bool) -> str:
        """Take note of a chunk that stays, by the rate's `fault` or not; return why a stage is to open, if one is."""
        if found == LOST and fault:
            self._stop_following()
            self._change(self.rate * RETREAT)
            self._retreats.stay(self.state.step, self.rate)
            self.watch.forget()
            self.watch.lowest = math.inf
            return ""
        before, losses = self._retreats.before(first), self.state.losses[first:]
        if found in (RISEN, LOST):
            if before is not None:
                has_room = self.state.budget_left_steps >= 3 * LEAST_STEPS
                harmless = before.lost_at is None and not fault
                if found == LOST or harmless or self._following or has_room:
                    self._change(before.back_to(found))
                else:
                    self._retreats.wait(self.state.step, before.rate, self.watch)
                self._ceiling = math.inf
            self._climbing.end()
            self.watch.begin_anew(losses)
            self.seen.clear()
            return "change" if self.unplanned and not self._following else ""
        back_to = self._retreats.noise_at(first, losses, self.watch)
        if back_to is not None:
            self._change(back_to)
            self._ceiling = math.inf
        elif before is not None:
            self._follow_below()  # it was the rate
        if found == FELL:
            self.watch.forget()
            self.seen.clear()
            return "" if self._following else "change"
        self._retreats.gone_on()
        may_open = self._apart and not self._following and self._climbing.start is None
        return "stall" if found == STALLED and may_open else ""

    def _rates(self, first: int, end: int) -> tuple[float, ...]:
        """Return the rates of the steps from `first` to before `end`: to a new rate it goes over a few steps."""
        ramp, risen = ramp_steps(self.state.config), self.rate / self._former
        away = (min(1.0, (t - self._changed_at + 1) / ramp) for t in range(first, end))
        bases = (self._former * risen**share for share in away)
        return tuple(min(base * self._curve(t), self._high) for t, base in enumerate(bases, start=first))

    def _change(self, rate: float) -> None:
        self._former, self.rate = self.rate, min(max(rate, self._low), self._high)
        self._changed_at = self.state.step
        if not self.state.step:
            self._former = self.rate

    def _follow(self, point: int) -> Plan:
        """Take the rate of a point of the earlier run; a probe at the beginning sees whether it holds.

        Where the process was asked for something else in that probe, the next chunk begins with it. What the earlier
        run has met on the way needs no stage. A rate that explodes is not followed any more; where a lower one mends
        what has risen, only what is lower still is.
        """
        points = self.state.config.warm_start
        assert points is not None
        _, rate = points[point]
        if self.state.step:
            self._change(rate)
            self.watch.forget()
        if self._holds:
            return
        again_at = self.state.step + self._chunk_steps
        if (yield from self.stage("warm start", 0, 2 * LEAST_STEPS)):
            self._planned = [(again_at, point), *((at, i) for at, i in self._planned if i > point)]
            return
        self._holds = self.rate == rate
        if not self._holds:
            self._stop_following()
            if (yield from self.stage("planned", 0, self._allotted(0))):
                self._planned.insert(0, (again_at, 0))

    def _follow_below(self) -> None:
        """Where a lower rate mends, follow only what is lower still."""
        points = self.state.config.warm_start
        if self._following and points is not None:
            self._planned = below(self.rate, self._planned, points)

    def _stop_following(self) -> None:
        if self._following:
            self._following, self._planned = False, self._stages_ahead(self.state.step + 1)

    # Stages.

    def _stages_ahead(self, step: int) -> list[tuple[int, int]]:
        marks = [round(share * self.state.config.max_steps) for share in self.shares]
        return [(at, i) for i, at in enumerate(marks) if at >= step]

    @property
    def _chunk_steps(self) -> int:
        return chunk_steps(self.state.config.max_steps)

    def _allotted(self, index: int) -> float:
        return planned_part(self.state, index, self.shares)

    def _asked(self, kind: str, index: int, steps: int, evaluate: bool) -> Asked:
        state, config = self.state, self.state.config
        present = self.rate * (self._curve(state.step) if state.step else 1.0)
        undecided = self._far is not None or (kind == "planned" and self._flat)
        return Asked(
            present=min(present, config.lr_range[1]),
            known=self._known,
            index=index,
            steps=steps,
            evaluate=evaluate,
            even=kind != "stall",
            wide=kind in ("change", "climb"),
            undecided=undecided,
            far=self._far if kind == "planned" else None,
            above=self.watch.above,
            bracket=kind == "planned" and index == 1 and not undecided,
            guess=not self._known or any(stage.moved for stage in state.stages),
            first_loss=self.watch.first_loss,
            run_gained=kind == "planned" and self.watch.has_gained,
            earlier=tuple(self.seen),
            again=kind == "find",
        )

    def stage(self, kind: str, index: int, allotted: float) -> Stages:
        """Probe rates, and change the run's if there is evidence.

        Returns whether it was left, undecided, because the process was asked for something else.

        Args:
            kind: why.
            index: which of the planned ones, or the one that it is like.
            allotted: the steps that it may take.
        """
        most, steps, evaluate = extent(self.state.config, kind, index, allotted)
        if not steps or self._low >= self._high:
            return False
        self._climbing.end()
        self._staged_at, self._climbed = self.state.step, self._climbed and kind == "planned"
        search = StageSearch(self.state, self._asked(kind, index, steps, evaluate))
        yield Snapshot()
        before = self.state.search_cost_steps
        cost = steps + (self.state.config.eval_cost_steps if evaluate else 0.0)
        hope = HOPE_COLD if search.cold else HOPE
        while len(search.done) < most:
            count = min(self.state.config.parallel_probes, most - len(search.done))
            room = allotted - (self.state.search_cost_steps - before)
            if room < cost:
                room, hope = left_for_planned(self.state), EAGER
            rates = search.ask(min(count, int(room / cost)), hope)
            if not rates:
                break
            if (yield from search.probe(rates, retry_room=room - (len(rates) + 1) * cost)):
                yield Restore()
                return True
        yield Restore()
        if search.done:
            self._settle(search, kind)
        return False

    def _settle(self, search: StageSearch, kind: str) -> None:
        """Decide, and book the stage."""
        present = search.present
        verdict, reason = search.decide()
        self._far = search.far if not verdict.moved and verdict.gain > COLD[1] else None
        lr = verdict.lr
        if kind == "find":
            lr = long_run(lr, None) if lr > present else lr
        elif search.cold and verdict.moved and search.done[0].held:
            lr = long_run(verdict.lr, present if self._known else None)
        elif (kind in ("change", "climb") or search.looks_far) and verdict.lr > present:
            lr = max(present, after_a_change(verdict.lr))
        fall = search.fallen()
        if fall:
            lr, reason = lr / 10**fall, f"{reason}; the best rate has fallen since the first stage"
        if lr != present:
            self._retreats.clear()
            self._change(self.rate * lr / present)
            self.watch.forget()  # at another rate, losses may rise for a while
        # In the warm-up, the rate that is kept may be below the range.
        lr = min(max(lr, self._low), self._high)
        if search.cold:
            first = [loss for p in search.done for loss in p.result.losses[:2]]
            self.watch.learn_scale(first, [loss for p in search.held for loss in p.losses])
        self._ceiling = min([p.lr for p in search.done if not p.held], default=self._ceiling)
        self.seen += search.seen
        spent = sum(len(p.result.losses) for p in search.done)
        self.state.stages.append(
            Stage(
                search.number,
                self.state.step,
                kind,
                candidates_of(search.done),
                lr,
                spent,
                reason,
                min(lr, verdict.low),
                max(lr, verdict.high),
            )
        )
