"""Deadline order: as many SLOs as possible are met, and nothing waits beyond the stated bound."""

import itertools
from dataclasses import dataclass, replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from vllm_sarathi.core.classes import Bond, SloClass, SloClasses
from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.controller import StepController
from vllm_sarathi.core.order.arrival import ArrivalOrder
from vllm_sarathi.core.order.base import Facts, Turn, turn_by_keys
from vllm_sarathi.core.order.deadline import ARRIVAL_STEPS, deadline_keys, kept_slos
from vllm_sarathi.core.order.index import WaitingIndex
from vllm_sarathi.core.order.shortest import ShortestFirst
from vllm_sarathi.core.types import Reason, RequestView, StepPlan, StepRecord, StepShape, StepView, chunk_work

TOKENS_PER_S = 1000.0


def prefill_s(done_tokens: int, remaining_tokens: int) -> float:
    return remaining_tokens / TOKENS_PER_S


def prompt(
    name: str, tokens: int, age_s: float = 0.0, slo_s: float | None = None, done: int = 0
) -> RequestView:
    return RequestView(name, (0, -age_s), age_s, done, tokens, slo_s)


def order(requests: list[RequestView], **arguments: object) -> list[str]:
    defaults: dict[str, object] = {
        "ttft_slo_s": None,
        "max_wait_s": 30.0,
        "lead_s": 0.0,
        "prefill_s": prefill_s,
    }
    keys = deadline_keys(requests, **(defaults | arguments))  # type: ignore[arg-type]
    return [requests[i].request_id for i in sorted(range(len(requests)), key=keys.__getitem__)]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(1, 2000), st.floats(0.05, 5.0)), min_size=1, max_size=7))
def test_no_other_choice_keeps_more_slos(jobs: list[tuple[int, float]]) -> None:
    requests = [prompt(str(i), tokens, slo_s=slo) for i, (tokens, slo) in enumerate(jobs)]
    kept = kept_slos(requests, None, 0.0, prefill_s)

    def is_kept(chosen: tuple[tuple[int, float], ...]) -> bool:
        ends = itertools.accumulate(
            prefill_s(0, tokens) for tokens, _ in sorted(chosen, key=lambda job: job[1])
        )
        return all(
            end <= slo for end, (_, slo) in zip(ends, sorted(chosen, key=lambda job: job[1]), strict=True)
        )

    best = max(
        n for n in range(len(jobs) + 1) for chosen in itertools.combinations(jobs, n) if is_kept(chosen)
    )
    assert len(kept) == best


def test_one_long_prompt_is_given_up_for_several_short_ones() -> None:
    several = [prompt(f"short{i}", 100, slo_s=1.0) for i in range(4)]
    assert order([prompt("long", 800, slo_s=0.9), *several])[-1] == "long"
    assert order([prompt("long", 550, slo_s=0.9), *several])[0] == "long"


def test_who_was_preempted_in_the_midst_of_an_answer_goes_first() -> None:
    """It has more to read again than the others have to read, and no time to first token to keep any more."""
    fresh = [prompt("urgent", 100, slo_s=0.2), prompt("overdue", 100, age_s=40.0), prompt("short", 10)]
    stream = replace(prompt("stream", 1669, age_s=3.0, slo_s=2.0), answering=True)
    assert order([*fresh, stream])[0] == "stream"
    view = StepView(0.0, 0, 0, 0, (), (*fresh, stream), 8192)
    assert (ShortestFirst(30.0).turn(view).waiting or ())[0] == 3


def test_what_was_read_counts() -> None:
    ready = prompt("ready", 100, slo_s=1.0, age_s=0.8, done=3000)
    assert order([prompt("new", 900, slo_s=0.95), ready])[0] == "ready"


def test_the_time_of_the_steps_in_flight_counts() -> None:
    barely = [prompt("barely", 900, slo_s=1.0), prompt("easy", 50, slo_s=9.0)]
    assert order(barely) == ["barely", "easy"]
    assert order(barely, lead_s=0.2) == ["easy", "barely"]


