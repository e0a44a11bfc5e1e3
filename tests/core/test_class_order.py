"""The order of classes: who goes first, whose place it is among tenants, and what batch work leaves free."""

import math
from dataclasses import replace
from typing import Any

import pytest

from tests.core.devices import Loop, roofline
from tests.core.test_limits import (
    CONTEXT_S,
    DECODE_S,
    STEP_S,
    Known,
    answers,
    candidate,
    growth,
    prompt,
    step,
)
from vllm_sarathi.core.classes import Bond, SloClass, SloClasses
from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.controller import StepController
from vllm_sarathi.core.limits.backfill import LEAST_SPARE_SHARE, UNKNOWN_ANSWER_RUNNING, Backfill
from vllm_sarathi.core.limits.growth import Answers, Growth
from vllm_sarathi.core.order.base import Facts
from vllm_sarathi.core.order.classes import ClassOrder
from vllm_sarathi.core.order.index import WaitingIndex
from vllm_sarathi.core.order.shares import CREDIT_S
from vllm_sarathi.core.order.yielding import Holding, Wanting, giving_way
from vllm_sarathi.core.policies.sarathi import CLASS_SLO_SHARE, SloPolicy
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import ONE_STAGE, Occupancy, Reason, RequestView, StepRecord, StepShape, StepView

CLASSES = SloClasses(
    (
        SloClass("vip", ttft_slo_ms=1000, weight=10, when_late="relegate"),
        SloClass("chat", ttft_slo_ms=1000, when_late="relegate"),
        SloClass("served", ttft_slo_ms=1000),
        SloClass("plain"),
        SloClass("batch", batch=True, max_wait_s=60),
    ),
    "chat",
)
TOKEN_S = 0.001 / 1.05
"""So that reading takes a millisecond for each token, with the order's caution."""


def order() -> ClassOrder:
    made = ClassOrder(SarathiConfig(slo_classes=CLASSES), StepTimeModel(), ONE_STAGE)
    record = StepRecord(StepShape(1000, 0, 0, 0.0, 1), 1000, Reason.SLO, None, 1000 * TOKEN_S, 0.0)
    made.observe(record)
    made._step_s = 0.0
    return made


def asked(name: str, tokens: int, slo_class: str, age_s: float = 0.0, **fields: Any) -> RequestView:
    found = CLASSES.named(slo_class)
    assert found is not None
    return RequestView(name, (0, -age_s), age_s, 0, tokens, found.ttft_slo_s, slo_class=found, **fields)


def line(made: ClassOrder, *waiting: RequestView, now_s: float = 0.0) -> list[str]:
    view = StepView(now_s, 0, 0, 0, (), tuple(waiting), 8192)
    turn = made.turn(view)
    assert turn.waiting is not None
    return [waiting[i].request_id for i in turn.waiting]


def test_ranks() -> None:
    waiting = (
        asked("batch", 10, "batch", age_s=50.0),
        asked("plain", 10, "plain"),
        asked("relegated", 10, "chat", age_s=1.5),
        asked("with-slo", 10, "chat"),
        asked("late", 10, "served", age_s=1.5),
        asked("overdue", 10, "plain", age_s=40.0),
    )
    made = order()
    assert line(made, *waiting) == ["overdue", "late", "with-slo", "relegated", "plain", "batch"]
    made.planned(10)
    assert line(made, *waiting) == ["late", "with-slo", "relegated", "overdue", "plain", "batch"]


def test_batch_work_that_has_waited_for_its_bound_goes_before_those_that_have_waited_longer() -> None:
    waiting = (
        asked("overdue", 10, "chat", age_s=90.0),
        asked("plain", 10, "plain", age_s=70.0),
        asked("batch", 10, "batch", age_s=61.0),
        asked("more", 10, "batch", age_s=61.0, tag=1.0),
    )
    assert line(order(), *waiting) == ["batch", "overdue", "plain", "more"]


