"""When a prompt would have its first token, against a plain simulation of the line; and the gate that asks it."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sarathi.core.classes import Bond, SloClass
from vllm_sarathi.core.first_token import Job, QueueView, keep, when_first_token
from vllm_sarathi.core.gate import LEAD_STEPS, LONG_S, MOST_CAUTION, Gate

SECONDS = st.floats(0.01, 5.0)
LOSABLE = st.builds(Job, st.floats(0.1, 5.0), SECONDS, st.just(False), st.just(False), SECONDS)
JOBS = st.lists(
    st.builds(
        Job, due_s=st.floats(0.1, 10.0), prefill_s=SECONDS, protected=st.booleans(), stays=st.just(True)
    ),
    max_size=8,
)


def ends(jobs: list[Job], lead_s: float) -> list[float]:
    """Return when each of the jobs has its first token, read one after the other."""
    ended, at_s = [], lead_s
    for job in jobs:
        at_s += job.prefill_s
        ended.append(at_s)
    return ended


@settings(deadline=None, derandomize=True, database=None)
@given(JOBS, st.integers(1, 50), st.floats(0.1, 10.0))
def test_a_newcomer_goes_as_far_forward_as_its_deadline_and_those_behind_it_allow(
    jobs: list[Job], tokens: int, due_s: float
) -> None:
    queue = QueueView(tuple(jobs), token_s=0.1, lead_s=0.05)
    line = [jobs[i] for i in keep(jobs, queue.lead_s)]
    own = Job(due_s, queue.prefill_s(tokens))
    before = ends(line, queue.lead_s)

    def harms(place: int) -> bool:
        after = ends([*line[:place], own, *line[place:]], queue.lead_s)
        return any(
            job.protected and (after[i + 1] > job.due_s or before[i] > job.due_s)
            for i, job in enumerate(line)
            if i >= place
        )

    first = next(place for place in range(len(line) + 1) if all(job.due_s > due_s for job in line[place:]))
    place = next(place for place in range(first, len(line) + 1) if not harms(place))
    expected = ends([*line[:place], own], queue.lead_s)[-1]
    assert when_first_token(queue, tokens, due_s) == pytest.approx(expected)


def test_what_has_no_slo_waits_for_all_that_has_one() -> None:
    queue = QueueView((Job(1.0, 0.5), Job(9.0, 0.5)), token_s=0.01, work_s=1e-4, lead_s=0.1, rest_s=7.0)
    own_s = 10 * 0.01 + 1e-4 * 10 * (30 + 5)
    assert when_first_token(queue, 10, done_tokens=30) == pytest.approx(0.1 + 1.0 + own_s)
    assert when_first_token(queue, 10, done_tokens=30, batch=True) == pytest.approx(0.1 + 1.0 + 7.0 + own_s)


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.builds(Job, st.floats(0.1, 5.0), SECONDS, st.just(False), st.just(False), SECONDS), max_size=8
    ),
    st.floats(0, 1),
)
def test_all_that_can_be_given_up_and_is_kept_is_in_time(jobs: list[Job], lead_s: float) -> None:
    line = [jobs[i] for i in keep(jobs, lead_s)]
    assert all(end <= job.due_s for end, job in zip(ends(line, lead_s), line, strict=True))


def test_nobody_is_given_up_for_one_that_is_late_in_any_case() -> None:
    hopeless = Job(0.1, 3.0, stays=True)
    assert keep([hopeless, Job(4.0, 1.0, loss=1.0)], 0.0) == [0, 1]
    assert keep([hopeless, Job(3.5, 1.0, loss=1.0)], 0.0) == [0]
    savable = Job(2.0, 1.0, stays=True)
    assert keep([Job(1.9, 1.5, loss=1.0), savable], 0.0) == [1]


WITH_SLO = SloClass("chat", ttft_slo_ms=1000, when_late="refuse")


def gate(token_s: float = 0.001) -> Gate:
    """Return a gate where reading takes so long, and its lead is a tenth of a second."""
    return Gate(lambda: (token_s, 0.0, 0.1 / LEAD_STEPS))


def bond(**fields: object) -> Bond:
    slo_class = SloClass("chat", **{"ttft_slo_ms": 1000, "when_late": "refuse", **fields})  # type: ignore[arg-type]
    return Bond(None, slo_class.ttft_slo_s, slo_class)


def test_a_newcomer_that_cannot_be_kept_is_told_when_it_could() -> None:
    door = gate()
    assert door.ask("a", bond(), 10.0, 10.0, 500, 0) is None
    assert door.ask("b", bond(), 10.0, 10.0, 400, 0) is None
    refusal = door.ask("c", bond(), 9.9, 10.0, 300, 0)
    assert refusal is not None
    assert refusal.predicted_s == pytest.approx(0.1 + 0.1 + 1.2)
    assert refusal.retry_after_s == 1.0
    assert door.standing == ("a", "b")
    assert gate().ask("on its way for long", bond(), 9.3, 10.0, 300, 0) is not None
    door.left("a")
    assert door.ask("c", bond(), 9.9, 10.0, 300, 0) is None


def test_a_newcomer_with_an_earlier_deadline_makes_nobody_late_who_was_let_in() -> None:
    door = gate()
    assert door.ask("slow", bond(ttft_slo_ms=1000), 10.0, 10.0, 850, 0) is None
    refusal = door.ask("quick", bond(ttft_slo_ms=300), 10.0, 10.0, 100, 0)
    assert refusal is not None
    assert refusal.predicted_s == pytest.approx(0.1 + 0.85 + 0.1)
    served = gate()
    assert served.ask("slow", bond(ttft_slo_ms=1000, when_late="relegate"), 10.0, 10.0, 850, 0) is None
    assert served.ask("quick", bond(ttft_slo_ms=300), 10.0, 10.0, 100, 0) is None


def test_where_reading_turns_slow_the_longest_unread_is_refused_and_those_being_read_are_not() -> None:
    pace = [(0.0004, 0.0, 0.1 / LEAD_STEPS)]
    door = Gate(lambda: pace[0])
    for name, tokens in (("begun", 700), ("long", 500), ("short", 400)):
        assert door.ask(name, bond(), 10.0, 10.0, tokens, 0) is None
    door.prefilled("begun", 100, 600)
    assert door.review(10.0) == {}
    # Of the second that the SLO allows, what is left to read takes 0.6 with a lead of 0.1, and more by the caution.
    caution = 1 + MOST_CAUTION * 1.0 / LONG_S
    assert door.next_look_s(10.0) == pytest.approx(10.0 + 0.9 - caution * 0.6)
    pace[0] = (0.0007, 0.0, 0.1 / LEAD_STEPS)
    refused = door.review(10.0)
    assert list(refused) == ["long"]
    assert refused["long"].predicted_s == pytest.approx(0.1 + caution * 1.5 * 0.7)
    assert door.standing == ("begun", "short")
    pace[0] = (0.0080, 0.0, 0.1 / LEAD_STEPS)
    assert list(door.review(10.0)) == ["short"]
    assert door.review(10.0) == {}
    assert door.next_look_s(10.0) == math.inf


def test_who_runs_is_not_refused_though_less_of_it_is_cached_than_there_was() -> None:
    """Of a prompt of 900 tokens, 500 were in the prefix cache when it came, and are not when it is let in."""
    for runs, refused in ((False, ["a"]), (True, [])):
        door = gate()
        assert door.ask("a", bond(), 10.0, 10.0, 400, 500) is None
        door.prefilled("a", 100, 1900, runs)
        assert list(door.review(10.0)) == refused


@pytest.mark.parametrize(("slo_ms", "kept"), [(300, True), (2000, False), (60_000, False)])
def test_the_shorter_the_slo_the_less_caution(slo_ms: float, kept: bool) -> None:
    """Of the time that is left after the lead, all but a twentieth is for reading what was let in."""
    slo_s = slo_ms / 1e3
    door = gate()
    assert door.ask("a", bond(ttft_slo_ms=slo_ms), 10.0, 10.0, int(950 * (slo_s - 0.1)), 0) is None
    assert (door.review(10.0) == {}) is kept


def test_classes_that_serve_late_refuse_nobody_and_while_nothing_is_known_neither_does_any() -> None:
    door = gate(token_s=1.0)
    assert door.ask("late", bond(when_late="serve"), 10.0, 10.0, 4000, 0) is None
    assert Gate(lambda: None).ask("first", bond(), 10.0, 10.0, 10**6, 0) is None
    assert door.ask("batch", Bond(math.inf, None, SloClass("batch", batch=True)), 0.0, 10.0, 10**6, 0) is None


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(1, 600), st.integers(200, 2000)), max_size=20))
def test_all_that_are_let_in_are_in_time_where_reading_is_as_quick_as_predicted(
    arrivals: list[tuple[float, int, int]],
) -> None:
    """And nobody is both refused and served: a device that reads as predicted, by earliest deadline, one at a time."""
    door, now_s, line = gate(), 100.0, list[Any]()
    refused, answered = set(), {}
    for index, (gap_s, tokens, slo_ms) in enumerate(arrivals):
        until_s = now_s + gap_s
        while line and now_s < until_s:  # whole prompts, as nothing here is preempted
            due_s, name, left = min(line)
            line.remove((due_s, name, left))
            now_s += left * 0.001
            answered[name] = (now_s, due_s)
            door.left(name)
        now_s = max(now_s, until_s)
        name = str(index)
        if door.ask(name, bond(ttft_slo_ms=slo_ms), until_s, now_s, tokens, 0) is not None:
            refused.add(name)
        else:
            line.append((until_s + slo_ms / 1e3, name, tokens))
    for due_s, name, left in sorted(line):
        now_s += left * 0.001
        answered[name] = (now_s, due_s)
    assert not refused & answered.keys()
    assert refused | answered.keys() == {str(index) for index in range(len(arrivals))}
    assert all(end_s <= due_s + 1e-9 for end_s, due_s in answered.values())


ARRIVALS = st.tuples(
    st.sampled_from(("refuse", "relegate", "serve")),
    st.sampled_from((300, 1000, 2000)),
    st.sampled_from((1.0, 4.0)),
    st.integers(10, 900),
    st.floats(0.0, 0.6),
    st.floats(0.0005, 0.002),
)


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(st.lists(ARRIVALS, min_size=4, max_size=16))
def test_whoever_is_refused_is_told_a_time_beyond_its_slo(
    arrivals: list[tuple[str, int, float, int, float, float]],
) -> None:
    """Newcomers as well as those that were let in, whatever stands beside them and however the pace changes."""
    pace, now_s = [0.001], 100.0
    door = Gate(lambda: (pace[0], 1e-7, 0.02))
    for index, (when_late, slo_ms, weight, tokens, gap_s, pace[0]) in enumerate(arrivals):
        now_s += gap_s
        asking = bond(ttft_slo_ms=slo_ms, when_late=when_late, weight=weight)
        for refusal in (
            *door.review(now_s).values(),
            door.ask(str(index), asking, now_s, now_s, tokens, 0),
        ):
            assert refusal is None or refusal.predicted_s > refusal.ttft_slo_s
