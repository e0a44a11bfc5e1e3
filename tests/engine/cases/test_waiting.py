"""Who waits: in which order, for how long at the most, and at what cost."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from vllm.v1.request import Request

from tests.engine.cases.conftest import FCFS, OURS, MakeEngine, warm_up
from tests.engine.virtual import LinearDevice, VirtualEngine
from vllm_sarathi import SarathiConfig

# --- Order ---

LENGTHS = (900, 50, 1200, 300, 20, 700, 90, 400)


def order_of_first_chunks(make_engine: MakeEngine, sarathi: SarathiConfig | None) -> list[int]:
    """Return the lengths of prompts that came during the same step, as they were begun."""
    engine = make_engine(sarathi, max_num_seqs=1)
    engine.add("chat", 40, max_tokens=30)
    engine.run(5)
    for number, length in enumerate(LENGTHS):
        engine.add(f"{number}", length, max_tokens=1)
    engine.run_until(lambda: len(engine.finished_s) == len(LENGTHS) + 1)
    begun = sorted((at_s, name) for name, at_s in engine.first_scheduled_s.items() if name != "chat")
    return [LENGTHS[int(name)] for _, name in begun]


@pytest.mark.parametrize(
    "sarathi",
    [FCFS, SarathiConfig(calibration_dir="none"), SarathiConfig(token_budget=256, calibration_dir="none")],
    ids=["slo", "auto", "fixed"],
)
def test_fcfs_is_arrival_order(make_engine: MakeEngine, sarathi: SarathiConfig) -> None:
    assert order_of_first_chunks(make_engine, sarathi) == list(LENGTHS)
    assert order_of_first_chunks(make_engine, None) == list(LENGTHS)


@pytest.mark.parametrize("settings", [{"tbt_slo_ms": 150.0}, {"token_budget": 256}], ids=["slo", "fixed"])
def test_sjf_is_the_order_of_lengths(make_engine: MakeEngine, settings: dict[str, Any]) -> None:
    sarathi = SarathiConfig(prefill_order="sjf", calibration_dir="none", **settings)
    assert order_of_first_chunks(make_engine, sarathi) == sorted(LENGTHS)


# --- The bound on waiting ---


@pytest.mark.parametrize("place", [300, 1200, 1499])
def test_the_bound_on_waiting_holds_in_a_queue_of_1500(make_engine: MakeEngine, place: int) -> None:
    """No later than the bound, and twice the time to read it and those that came before it."""
    max_wait_s = 5.0

    def victim_ttft_s(sarathi: SarathiConfig | None) -> float:
        engine = make_engine(sarathi, num_blocks=8000, max_num_seqs=256)
        engine.keep_steps = False
        warm_up(engine, prompts=10)
        for number in range(1500):
            if number == place:
                engine.add("victim", 4000, max_tokens=1)
            engine.add(f"first{number}", 60 + number % 40, max_tokens=1)
        later = 0
        next_s = engine.now_s
        while not engine.token_s["victim"] and engine.now_s < engine.arrived_s["victim"] + 300:
            while engine.now_s >= next_s:  # as many as there is time to read
                engine.add(f"later{later}", 200, max_tokens=1)
                later += 1
                next_s += 0.1
            engine.step()
        return engine.ttft_s("victim")

    sarathi = SarathiConfig(
        tbt_slo_ms=150.0,
        prefill_order="deadline",
        ttft_slo_ms=2000.0,
        prefill_max_wait_s=max_wait_s,
        calibration_dir="none",
    )
    bound_s = max_wait_s + 2 * victim_ttft_s(None)
    ours_s = victim_ttft_s(sarathi)
    assert ours_s <= bound_s, f"waited {ours_s:.0f} s, bound {bound_s:.0f} s"


def test_short_prompts_get_what_the_threshold_of_a_long_one_leaves(make_engine: MakeEngine) -> None:
    """`--long-prefill-token-threshold`: as with a fixed budget, nobody waits for the long one to be read."""

    def ttft_s(sarathi: SarathiConfig | None, budget: int) -> float:
        engine = make_engine(sarathi, long_prefill_token_threshold=64, max_num_batched_tokens=budget)
        engine.add("chat", 40, max_tokens=600)
        engine.run(10)
        warm_up(engine)
        engine.add("long", 6000, max_tokens=5)
        for number in range(20):
            engine.run(3)
            engine.add(f"short{number}", 50, max_tokens=5)
        engine.run_until_answered("long")
        return sum(engine.ttft_s(f"short{number}") for number in range(20)) / 20

    assert ttft_s(FCFS, 2048) <= 1.2 * ttft_s(None, 256)


# --- Streams that were preempted ---


@pytest.mark.parametrize(
    "settings",
    [
        {"prefill_order": "deadline", "ttft_slo_ms": 2000.0},
        {"prefill_order": "sjf", "prefill_max_wait_s": 300.0},
    ],
    ids=["deadline", "sjf"],
)
def test_nobody_takes_the_blocks_that_a_preempted_stream_waits_for(
    make_engine: MakeEngine, settings: dict[str, Any]
) -> None:
    """Prompts that need less room than the stream come all the time, and more wait than are looked at."""

    def worst_gap_s(sarathi: SarathiConfig | None) -> float:
        engine = make_engine(sarathi, num_blocks=100)
        for number in range(5):
            engine.add(f"stream{number}", 150, max_tokens=250)
        engine.run(5)
        engine.add("victim", 500, max_tokens=60)
        for number in range(100):
            engine.run(4)
            engine.add(f"fresh{number}", 60 + number % 30, max_tokens=80)
        assert engine.run_until(lambda: len(engine.finished_s) == 106)
        times = engine.token_s["victim"]
        stood_s, back_s = max(itertools.pairwise(times), key=lambda pair: pair[1] - pair[0])
        back_s = min(s.started_s for s in engine.steps if s.started_s >= stood_s and "victim" in s.scheduled)
        assert back_s - stood_s > 2.0
        assert not [name for name, at_s in engine.first_scheduled_s.items() if stood_s <= at_s < back_s]
        return max(engine.gaps_s(0.0))

    ours = SarathiConfig(tbt_slo_ms=150.0, calibration_dir="none", **settings)
    assert worst_gap_s(ours) <= 1.2 * worst_gap_s(None)


# --- The cost of a long queue, in requests that are looked at ---


class Visits:
    """Counts which requests are looked at; off until asked."""

    names: set[int]
    items: int
    counting = False

    @classmethod
    def start(cls) -> None:
        cls.names, cls.items, cls.counting = set(), 0, True

    @classmethod
    def stop(cls) -> int:
        """Return how many visits there were: distinct requests, and items that a queue handed out or moved."""
        cls.counting = False
        return max(len(cls.names), cls.items)


class VisitedRequest(Request):
    """A request that notes when it is looked at."""

    def __getattribute__(self, name: str) -> Any:
        if Visits.counting:
            Visits.names.add(id(self))
        return super().__getattribute__(name)

    def __hash__(self) -> int:
        if Visits.counting:
            Visits.names.add(id(self))
        return object.__hash__(self)


def counted(queue_class: Any) -> Any:
    """Return a queue's class that notes what is gone through, and what is moved one by one."""

    def note(items: int = 1) -> None:
        if Visits.counting:
            Visits.items += items

    def noted(items: Iterable[Request]) -> Iterator[Request]:
        for item in items:
            note()
            yield item

    class Counted(queue_class):
        def __iter__(self) -> Iterator[Request]:
            return noted(super().__iter__())

        def __reversed__(self) -> Iterator[Request]:
            return noted(super().__reversed__())

        def pop_request(self) -> Request:
            note()
            return super().pop_request()

        def remove(self, value: Request) -> None:
            note(len(self))
            super().remove(value)

        def extend(self, items: Iterable[Request]) -> None:
            super().extend(noted(items))

        def extendleft(self, items: Iterable[Request]) -> None:
            super().extendleft(noted(items))

        def clear(self) -> None:
            note(len(self))
            super().clear()

        def rotate(self, n: int = 1) -> None:
            note(abs(n))
            super().rotate(n)

    return Counted