def test_what_counts_less_for_its_time_is_given_up() -> None:
    both = (asked("vip", 600, "vip"), asked("chat", 500, "chat"))
    assert line(order(), *both) == ["vip", "chat"]
    assert line(order(), asked("long", 600, "chat"), asked("chat", 500, "chat")) == ["chat", "long"]


def test_the_places_of_a_class_go_to_who_has_had_the_least() -> None:
    made = order()
    chat = CLASSES.default_class
    flood = [
        asked(f"flood{i}", 100, "chat", age_s=0.5 - i / 100, tenant="flood", tag=made.tag(chat, "flood", 100))
        for i in range(30)
    ]
    assert line(made, *flood)[:3] == ["flood0", "flood1", "flood2"]
    light = asked("light", 100, "chat", tenant="light", tag=made.tag(chat, "light", 100))
    assert light.tag <= flood[0].tag
    assert line(made, *flood[5:], light)[0] == "light"
    vip = asked("vip", 100, "vip", age_s=0.8, tenant="other", tag=99.0)
    assert line(made, *flood[5:], light, vip)[:2] == ["vip", "light"]


def test_what_is_beyond_a_share_is_given_up_first() -> None:
    made = order()
    here = asked("here", 700, "chat", tenant="a", tag=0.0)
    beyond = asked("beyond", 400, "chat", tenant="b", tag=CREDIT_S + 1.0)
    assert line(made, here, beyond) == ["here", "beyond"]
    assert line(made, here, replace(beyond, tag=0.5)) == ["beyond", "here"]


def test_batch_work_that_has_stood_still_for_its_bound_goes_first_once() -> None:
    made = order()
    batch, chat = asked("batch", 10, "batch", age_s=61.0), asked("chat", 10, "chat")
    view = StepView(1000.0, 0, 0, 0, (), (chat, batch), 8192)
    turn = made.turn(view)
    assert turn.waiting == (1, 0)
    assert turn.overdue == {"batch"}
    made.planned(5)  # every second step, until it is read
    assert made.turn(replace(view, now_s=1000.2)).overdue == {"batch"}
    made.planned(5)
    made.turn(replace(view, now_s=1000.4))
    made.planned(10)
    assert made.turn(replace(view, now_s=1001.0)).waiting == (0, 1)
    assert made.turn(replace(view, now_s=1001.0)).overdue == set()
    assert made.turn(replace(view, now_s=1060.5)).overdue == {"batch"}


def test_whoever_had_its_first_token_in_time_is_not_relegated_when_preempted() -> None:
    """One that was relegated before its first token goes on behind those that can be kept."""
    made, late = order(), asked("late", 100, "chat", age_s=5.0)
    kept, answered = asked("kept", 100, "chat"), asked("answered", 100, "chat", age_s=5.0, answering=True)
    made.turn(StepView(1000.0, 0, 0, 0, (), (late, kept), 4096, free_slots=8))
    assert made.relegated == {"late"}
    waiting = (kept, replace(late, answering=True), answered)
    assert made.turn(StepView(1000.0, 0, 0, 0, (), waiting, 4096, free_slots=8)).waiting == (2, 0, 1)
    assert made.relegated == {"late"}


def test_how_fast_a_queue_is_read_counts_the_steps_that_read_nothing() -> None:
    made = order()
    before = made.pace()
    assert before is not None
    for _ in range(200):
        made.observe(StepRecord(StepShape(150, 50, 0, 0.0, 51), 150, Reason.SLO, None, 0.1, 0.0))
        made.observe(StepRecord(StepShape(50, 50, 0, 0.0, 50), 50, Reason.GROWTH, None, 0.1, 0.0))
    pace = made.pace()
    assert pace is not None
    assert pace[0] == pytest.approx(0.002, rel=0.1)
    for _ in range(200):
        made.observe(StepRecord(StepShape(50, 50, 0, 0.0, 50), 50, Reason.BACKFILL, None, 0.1, 0.0))
    assert made.pace() == pace


# --- Backfill ---