def test_an_slo_that_was_given_up_is_owed_before_what_has_no_slo() -> None:
    three = [
        prompt("batch", 900, age_s=8.0),
        prompt("late", 1200, age_s=2.0, slo_s=1.0),
        prompt("kept", 50, slo_s=9.0),
    ]
    assert order(three) == ["kept", "late", "batch"]


def test_overdue_prompts_have_every_second_step() -> None:
    both = [prompt("urgent", 50, slo_s=1.0), prompt("waited", 9000, age_s=31.0)]
    assert order(both, overdue_first=True) == ["waited", "urgent"]
    assert order(both, overdue_first=False) == ["urgent", "waited"]


def test_while_some_are_overdue_slos_are_judged_by_half_of_the_time() -> None:
    waited = prompt("waited", 9000, age_s=31.0)
    urgent = prompt("urgent", 600, slo_s=1.0)  # 0.6 s alone, 1.2 beside the other
    small = prompt("small", 100, slo_s=5.0)
    assert order([urgent, small], overdue_first=False)[0] == "urgent"
    assert order([waited, urgent, small], overdue_first=False)[0] == "small"


def test_what_has_no_slo_is_ranked_by_its_whole_length() -> None:
    half_read = prompt("half read", 500, age_s=1.0, done=5000)
    fresh = prompt("fresh", 1200, age_s=1.0)
    assert order([half_read, fresh]) == ["fresh", "half read"]


def test_nobody_yields_to_one_who_finds_no_slot() -> None:
    view = StepView(0.0, 1, 1, 100, (prompt("long", 5000, done=100),), (prompt("short", 10),), 4096)
    keys = [(5000.0,), (10.0,)]
    assert turn_by_keys(view, keys).held == (0,)
    assert turn_by_keys(replace(view, free_slots=0), keys).held == ()


def test_one_that_reads_a_shared_prefix_is_as_urgent_as_those_that_wait_for_it() -> None:
    partial = (prompt("reader", 5000, done=1000), prompt("other", 60, done=1000))
    view = StepView(0.0, 1, 1, 100, partial, (replace(prompt("sibling", 50), reader=0),), 4096)
    keys = [(5000.0,), (60.0,), (50.0,)]
    assert turn_by_keys(view, keys) == Turn((0,), (1,), (0,), let_in=1)
    full = turn_by_keys(replace(view, free_slots=0), keys)  # the sibling could not go on from there
    assert (full.prefills, full.held) == ((1, 0), ())


def test_only_batch_work_waits_for_what_batch_work_reads() -> None:
    batch = SloClass("batch", batch=True)
    reader = replace(prompt("reader", 5000, done=1000), slo_class=batch)
    sibling = replace(prompt("sibling", 50), reader=0)
    view = StepView(0.0, 1, 1, 100, (reader,), (sibling,), 4096)
    keys = [(5000.0,), (50.0,)]
    assert turn_by_keys(view, keys).held == (0,)
    assert turn_by_keys(replace(view, waiting=(replace(sibling, slo_class=batch),)), keys).held == ()


def test_only_those_of_higher_priority_have_the_turn_of_one_that_yields() -> None:
    def ranked(name: str, priority: int, done: int = 0) -> RequestView:
        return replace(prompt(name, 100, done=done), rank=(priority, 0.0))

    waiting = (ranked("urgent", 0), ranked("as low", 5))
    turn = ArrivalOrder().turn(StepView(0.0, 1, 1, 100, (ranked("low", 5, done=50),), waiting, 4096))
    assert (turn.held, turn.let_in) == ((0,), 1)


def test_sjf_gives_every_second_step_to_one_that_has_waited_too_long() -> None:
    order = ShortestFirst(max_wait_s=30.0)
    view = StepView(0.0, 1, 1, 100, (), (prompt("short", 10), prompt("waited", 5000, age_s=31.0)), 4096)
    first = []
    for _ in range(4):
        turn = order.turn(view)
        assert turn.waiting is not None
        first.append(view.waiting[turn.waiting[0]].request_id)
        order.planned(10)
    assert first == ["waited", "short", "waited", "short"]


