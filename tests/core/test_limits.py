"""Each limit alone, on a device whose step times are known: what it allows, and why."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_sarathi.core.chunk_rules import ChunkRules
from vllm_sarathi.core.classes import SloClass
from vllm_sarathi.core.experience import Attempts
from vllm_sarathi.core.limits.backlog import Backlog
from vllm_sarathi.core.limits.base import Candidate, complete_within, reached_within, within_step
from vllm_sarathi.core.limits.cold import COLD_TOKENS, IDLE_TOKENS, Cold
from vllm_sarathi.core.limits.even import EvenParts
from vllm_sarathi.core.limits.fit import Fit
from vllm_sarathi.core.limits.floor import KNOWN_HYBRID_STEPS, LATE_TIMES, Floor
from vllm_sarathi.core.limits.growth import LEAST_ANSWERS, Answers, Growth
from vllm_sarathi.core.limits.shape import TAIL_SHARE, Tail, Tile, Uncut
from vllm_sarathi.core.limits.stop_early import StopEarly
from vllm_sarathi.core.limits.trust import GROWTH, KNOWN_GROWTH, KNOWN_STEPS, Trust
from vllm_sarathi.core.limits.turnover import Turnover
from vllm_sarathi.core.types import ONE_STAGE, Pipeline, Reason, RequestView, StepView

STEP_S, TOKEN_S, DECODE_S, CONTEXT_S, ENCODER_S = 0.010, 0.0001, 0.0005, 1e-6, 0.0002
"""Of the device: a step with 8 decodes of 100 tokens each takes 15.6 ms, and each prompt token 0.1 ms more."""

BATCH = SloClass("batch", batch=True)


@dataclass
class Known:
    """An Experience of that device."""

    pipeline: Pipeline = ONE_STAGE
    tile_tokens: int = 1
    ready: bool = True
    hybrid_steps: int = KNOWN_HYBRID_STEPS
    most_tokens: int = 1000
    most_idle_tokens: int = 1000
    last_prefill_tokens: int = 0
    steps_without_prefill: int = 1000
    late_credit: float = 0.0
    decode_step_s: float | None = 0.0156
    alone: float = 0.0
    attempts: Attempts = field(default_factory=Attempts)
    any_prefill_s: float = 0.0
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        self.model = SimpleNamespace(
            margin=1.0,
            decode_margin=1.0,
            tile_tokens=self.tile_tokens,
            ready=self.ready,
            seconds=self.model_seconds,
        )

    def model_seconds(
        self, tokens: int, decodes: int, context: int, work: float, sequences: int, encoder: int = 0
    ) -> float:
        tiled = -(-tokens // self.tile_tokens) * self.tile_tokens
        parts_s = TOKEN_S * tiled + DECODE_S * decodes + CONTEXT_S * context + ENCODER_S * encoder
        return STEP_S + parts_s

    def seconds(self, view: StepView, tokens: int, work: float, prompts: int, encoder: int = 0) -> float:
        return (self.any_prefill_s if tokens else 0.0) + self.model_seconds(
            view.decode_tokens + tokens,
            view.decodes,
            view.decode_context_tokens,
            work,
            view.decodes + prompts,
            encoder,
        )

    def tokens_as_alone(self, spare_s: float) -> int:
        return int(self.alone * spare_s)


def prompt(name: str, left: int, done: int = 0, age_s: float = 0.0, **fields: Any) -> RequestView:
    return RequestView(name, (0.0, 0.0), age_s, done, left, **fields)


def step(decodes: int = 8, context: int = 800, **fields: Any) -> StepView:
    return replace(StepView(0.0, decodes, decodes, context, (), (), 8192), **fields)


def candidate(
    *prompts: RequestView, tokens: int = 4096, available_s: float = 0.050, **fields: Any
) -> Candidate:
    return Candidate(list(prompts), tokens, fields.pop("reason", Reason.SLO), available_s, **fields)


def fit(known: Known) -> Fit:
    return Fit(known, StopEarly(known, Backlog()))  # type: ignore[arg-type]


# --- Fit: 50 ms less 15.6 for the decodes and 0.8 for their tokens hold 344 tokens, as decodes have 8 of them ---


def test_fit_takes_what_ends_in_time() -> None:
    known = Known()
    tokens, reason = fit(known)(step(), candidate(prompt("a", 5000)))
    assert reason is Reason.SLO
    assert known.seconds(step(), tokens, 0.0, 1) <= 0.050 < known.seconds(step(), tokens + 1, 0.0, 1)


def test_fit_takes_all_where_all_ends_in_time() -> None:
    assert fit(Known())(step(), candidate(prompt("a", 100), prompt("b", 50))) == (150, Reason.ALL)


def test_fit_counts_the_margin() -> None:
    known = Known()
    bare, _ = fit(known)(step(), candidate(prompt("a", 5000)))
    known.model.margin = 1.25
    careful, _ = fit(known)(step(), candidate(prompt("a", 5000)))
    assert bare - careful == pytest.approx(0.010 / TOKEN_S, abs=1)


def test_fit_counts_the_images_that_an_encoder_computes() -> None:
    known = Known()
    bare, _ = fit(known)(step(), candidate(prompt("a", 5000)))
    with_image = prompt("a", 5000, encoder_inputs=((0, 50),))
    encoding, _ = fit(known)(step(), candidate(with_image))
    assert bare - encoding == pytest.approx(50 * ENCODER_S / TOKEN_S, abs=1)


# --- Cold ---


@pytest.mark.parametrize(("decodes", "least"), [(8, COLD_TOKENS), (0, IDLE_TOKENS)])
def test_cold_starts_with_little(decodes: int, least: int) -> None:
    cold = Cold(Known(ready=False))  # type: ignore[arg-type]
    assert cold(step(decodes), candidate(prompt("a", 5000))) == (least, Reason.COLD)


def test_cold_believes_what_was_prefilled_alone() -> None:
    cold = Cold(Known(ready=False, alone=10_000))  # type: ignore[arg-type]
    assert cold(step(), candidate(prompt("a", 5000))) == (250, Reason.COLD)  # half of 50 ms


def test_cold_ends_when_the_model_is_ready() -> None:
    assert Cold(Known())(step(), candidate(prompt("a", 5000))) == (4096, Reason.SLO)  # type: ignore[arg-type]


# --- Trust ---


@pytest.mark.parametrize(("seen", "growth"), [(0, GROWTH), (KNOWN_STEPS, KNOWN_GROWTH)])
def test_trust_grows_by_what_was_seen(seen: int, growth: float) -> None:
    trust = Trust(Known(most_tokens=100, hybrid_steps=seen))  # type: ignore[arg-type]
    assert trust(step(), candidate(prompt("a", 5000))) == (growth * 100 - 8, Reason.TRUST)


def test_trust_bounds_steps_without_decodes_by_their_own_kind() -> None:
    trust = Trust(Known(most_tokens=4000, most_idle_tokens=300))  # type: ignore[arg-type]
    assert trust(step(0, 0), candidate(prompt("a", 5000))) == (GROWTH * 300, Reason.TRUST)


def test_trust_leaves_a_small_step_alone() -> None:
    trust = Trust(Known(most_tokens=1000))  # type: ignore[arg-type]
    assert trust(step(), candidate(prompt("a", 5000), tokens=300)) == (300, Reason.SLO)


# --- Tail, tile, uncut ---


@pytest.mark.parametrize(("left", "taken"), [(328, 328), (400, 320)])
def test_tail_completes_a_prompt_that_would_leave_a_few_tokens(left: int, taken: int) -> None:
    assert (left - 320 <= TAIL_SHARE * 320) == (taken == left)
    tail = Tail(Known())  # type: ignore[arg-type]
    assert tail(step(), candidate(prompt("a", left), tokens=320)) == (taken, Reason.SLO)


def test_tail_makes_no_step_late() -> None:
    tail = Tail(Known())  # type: ignore[arg-type]
    assert tail(step(), candidate(prompt("a", 328), tokens=320, available_s=0.046))[0] == 320
    known = Known()
    known.model.margin = 1.2
    assert Tail(known)(step(), candidate(prompt("a", 328), tokens=320))[0] == 320  # type: ignore[arg-type]


def test_a_chunk_ends_at_a_tile_where_the_rest_is_not_worth_its_time() -> None:
    tile = Tile(Known(tile_tokens=256))  # type: ignore[arg-type]
    assert tile(step(), candidate(prompt("a", 5000), tokens=1024 - 8 + 10))[0] == 1024 - 8
    assert tile(step(), candidate(prompt("a", 5000), tokens=1024 - 8 + 230))[0] > 1024


@pytest.mark.parametrize(
    ("rules", "taken"),
    [(ChunkRules(whole=((200, 400),)), 200), (ChunkRules(multiple=128), 256), (ChunkRules(), 300)],
)
def test_nothing_is_cut_that_must_be_whole(rules: ChunkRules, taken: int) -> None:
    tokens, reason = Uncut()(step(), candidate(prompt("a", 1000, rules=rules), tokens=300))
    assert tokens == taken
    assert (reason is Reason.UNCUT) == (taken != 300)


# --- Stop early ---


def test_a_step_ends_with_a_prompt_where_that_spares_more_than_it_costs() -> None:
    stop = StopEarly(Known(), Backlog())  # type: ignore[arg-type]
    prompts = [*(prompt(name, 100) for name in "abcd"), prompt("long", 5000)]
    assert stop(
        step(), prompts, 400, 0.0, 4, 0
    )  # four answers, 41 ms of reading each waits for; one waits 15.6
    assert not stop(step(), [prompt("a", 10), *(prompt(str(i), 900) for i in range(8))], 10, 0.0, 1, 0)
    assert not stop(step(), prompts[:4], 400, 0.0, 4, 0)  # nobody is left


def test_what_an_encoder_takes_counts_where_a_step_may_end_with_a_prompt() -> None:
    images = ((0, 300),)
    prompts = [prompt("image", 10, encoder_inputs=images), prompt("long", 5000)]
    assert fit(Known())(step(), candidate(*prompts, available_s=0.2)) == (10, Reason.ANSWER)
    assert fit(Known())(step(), candidate(prompt("none", 10), prompts[1], available_s=0.2))[1] is Reason.SLO


def test_of_a_prompt_that_the_engine_takes_in_parts_the_rest_leaves_room_for_others() -> None:
    view = step(most_of_one=64)
    long, short = prompt("long", 6000), prompt("short", 50)
    prompts = within_step(view, [long, short])
    assert [request.remaining_tokens for request in prompts] == [64, 50]
    assert [request.whole_tokens for request in prompts] == [6000, 50]
    assert (reached_within(prompts, 114), complete_within(prompts, 114)) == (2, 1)
    assert fit(Known())(view, candidate(*prompts, available_s=0.2)) == (114, Reason.ALL)
    assert within_step(step(), [long, short]) == [long, short]


# --- Even parts ---


def test_a_pipeline_reads_in_even_parts() -> None:
    even = EvenParts(Known(pipeline=Pipeline(4)), Backlog())  # type: ignore[arg-type]
    tokens, reason = even(step(), candidate(prompt("a", 4000)))
    assert reason is Reason.EVEN
    assert 256 <= tokens <= 1000
    assert EvenParts(Known(), Backlog())(step(), candidate(prompt("a", 4000)))[0] == 4096  # type: ignore[arg-type]


# --- Floor ---


def floor(known: Known, max_wait_s: float = 30.0) -> Floor:
    return Floor(known, max_wait_s)  # type: ignore[arg-type]


def test_floor_leaves_alone_what_has_room() -> None:
    assert floor(Known())(step(), candidate(prompt("a", 500), tokens=20)) == (20, Reason.SLO)


def test_without_room_prompts_wait_until_a_step_may_be_late() -> None:
    known = Known()
    none = candidate(prompt("a", 5000), tokens=0, available_s=0.015, decode_s=0.0148)
    assert floor(known)(step(), none) == (0, Reason.FULL)
    known.late_credit = 1.5
    known.attempts.tries(0.015)
    known.attempts.came_to(0.016)  # a small chunk was tried, and was late
    tokens, reason = floor(known)(step(), none)
    assert reason is Reason.FLOOR
    assert (
        known.seconds(step(), tokens, 0.0, 1)
        <= LATE_TIMES * 0.015
        < known.seconds(step(), tokens + 1, 0.0, 1)
    )
    assert known.late_credit == 0.5


def test_what_steps_without_decodes_say_is_no_reason_to_be_late_on_purpose() -> None:
    """Two of them can make a step look as if it had a large constant part, in which nothing fits beside decodes."""
    known = Known(late_credit=4.0, hybrid_steps=0)
    near = candidate(prompt("a", 500), tokens=3, available_s=0.016, decode_s=0.0148)
    tokens, reason = floor(known)(step(), near)
    assert reason is Reason.DOUBT
    assert 3 <= tokens <= COLD_TOKENS
    assert known.attempts.came_to(0.0161)
    assert floor(known)(step(), near) == (3, Reason.SLO)
    known.hybrid_steps = KNOWN_HYBRID_STEPS
    assert floor(known)(step(), near)[1] is Reason.FLOOR


def late_step(*prompts: RequestView, **fields: Any) -> int:
    """Return what a step takes that is late on purpose and may take 12 x 15 ms, less the 15.6 of its decodes."""
    known = Known(late_credit=1.0, attempts=Attempts())
    known.attempts.tries(0.015)
    known.attempts.came_to(0.016)
    none = candidate(*prompts, tokens=0, available_s=0.015, decode_s=0.0148, **fields)
    tokens, reason = floor(known)(step(), none)
    assert reason is Reason.FLOOR
    return tokens


def test_a_late_step_takes_as_many_prompts_as_it_holds() -> None:
    short = [prompt(f"r{i}", 300) for i in range(9)]
    alone = late_step(prompt("a", 5000))
    assert late_step(*short) == alone == 1643
    assert late_step(*short[:3]) == 900
    assert late_step(short[0], prompt("b", 300, slo_class=BATCH)) == 300  # nothing gives way to batch work
    uncut = prompt("image", 1500, rules=ChunkRules(whole=((0, 1500),)))
    assert late_step(short[0], uncut) == 300


def test_a_late_step_lets_in_nobody_whose_answer_would_outgrow_the_slo() -> None:
    short = [prompt(f"r{i}", 300) for i in range(9)]
    assert late_step(*short, admitted_tokens=600) == 600


def test_where_the_prediction_leaves_room_a_small_chunk_is_tried() -> None:
    known = Known(late_credit=1.0)
    near = candidate(prompt("a", 500), tokens=0, available_s=0.016, decode_s=0.0148)
    tokens, reason = floor(known)(step(), near)
    assert reason is Reason.DOUBT
    assert 0 < tokens <= COLD_TOKENS
    assert known.seconds(step(), tokens, 0.0, 1) <= 0.016
    assert known.late_credit == 1.0  # nothing is spent before it has turned out late
    assert known.attempts.came_to(0.0161)
    assert floor(known)(step(), near)[1] is Reason.FLOOR  # next, a step that is late on purpose


def test_attempts_that_were_late_are_tried_ever_more_seldom() -> None:
    attempts, late_steps = Attempts(), []
    attempts.tries(0.010)
    for _ in range(6):
        assert attempts.came_to(0.011)
        late_steps.append(0)
        while not attempts.allowed:
            attempts.gave_way()
            late_steps[-1] += 1
    assert late_steps == [1, 3, 7, 15, 15, 15]
    assert not attempts.came_to(0.009)
    assert attempts.allowed


def test_a_prompt_that_has_waited_too_long_makes_the_gaps_give_way() -> None:
    waited = candidate(prompt("a", 500, age_s=31.0), tokens=0, available_s=0.017, decode_s=0.0164)
    tokens, reason = floor(Known())(step(), waited)
    assert tokens >= COLD_TOKENS
    assert reason is Reason.FLOOR


def test_only_the_first_prompt_can_have_waited_too_long() -> None:
    behind = candidate(
        prompt("a", 500), prompt("b", 500, age_s=31.0), tokens=0, available_s=0.015, decode_s=0.0148
    )
    assert floor(Known())(step(), behind) == (0, Reason.FULL)


def test_one_that_waits_too_long_for_what_the_first_reads_makes_the_gaps_give_way() -> None:
    reader, sibling = prompt("a", 500), prompt("b", 500, age_s=31.0, reader=0)
    behind = candidate(reader, sibling, tokens=0, available_s=0.015, decode_s=0.0148)
    assert floor(Known())(step(prefills=(reader,)), behind)[1] is Reason.FLOOR
    behind.left_out = frozenset("b")
    assert floor(Known())(step(prefills=(reader,)), behind) == (0, Reason.FULL)


def test_a_chunk_of_next_to_nothing_is_no_progress() -> None:
    known = Known(late_credit=1.0)
    few = candidate(prompt("a", 500), tokens=3, available_s=0.015, decode_s=0.0148)
    assert floor(known)(step(), few)[1] is Reason.FLOOR
    assert floor(known)(step(), few) == (3, Reason.SLO)  # without credit better than nothing
    last = candidate(prompt("a", 3), tokens=3, available_s=0.015, decode_s=0.0148)
    assert floor(Known(late_credit=1.0))(step(), last) == (3, Reason.SLO)


def test_late_decodes_leave_prompts_a_share_and_rest_in_between() -> None:
    known = Known(steps_without_prefill=0, any_prefill_s=0.012)
    late = candidate(prompt("a", 5000), tokens=0, available_s=0.010, decode_s=0.0164, late=True)
    assert floor(known)(step(), late)[0] == 0
    known.steps_without_prefill = 100
    assert floor(known)(step(), late)[0] >= COLD_TOKENS


def test_what_cannot_be_cut_goes_where_it_is_a_little_too_long() -> None:
    image = prompt("a", 300, rules=ChunkRules(whole=((0, 300),)))
    short = candidate(image, tokens=0, available_s=0.035, decode_s=0.0164)
    assert floor(Known())(step(), short) == (300, Reason.UNCUT)
    assert floor(Known())(step(), replace(short, available_s=0.020))[0] == 0


def encoded(embeddings: int, **fields: Any) -> Candidate:
    """Return a step whose next prompt is an image that must not be cut; its 10 tokens take 1 ms."""
    image = prompt("a", 10, rules=ChunkRules(whole=((0, 10),)), encoder_inputs=((0, embeddings),))
    return candidate(image, **({"tokens": 0, "available_s": 0.020, "decode_s": 0.0164} | fields))


def test_an_image_whose_encoder_takes_long_goes_when_a_step_may_be_late() -> None:
    assert floor(Known())(step(), encoded(50)) == (10, Reason.UNCUT)  # 27 ms of 30
    known = Known(late_credit=1.0)
    assert floor(known)(step(), encoded(100)) == (10, Reason.FLOOR)
    assert known.late_credit == 0.0
    assert floor(known)(step(), encoded(100)) == (0, Reason.FULL)


def test_an_image_whose_encoder_takes_long_is_no_attempt() -> None:
    anywhere = replace(encoded(100).prompts[0], rules=ChunkRules())
    late = replace(encoded(100), prompts=[anywhere])
    assert floor(Known(late_credit=1.0))(step(), late) == (10, Reason.FLOOR)


def test_a_late_step_takes_no_more_images_than_it_may() -> None:
    images = [replace(encoded(500).prompts[0], request_id=name) for name in "abcdef"]
    many = candidate(*images, tokens=0, available_s=0.020, decode_s=0.0164)
    tokens, _ = floor(Known(late_credit=1.0))(step(), many)
    assert tokens == 20  # 0.1 s each, of 0.24


def test_where_decodes_are_late_an_image_has_a_fifth_of_the_time() -> None:
    late = encoded(500, available_s=0.010, late=True)  # 0.1 s, and 4.1 ms for each step of decodes
    assert floor(Known(steps_without_prefill=20))(step(), late) == (0, Reason.FULL)
    assert floor(Known(steps_without_prefill=25))(step(), late) == (10, Reason.FLOOR)


def test_a_tail_with_an_image_is_as_long_as_its_encoder_takes() -> None:
    def tail(**fields: Any) -> int:
        ends = candidate(prompt("a", 345, **fields), tokens=344)
        return Tail(Known())(step(), ends)[0]  # type: ignore[arg-type]

    assert tail() == 345
    assert tail(encoder_inputs=((344, 100),)) == 344


# --- Growth ---


def answers(mean_tokens: int, prompt_tokens: int = 100) -> Answers:
    learnt = Answers()
    for number in range(2 * LEAST_ANSWERS):
        learnt.ended(f"{number}", prompt_tokens, mean_tokens)
    return learnt


def growth(learnt: Answers) -> Growth:
    return Growth(Known(), learnt, 30.0)  # type: ignore[arg-type]


def test_growth_lets_in_what_the_slo_holds_until_the_answers_end() -> None:
    three = [prompt(name, 2000) for name in "abc"]
    assert growth(answers(10))(step(), candidate(*three, available_s=0.040)) == (4096, Reason.SLO)
    wide = candidate(*three, available_s=0.040)
    tokens, reason = growth(answers(4000))(step(), wide)
    assert reason is Reason.GROWTH
    assert tokens == wide.admitted_tokens < 4096


def test_growth_expects_no_answer_to_outlast_what_it_may() -> None:
    learnt = answers(4000)
    for number in range(9):
        learnt.arrived(f"now{number}", 10)
    three = [prompt(name, 2000) for name in "abc"]
    assert growth(learnt)(step(), candidate(*three, available_s=0.040)) == (4096, Reason.SLO)
    for number in range(9):
        learnt.ended(f"now{number}", 100, 4000)
    assert growth(learnt)(step(), candidate(*three, available_s=0.040))[1] is Reason.GROWTH


def test_growth_counts_the_prompts_that_are_half_read() -> None:
    half_read = tuple(prompt(f"r{i}", 10, done=2000) for i in range(12))
    waiting = prompt("w", 100)
    alone = candidate(waiting, available_s=0.030)
    beside = candidate(*half_read, waiting, available_s=0.030)
    assert growth(answers(10))(step(), alone)[1] is Reason.SLO
    assert growth(answers(10))(step(prefills=half_read), beside)[1] is Reason.GROWTH


# --- Turnover ---


def test_where_others_wait_for_blocks_a_step_is_halved_as_long_as_that_serves_more() -> None:
    turnover = Turnover(Known())  # type: ignore[arg-type]
    wide = candidate(prompt("a", 4096), decode_s=0.0148, available_s=0.5)
    assert turnover(step(), wide) == (4096, Reason.SLO)  # nobody waits for blocks
    # A step of half the size costs the prompt 14.8 ms, as much as decodes alone: nothing is gained.
    assert turnover(step(blocked=9), wide) == (4096, Reason.SLO)
    cheap = candidate(prompt("a", 4096), decode_s=0.020, available_s=0.5)
    assert turnover(step(blocked=1), cheap) == (4096, Reason.SLO)  # 5 ms for one, 15 lost by another
    tokens, reason = turnover(step(blocked=4), cheap)
    assert (tokens, reason) == (128, Reason.TURNOVER)


def test_growth_lets_in_who_has_waited_too_long() -> None:
    old = [prompt(name, 2000, age_s=31.0) for name in "abc"]
    assert growth(answers(4000))(step(), candidate(*old, available_s=0.040))[1] is Reason.SLO


def test_before_the_lengths_of_answers_are_known_growth_looks_at_the_next_step() -> None:
    one = prompt("a", 2000)
    assert growth(answers(4000))(step(), candidate(one, available_s=0.025))[1] is Reason.GROWTH
    assert growth(Answers())(step(), candidate(one, available_s=0.025))[1] is Reason.SLO
    assert growth(Answers())(step(), candidate(one, available_s=0.017))[1] is Reason.GROWTH


def test_where_decodes_are_late_since_they_are_many_nobody_is_let_in_until_answers_end() -> None:
    crowd = step(decodes=200, context=400_000)
    alone_s = Known().model.seconds(200, 200, 400_000, 0.0, 200)
    late = candidate(prompt("a", 2000), available_s=0.95 * alone_s, decode_s=alone_s, late=True)
    assert growth(Answers())(crowd, late) == (0, Reason.GROWTH)
    held_back = replace(late, tokens=0, reason=Reason.GROWTH)
    assert floor(Known())(crowd, held_back) == (0, Reason.GROWTH)
    overdue = replace(held_back, prompts=[prompt("a", 2000, age_s=31.0)])
    assert floor(Known())(crowd, overdue)[1] is Reason.FLOOR
    # Where half as many would be late as well, it is the SLO that cannot be kept, and the prompts get their share.
    few = step(decodes=8, context=800)
    tight = candidate(prompt("a", 2000), available_s=0.010, decode_s=0.0156, late=True)
    assert growth(Answers())(few, tight) == (4096, Reason.SLO)