def backfill(learnt: Answers, least_slo_s: float = math.inf) -> Backfill:
    return Backfill(Known(), Growth(Known(), learnt, 30.0), least_slo_s)  # type: ignore[arg-type]


def batch_of(count: int, tokens: int = 500) -> list[RequestView]:
    return [prompt(f"b{i}", tokens, slo_class=CLASSES.named("batch")) for i in range(count)]


def room(
    running: int = 0, kv_tokens: int = 0, free: int = 100_000, slots: int = 64, **fields: Any
) -> StepView:
    return step(occupancy=Occupancy(running, kv_tokens, free), free_slots=slots, **fields)


def test_batch_work_leaves_the_slots_that_slos_have_needed() -> None:
    limit = backfill(answers(10))
    many = candidate(*batch_of(70), tokens=40_000)
    tokens, reason = limit(room(running=4), many)
    spare = math.ceil(LEAST_SPARE_SHARE * (8 + 64) - 4)
    assert reason is Reason.BACKFILL
    assert tokens == 500 * (64 - max(1, spare))
    limit(room(running=0, decodes=40), many)  # 40 with an SLO have run at once
    assert limit(room(running=4), many)[0] == 500 * (64 - (40 - 4))
    assert limit(replace(room(running=4), now_s=3600.0), many)[0] == tokens


def test_those_who_come_count_before_they_run() -> None:
    limit = backfill(answers(10))
    coming = candidate(*(prompt(f"a{i}", 100) for i in range(40)), tokens=4000)
    limit(room(running=4), coming)
    assert limit(room(running=4), candidate(*batch_of(70), tokens=40_000))[0] == 500 * (64 - 40)


def test_prompts_with_an_slo_are_not_held_for_batch_work_behind_them() -> None:
    limit = backfill(answers(10))
    mixed = candidate(prompt("a", 300), *batch_of(3), tokens=4096)
    assert limit(room(slots=1), mixed) == (300, Reason.BACKFILL)
    assert limit(room(slots=64), mixed) == (4096, Reason.SLO)
    assert limit(step(), mixed) == (4096, Reason.SLO)  # no batch class


def test_batch_work_leaves_room_in_the_kv_cache() -> None:
    limit = backfill(answers(10))
    many = candidate(*batch_of(40), tokens=40_000)
    tokens, reason = limit(room(running=8, kv_tokens=800, free=10_000), many)
    assert reason is Reason.BACKFILL
    assert 0.8 * 10_000 <= tokens <= (1 - LEAST_SPARE_SHARE) * 10_000


def test_batch_work_is_careful_while_nobody_knows_how_long_answers_are() -> None:
    tokens, reason = backfill(Answers())(room(), candidate(*batch_of(40), tokens=40_000))
    assert (tokens, reason) == (500 * UNKNOWN_ANSWER_RUNNING, Reason.BACKFILL)


def test_decodes_of_batch_work_stay_within_the_slos_of_others() -> None:
    slo_s = 0.030
    tokens, reason = backfill(answers(10), slo_s)(room(), candidate(*batch_of(60), tokens=60_000))
    assert reason is Reason.BACKFILL
    running = 8 + tokens // 500
    assert STEP_S + (DECODE_S + 0.0001) * running + CONTEXT_S * (800 + tokens) <= slo_s


def test_the_first_on_an_idle_device_and_what_has_waited_for_its_bound_are_let_in() -> None:
    one = batch_of(2)
    idle = replace(room(slots=1, free=600), decodes=0, decode_tokens=0, decode_context_tokens=0)
    assert backfill(answers(10))(idle, candidate(*one)) == (500, Reason.BACKFILL)
    full = room(slots=1, free=400)
    assert backfill(answers(10))(full, candidate(*one)) == (0, Reason.BACKFILL)
    assert backfill(answers(10))(full, candidate(*one, overdue={"b0"})) == (500, Reason.BACKFILL)