STEP_S = 0.01
TOKEN_S = 1 / TOKENS_PER_S


@dataclass
class Prompt:
    arrival_s: float
    tokens: int
    slo_s: float | None
    done: int = 0
    first_token_s: float | None = None


class Server:
    """Prompts on a device that takes 10 ms a step and 1 ms a token, beside one decode that never ends."""

    def __init__(self, prompts: list[Prompt], **fields: object) -> None:
        config = SarathiConfig(
            tbt_slo_ms=200,
            prefill_order="deadline",
            allow_request_slo=True,
            **fields,  # type: ignore[arg-type]
        )
        self.controller = StepController(config)
        self.prompts = prompts
        self.now_s = 0.0
        self.steps_s: list[float] = []

    def run(self) -> None:
        while any(p.first_token_s is None for p in self.prompts):
            here = [p for p in self.prompts if p.arrival_s <= self.now_s and p.first_token_s is None]
            partial, waiting = [p for p in here if p.done], [p for p in here if not p.done]
            plan = self.controller.plan(self.view(partial, waiting))
            served = [partial[i] for i in plan.prefill_order]
            served += [waiting[i] for i in (plan.waiting_order or range(len(waiting)))]
            self.step(plan, served)

    def view(self, partial: list[Prompt], waiting: list[Prompt]) -> StepView:
        def seen(p: Prompt) -> RequestView:
            return RequestView(
                str(id(p)), (0, p.arrival_s), self.now_s - p.arrival_s, p.done, p.tokens - p.done, p.slo_s
            )

        return StepView(self.now_s, 1, 1, 100, tuple(map(seen, partial)), tuple(map(seen, waiting)), 4096)

    def step(self, plan: StepPlan, served: list[Prompt]) -> None:
        left, work, sequences = plan.token_budget - 1, 0.0, 1
        finished = []
        for p in served:
            chunk = min(left, p.tokens - p.done)
            if chunk <= 0:
                break
            work += chunk_work(p.done, chunk)
            p.done, left, sequences = p.done + chunk, left - chunk, sequences + 1
            if p.done == p.tokens:
                finished.append(p)
        tokens = plan.token_budget - left
        seconds = STEP_S + TOKEN_S * tokens
        self.now_s += seconds
        self.steps_s.append(seconds)
        for p in finished:
            p.first_token_s = self.now_s
        shape = StepShape(tokens, 1, 100, work, sequences)
        self.controller.observe(
            StepRecord(
                shape, plan.token_budget, plan.reason, self.controller.predict(shape), seconds, self.now_s
            )
        )


PROMPTS = st.lists(
    st.builds(
        Prompt,
        arrival_s=st.floats(0.0, 8.0),
        tokens=st.one_of(st.integers(5, 200), st.integers(500, 4000)),
        slo_s=st.one_of(st.none(), st.floats(0.1, 3.0)),
    ),
    min_size=1,
    max_size=40,
)
COLD_S = 1.0
"""Until the first chunks have grown."""