def most_visits(
    make_engine: MakeEngine, sarathi: SarathiConfig | None, waiting: int, slots: int = 1024
) -> int:
    """Return the most requests in the queue that one of 140 steps looks at, beside 1,024 that decode."""
    engine = make_engine(
        sarathi,
        LinearDevice(step_s=0.01, decode_s=1e-5, token_s=1e-5),
        num_blocks=40_000,
        max_num_seqs=slots,
        max_num_batched_tokens=4096,
    )
    engine.keep_steps = False
    for number in range(1024):
        engine.add(f"chat{number}", 4, max_tokens=2000)
    engine.run_until_answered(*(f"chat{number}" for number in range(1024)))
    for number in range(waiting):
        engine.add(f"w{number}", 30 + number % 70, max_tokens=2).__class__ = VisitedRequest
    queue = engine.scheduler.waiting
    queue.__class__ = counted(type(queue))
    most = 0
    for number in range(140):
        if number % 5 == 0:
            engine.add(f"new{number}", 50, max_tokens=2).__class__ = VisitedRequest
        Visits.start()
        try:
            output = engine.scheduler.schedule()
        finally:
            visits = Visits.stop()
        most = max(most, visits)
        finish(engine, output)
    return most


def finish(engine: VirtualEngine, output: Any) -> None:
    """Deliver the tokens of a step that was scheduled by hand."""
    schedule = engine.scheduler.schedule
    engine.scheduler.schedule = lambda: output
    try:
        engine.step()
    finally:
        engine.scheduler.schedule = schedule


@pytest.mark.parametrize(
    ("order", "slots"),
    [("deadline", 1024), ("deadline", 1100), ("fcfs", 1100)],
    ids=["full", "deadline", "fcfs"],
)
def test_a_step_looks_at_no_more_requests_in_a_longer_queue(
    make_engine: MakeEngine, order: str, slots: int
) -> None:
    short, long = (most_visits(make_engine, OURS[order], waiting, slots) for waiting in (2_500, 10_000))
    assert long <= 1.1 * short + 16, f"{long} looked at with 10,000 waiting, {short} with 2,500"
    assert long <= 2048, f"{long} looked at in one step"


def test_stock_looks_at_few_requests(make_engine: MakeEngine) -> None:
    """The measure itself: vLLM's own scheduler looks at those that it lets in."""
    assert most_visits(make_engine, None, 2_500, 1100) <= 300


# --- Growth ---


@pytest.mark.parametrize("order", OURS)
@pytest.mark.parametrize("answer_tokens", [2000, 4000])
def test_short_prompts_with_long_answers_are_let_in_while_there_is_room(
    make_engine: MakeEngine, answer_tokens: int, order: str
) -> None:
    """As of a model that reasons at length: a few such answers come nowhere near the SLO."""
    device = LinearDevice(context_token_s=3e-7)
    engine = make_engine(OURS[order], device, num_blocks=16_000)
    engine.keep_steps = False
    for number in range(12):
        engine.add(f"earlier{number}", 20, max_tokens=answer_tokens)
    engine.run_until(lambda: not engine.scheduler.requests)
    names = [f"later{number}" for number in range(8)]
    for name in names:
        engine.add(name, 20, max_tokens=answer_tokens)
        engine.run(60)
    assert max(engine.ttft_s(name) for name in names) < 1.0