def test_growth_holds_batch_work_however_long_it_has_waited() -> None:
    old = [replace(request, age_s=99.0) for request in batch_of(3, 2000)]
    assert growth(answers(4000))(step(), candidate(*old, available_s=0.040))[1] is Reason.GROWTH
    starving = candidate(*old, available_s=0.040, overdue={"b0", "b1", "b2"})
    assert growth(answers(4000))(step(), starving)[1] is Reason.SLO


# --- Tenants that crowd ---


def crowd(made: ClassOrder, free_slots: int, free_tokens: int, running: dict[str, int]) -> StepView:
    chat = CLASSES.default_class
    for tenant in running:
        made.tag(chat, tenant, 10)
    waiting = [asked(f"{name} waits", 500, "chat", tenant=name) for name in ("flood", "light")]
    occupancy = Occupancy(0, 0, free_tokens, running)
    count = sum(running.values())
    return StepView(
        0.0, count, count, 0, (), tuple(waiting), 8192, free_slots=free_slots, occupancy=occupancy
    )


@pytest.mark.parametrize(
    ("free_slots", "free_tokens", "running", "left_out"),
    [
        (100, 100_000, {"flood": 90, "light": 10}, set()),
        (30, 100_000, {"flood": 90, "light": 10}, set()),
        (7, 100_000, {"flood": 90, "light": 10}, {"flood waits"}),
        (100, 520, {"flood": 90, "light": 10}, {"flood waits"}),
        (7, 100_000, {"flood": 50, "light": 50}, set()),
        (7, 100_000, {"flood": 100}, set()),
    ],
    ids=str,
)
def test_who_has_more_running_than_its_part_leaves_room_for_others(
    free_slots: int, free_tokens: int, running: dict[str, int], left_out: set[str]
) -> None:
    made = order()
    view = crowd(made, free_slots, free_tokens, running)
    turn = made.turn(view)
    assert turn.left_out == left_out
    if left_out:
        assert turn.waiting == (1, 0)
        prompts = turn.prompts(view)
        sized = candidate(*prompts, tokens=4096, left_out=turn.left_out)
        assert backfill(answers(10))(view, sized) == (500, Reason.BACKFILL)


def test_what_is_beyond_a_share_is_never_overdue_before_others() -> None:
    made = order()
    chat = CLASSES.default_class
    for tenant in ("flood", "light"):
        made.tag(chat, tenant, 10)
    made._shares["chat"].seen(5.0)
    old = asked("old", 10, "chat", age_s=99.0, tenant="flood", tag=5.0)
    new = asked("new", 10, "chat", tenant="light", tag=5.5)
    assert line(made, old, new) == ["new", "old"]
    assert line(made, replace(old, tag=4.0), new) == ["old", "new"]
    bond = Bond(None, 1.0, chat, "flood", 5.0)
    assert not made.presses(bond, 99.0, "old", False)
    assert made.presses(replace(bond, tag=4.0), 99.0, "old", False)


def test_who_is_kept_out_pays_until_the_other_is_before_it() -> None:
    made = order()
    view = crowd(made, 7, 100_000, {"flood": 90, "light": 10})
    flood, light = (replace(each, remaining_tokens=100) for each in view.waiting)
    flood, light = replace(flood, age_s=0.2), replace(light, tag=CREDIT_S + 1.0)
    view = replace(view, waiting=(flood, light))
    assert made.turn(view).left_out == {"flood waits"}
    assert line(made, flood, light, now_s=0.5) == ["flood waits", "light waits"]
    for now_s in (1.0, 1.5, 2.5, 3.5):  # it pays where the step before kept it out, a second at the most
        made.turn(replace(view, now_s=now_s))
    assert line(made, flood, light, now_s=99.0) == ["light waits", "flood waits"]
    assert made._shares["chat"].place("flood", 0.0) == 0.5 + 0.5 + 1.0 + 1.0 + 1.0