@settings(max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(PROMPTS, st.sampled_from([0.5, 2.0, 5.0]))
def test_nothing_waits_beyond_the_stated_bound_and_everything_finishes(
    prompts: list[Prompt], max_wait_s: float
) -> None:
    server = Server(prompts, prefill_max_wait_s=max_wait_s)
    server.run()
    # A step of the least SLO: 10 of its 25 ms are not reading.
    per_token_s = TOKEN_S + STEP_S / max(1.0, (0.1 / ARRIVAL_STEPS - STEP_S) / TOKEN_S)
    for p in prompts:
        before = sum(q.tokens for q in prompts if q.arrival_s <= p.arrival_s + 1e-6)
        assert p.first_token_s is not None
        wait_s = p.first_token_s - p.arrival_s
        assert wait_s <= max_wait_s + 2 * before * per_token_s + 2 * max(server.steps_s) + COLD_S


def test_slos_are_met_beside_a_long_prompt_and_no_step_outlasts_an_arrival() -> None:
    batch = [Prompt(0.0, 20_000, None), Prompt(3.0, 20_000, None)]
    urgent = [Prompt(2.0 + 1.3 * i, 60, 0.4) for i in range(20)]
    server = Server([*batch, *urgent])
    server.run()
    assert all(p.first_token_s is not None and p.first_token_s - p.arrival_s <= 0.4 for p in urgent)
    assert max(server.steps_s[40:]) <= 0.4 / ARRIVAL_STEPS * 1.05


def test_slos_are_met_while_an_overdue_prompt_is_read() -> None:
    urgent = [Prompt(0.5 * i, 50, 1.0) for i in range(60)]
    server = Server([Prompt(0.0, 15_000, None), *urgent], prefill_max_wait_s=1.0)
    server.run()
    assert all(p.first_token_s is not None and p.first_token_s - p.arrival_s <= 1.0 for p in urgent)


def test_the_turn_of_one_that_yields_goes_to_the_more_urgent_alone() -> None:
    controller = StepController(
        SarathiConfig(prefill_order="deadline", ttft_slo_ms=1000.0, tbt_slo_ms=10_000.0)
    )
    for _ in range(100):
        for tokens in (2, 500):
            shape = StepShape(tokens, 2, 1000, chunk_work(0, tokens - 2), 2 + (tokens > 2))
            controller.observe(StepRecord(shape, tokens, Reason.SLO, None, 0.01 + tokens / TOKENS_PER_S, 0.0))
    read = prompt("read", 3000, age_s=5.0, done=1000)
    short, long = prompt("short", 50), prompt("long", 4000, age_s=3.0)

    def budget(*waiting: RequestView) -> tuple[int, tuple[int, ...]]:
        plan = controller.plan(StepView(0.0, 2, 2, 1000, (read,), waiting, 8192))
        return plan.token_budget, plan.held

    assert budget(short, long) == (52, (0,))
    assert budget(short) == (52, (0,))
    most, held = budget(long)
    assert held == ()
    assert most > 200


CHAT = SloClass("chat", ttft_slo_ms=1000, when_late="relegate")
BATCH = SloClass("batch", batch=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"prefill_order": "sjf"},
        {"prefill_order": "deadline", "ttft_slo_ms": 1000.0},
        {"slo_classes": SloClasses((CHAT, BATCH), "chat")},
    ],
    ids=["sjf", "deadline", "classes"],
)
def test_a_stream_that_was_preempted_is_seen_first_however_many_wait(settings: dict[str, object]) -> None:
    order = StepController(SarathiConfig(prefill_max_wait_s=30.0, **settings)).order  # type: ignore[arg-type]
    bond = Bond(None, 1.0, CHAT) if "slo_classes" in settings else Bond()
    index: WaitingIndex[str] = WaitingIndex(order.lists)
    for i in range(1000):
        index.add(f"fresh {i}", order.keys(Facts(10.0 + i / 1e3, 50, 1.0, bond.slo_class)))
    index.add("stream", order.keys(Facts(12.0, 4000, 1.0, bond.slo_class, tag=9.0, answering=True)))
    assert index.candidates(order.starts(14.0))[0] == "stream"
    assert order.presses(bond, 2.0, "stream", True)
    assert not order.presses(bond, 2.0, "fresh 1", False)
    assert order.presses(bond, 31.0, "old", False)


def test_batch_work_that_was_preempted_keeps_nobody_waiting() -> None:
    order = StepController(SarathiConfig(slo_classes=SloClasses((CHAT, BATCH), "chat"))).order
    assert not order.presses(Bond(slo_class=BATCH), 2.0, "batch", True)
    assert list(order.keys(Facts(12.0, 4000, None, BATCH, answering=True))) == ["tag batch"]