def test_a_step_that_nobody_can_have_a_part_in_is_charged_for_once_and_relegates_nobody() -> None:
    made = order()
    view = crowd(made, 7, 100_000, {"flood": 90, "light": 10})
    late = asked("late", 10, "chat", age_s=1.5, tenant="light")
    assert made.turn(replace(view, waiting=(*view.waiting, late))).left_out == {"flood waits"}
    assert made.relegated == {"late"}
    full = replace(view, waiting=(), unseen_waiting=3, free_slots=0)
    for now_s in (0.5, 1.0, 1.5):
        turn = made.turn(replace(full, now_s=now_s))
        assert not made.relegated
        assert not turn.prompts(full)
        assert (turn.prefills, turn.held, turn.waiting) == ((), (), ())
    assert made._shares["chat"].place("flood", 0.0) == 0.5


def test_a_tenant_with_little_waiting_is_seen_behind_one_that_floods() -> None:
    made = order()
    chat = CLASSES.default_class
    index: WaitingIndex[str] = WaitingIndex(made.lists)
    for i in range(200):
        tag = made.tag(chat, "flood", 100)
        index.add(f"flood {i}", made.keys(Facts(10.0 + i / 1e3, 100, 1.0, chat, tag, "flood")))
    made._shares["chat"].pay("flood", 30.0)
    made._shares["chat"].seen(28.0)
    index.add("light", made.keys(Facts(11.0, 100, 1.0, chat, made.tag(chat, "light", 100), "light")))
    assert "light" in index.candidates(made.starts(10.0))


def test_steps_with_classes_are_planned_within_the_slo_of_each_request() -> None:
    classes = SloClasses((SloClass("chat", tbt_slo_ms=150),), "chat")
    loop = Loop(StepController(SarathiConfig(slo_classes=classes)), roofline())
    for _ in range(100):
        loop.step()
    seen: list[float] = []
    policy = loop.controller.policy
    assert isinstance(policy, SloPolicy)
    policy.limits = (lambda _, sized: seen.append(sized.available_s) or (100, Reason.SLO),)
    loop.step()
    assert seen == [CLASS_SLO_SHARE * 0.150]
    assert policy.tbt_slo_s == 0.150


def wanting(name: str, blocks: int, due_s: float = math.inf, tokens: int = 100) -> Wanting[str]:
    return Wanting(name, due_s, 0.0, blocks, tokens)


def test_as_little_batch_work_gives_way_as_lets_the_others_run() -> None:
    holding = [Holding("newest", 10), Holding("older", 30), Holding("oldest", 40)]
    assert giving_way([wanting("a", 5)], holding, 0, 100, 999) == (["a"], ["newest"])
    assert giving_way([wanting("a", 25)], holding, 8, 10, 999) == (["a"], ["newest", "older"])
    assert giving_way([wanting("a", 5)], holding, 8, 10, 999) == (["a"], [])
    late, soon = wanting("late", 10, due_s=9.0), wanting("soon", 10, due_s=1.0)
    assert giving_way([late, soon], holding, 0, 0, 999) == (["soon", "late"], ["newest", "older"])
    assert giving_way([late, soon], holding, 0, 0, 100) == (["soon"], ["newest"])  # a step reads no more


def test_nobody_gives_way_to_one_who_would_not_find_enough_room() -> None:
    holding = [Holding("newest", 10), Holding("oldest", 40)]
    assert giving_way([wanting("a", 51)], holding, 8, 0, 999) == ([], [])
    huge, small = wanting("huge", 90, due_s=2.0), wanting("small", 10, due_s=1.0)
    assert giving_way([huge, small], holding, 0, 0, 999) == (["small"], ["newest"])


def test_what_was_begun_at_its_bound_does_not_give_way() -> None:
    made = order()
    batch, other = asked("batch", 10, "batch", age_s=61.0), asked("other", 10, "batch", tag=1.0)
    made.turn(StepView(1000.0, 0, 0, 0, (), (batch, other), 8192))
    made.planned(20)
    assert (made.gives_way("batch"), made.gives_way("other")) == (False, True)
    made.ended("batch")
    assert made.gives_way("batch")
