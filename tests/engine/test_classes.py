"""Classes in the real scheduler under a virtual clock: who is read first, who is refused, what batch work takes."""

import itertools
import json
import random
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.engine.virtual import LinearDevice, VirtualEngine, random_tokens, share_kept
from vllm_sarathi import SarathiConfig
from vllm_sarathi.core.figures import ClassGaps
from vllm_sarathi.core.gate import Refusal
from vllm_sarathi.engine.admission import REFUSED, is_refusal, sentence, stop_reason

LIMITS = {"max_model_len": 8192, "max_num_seqs": 64, "max_num_batched_tokens": 4096}
DEVICE = LinearDevice(token_s=0.0002, step_s=0.010)

CLASSES: dict[str, Any] = {
    "default": "standard",
    "classes": {
        "interactive": {"ttft_slo_ms": 500, "tbt_slo_ms": 50, "when_late": "refuse"},
        "standard": {"ttft_slo_ms": 3000, "tbt_slo_ms": 100, "when_late": "relegate"},
        "served": {"ttft_slo_ms": 500, "tbt_slo_ms": 100},
        "batch": {"batch": True, "max_wait_s": 20},
    },
}


class ClassEngine(VirtualEngine):
    """A virtual engine whose requests name their class; it keeps what those that were refused are told."""

    def __init__(
        self, make_config: Any, classes: dict[str, Any] = CLASSES, num_blocks: int = 6000, **limits: Any
    ) -> None:
        config = SarathiConfig.from_mapping({"slo_classes": classes, "calibration_dir": "none"})
        super().__init__(make_config(config, **{**LIMITS, **limits}), DEVICE, num_blocks)
        self.refused: dict[str, dict[str, Any]] = {}
        self.update = self.scheduler.update_from_output
        self.scheduler.update_from_output = self._watched

    def _watched(self, *args: Any) -> Any:
        result = self.update(*args)
        for told in itertools.chain.from_iterable(outputs.outputs for outputs in result.values()):
            if is_refusal(told.stop_reason):
                assert told.new_token_ids == []
                assert told.request_id not in self.refused
                self.refused[told.request_id] = json.loads(told.stop_reason.removeprefix(REFUSED))
        return result

    def ask(self, name: str, prompt: int, slo_class: str, max_tokens: int = 8, **extra: Any) -> None:
        """Queue a request of a class."""
        args = {"slo_class": slo_class, **extra}
        self.add(name, prompt, max_tokens, sampling={"extra_args": args})

    def learn(self, slo_class: str = "standard") -> None:
        """Serve enough for the device to be known, with a queue."""
        for i in range(24):
            self.ask(f"learn-{i}", 600, slo_class, 24)
        self.finish()

    def finish(self, most_s: float = 200.0) -> None:
        """Step until nobody is left."""
        assert self.run_until(lambda: not self.scheduler.has_unfinished_requests(), most_s)
        assert self.scheduler.faults.total == 0


@pytest.fixture
def engine(make_config: Any) -> ClassEngine:
    made = ClassEngine(make_config)
    made.learn()
    return made


def test_what_cannot_be_kept_is_refused_at_once_and_everybody_is_answered_once(engine: ClassEngine) -> None:
    names = [f"i{i}" for i in range(40)]
    for name in names:
        engine.ask(name, 500, "interactive")
    engine.step()
    refused = set(engine.refused)
    assert 10 < len(refused) < 40
    engine.finish()
    served = {name for name in names if name in engine.finished_s and name not in engine.refused}
    assert refused == set(engine.refused)
    assert served | refused == set(names)
    assert not any(engine.token_s[name] for name in refused)
    assert not any(name in step.scheduled for step in engine.steps for name in refused)
    assert max(engine.ttft_s(name) for name in served) <= 0.5
    for why in engine.refused.values():
        assert why["slo_class"] == "interactive"
        assert why["predicted_ttft_ms"] > why["ttft_slo_ms"] == 500
        assert why["retry_after_s"] >= 1


@pytest.mark.parametrize("every_s", [1.0, 0.55])
def test_an_idle_device_does_not_refuse_by_what_was_learnt_under_load(
    make_config: Any, every_s: float
) -> None:
    """Nor where the next prompt comes while the last is answered; what can never be kept is refused all the same."""
    tight = {"tight": {"ttft_slo_ms": 9000, "tbt_slo_ms": 20}}
    engine = ClassEngine(make_config, {**CLASSES, "classes": CLASSES["classes"] | tight})
    for i in range(40):
        engine.ask(f"learn-{i}", 600, "tight", 24)
    engine.finish()
    for i in range(12):
        engine.ask(f"{i}", 1200, "interactive", 20)
        engine.run_to(engine.now_s + every_s)
    assert engine.refused == {}
    engine.finish()
    assert max(engine.ttft_s(f"{i}") for i in range(12)) <= 0.5
    engine.ask("long", 5000, "interactive")
    engine.step()
    assert list(engine.refused) == ["long"]


def test_prompts_that_are_the_same_are_read_once_and_counted_once(make_config: Any) -> None:
    """As those of one request with `n` are; and as often as there are, where there is no prefix cache."""
    prompt = random_tokens("same", 800)
    for caching, most in ((True, 0), (False, 7)):
        engine = ClassEngine(make_config, enable_prefix_caching=caching)
        engine.learn()
        for i in range(8):
            engine.add(f"{i}", prompt, 8, sampling={"extra_args": {"slo_class": "interactive"}})
        engine.add("other", 4000, 8, sampling={"extra_args": {"slo_class": "interactive"}})
        engine.finish()
        assert "other" in engine.refused
        assert (len(engine.refused) - 1 > 0) == (most > 0)
        assert max(engine.ttft_s(f"{i}") for i in range(8) if f"{i}" not in engine.refused) <= 0.5


def test_a_step_of_stock_scheduling_ends_gaps_of_classes(engine: ClassEngine) -> None:
    noted: list[Any] = []
    engine.scheduler.telemetry = SimpleNamespace(note=lambda *args: noted.append(args[3]))
    engine.ask("a", 100, "standard", 8)
    engine.run_until_answered("a")
    engine.scheduler._apply_plan = None
    engine.run_until(lambda: not engine.scheduler.has_unfinished_requests())
    assert engine.scheduler.faults.total > 1
    assert tuple(noted[-1]) == (ClassGaps("standard", 1, 0.1),)
    engine.scheduler.telemetry = None


def test_every_refusal_states_a_time_beyond_the_slo(make_config: Any) -> None:
    """Of newcomers and of those that were let in, beside classes that are late themselves, on a device that varies."""
    rng = random.Random(1)
    classes = {
        "default": "heavy",
        "classes": {
            "heavy": {"ttft_slo_ms": 800, "when_late": "relegate", "weight": 8},
            "served": {"ttft_slo_ms": 400},
            "refused": {"ttft_slo_ms": 500, "when_late": "refuse"},
            "patient": {"ttft_slo_ms": 1500, "when_late": "refuse", "weight": 2},
        },
    }
    engine = ClassEngine(make_config, classes)
    engine.learn("patient")
    engine.refused.clear()
    for index in range(150):
        name = rng.choice(list(classes["classes"]))
        engine.ask(f"{index}-{name}", rng.randrange(50, 1500), name, 4)
        engine.device = LinearDevice(token_s=rng.choice((0.0001, 0.0003)), step_s=0.010)
        engine.run_to(engine.now_s + rng.expovariate(10))
    engine.finish()
    assert len(engine.refused) > 10
    for why in engine.refused.values():
        assert why["predicted_ttft_ms"] > why["ttft_slo_ms"]


@pytest.mark.parametrize("slo_ms", [300.0, 290.0, 570.0, 0.1, 12300.0, 3_600_000.0])
def test_rounding_takes_no_stated_time_to_the_slo_or_below(slo_ms: float) -> None:
    for beyond_s in (1e-9, 4e-7, 4e-6, 4e-5, 0.04):
        why = json.loads(
            stop_reason(Refusal("chat", slo_ms / 1e3 + beyond_s, slo_ms / 1e3)).removeprefix(REFUSED)
        )
        assert why["ttft_slo_ms"] == slo_ms
        assert slo_ms < why["predicted_ttft_ms"] < slo_ms + beyond_s * 1e3 + 0.003
        numbers = re.findall(r"[\d.,]+(?= ms)", sentence(why))
        predicted_ms, stated_ms = (float(number.replace(",", "")) for number in numbers)
        assert predicted_ms > stated_ms == slo_ms


def test_one_that_is_refused_while_nothing_else_is_there_is_answered_too(engine: ClassEngine) -> None:
    engine.ask("long", 7000, "interactive")
    assert engine.run_until(lambda: "long" in engine.refused, 1.0)
    assert not engine.scheduler.has_requests() or engine.step().scheduled == {}


def test_a_class_that_serves_late_refuses_nobody_and_one_that_relegates_reads_it_later(
    engine: ClassEngine,
) -> None:
    for i in range(30):
        engine.ask(f"served-{i}", 500, "served")
    engine.finish()
    assert not engine.refused
    firsts = [engine.token_s[f"served-{i}"][0] for i in range(30)]
    assert firsts == sorted(firsts)


def test_interactive_work_goes_before_standard_work_in_flight(engine: ClassEngine) -> None:
    engine.ask("standard", 7000, "standard")
    engine.run(2)
    engine.ask("interactive", 400, "interactive")
    engine.finish()
    assert engine.token_s["interactive"][0] < engine.token_s["standard"][0]
    assert engine.ttft_s("interactive") < 0.5


def test_batch_work_yields_at_once_and_its_decodes_break_no_gap(engine: ClassEngine) -> None:
    for i in range(60):
        engine.ask(f"batch-{i}", 2000, "batch", 200)
    engine.run_until(lambda: False, most_s=5.0)
    since_s = engine.now_s
    for i in range(20):
        engine.ask(f"chat-{i}", 200, "interactive", 40)
        engine.run_until(lambda: False, most_s=0.4)
    assert not engine.refused
    assert max(engine.ttft_s(f"chat-{i}") for i in range(20)) <= 0.5
    assert share_kept(engine.gaps_s(since_s, "chat"), 0.05) >= 0.97
    engine.finish(most_s=600.0)
    assert sum(len(engine.token_s[f"batch-{i}"]) for i in range(60)) == 60 * 200


def chat_beside(make_config: Any, batch: int, num_blocks: int = 6000, **limits: Any) -> ClassEngine:
    """Serve batch work for a minute, and then work with an SLO beside it for 6 s."""
    engine = ClassEngine(make_config, num_blocks=num_blocks, **limits)
    engine.keep_steps = False
    engine.learn()
    for i in range(batch):
        engine.ask(f"batch-{i}", 300, "batch", 1500)
    engine.run_until(lambda: False, most_s=60.0)
    for i in range(20):
        engine.ask(f"chat-{i}", 300, "served", 40)
        engine.run_until(lambda: False, most_s=0.3)
    engine.run_until(lambda: all(engine.token_s[f"chat-{i}"] for i in range(20)), most_s=60.0)
    assert engine.scheduler.faults.total == 0
    return engine


@pytest.mark.parametrize("scarce", [{"max_num_seqs": 4}, {"num_blocks": 130}], ids=["slots", "KV blocks"])
def test_batch_work_that_runs_gives_back_its_room_to_work_with_an_slo(make_config: Any, scarce: Any) -> None:
    kept, tokens = {}, {}
    for batch in (0, 40):
        engine = chat_beside(make_config, batch, **scarce)
        kept[batch] = sum(engine.ttft_s(f"chat-{i}") <= 0.5 for i in range(20))
        tokens[batch] = sum(len(engine.token_s[f"batch-{i}"]) for i in range(batch))
    assert kept[0] >= 19
    assert kept[40] >= 0.95 * kept[0]
    assert tokens[40] > 1500  # it has run all the same


def test_who_gave_way_comes_back_with_what_it_has_answered_and_not_step_by_step(make_config: Any) -> None:
    engine = chat_beside(make_config, 14, max_num_seqs=4)
    times = {name: each.num_preemptions for name, each in engine.scheduler.requests.items()}
    assert sum(times.values()) >= 1
    assert sum(times.values()) <= 4
    engine.finish(most_s=600.0)
    assert all(len(engine.token_s[f"batch-{i}"]) == 1500 for i in range(14))


def test_what_was_begun_at_its_bound_is_answered_to_its_end(make_config: Any) -> None:
    """Work with an SLO that would take all slots for ever: what its bound has let in does not give them back."""
    engine = ClassEngine(make_config, max_num_seqs=4)
    engine.learn()
    engine.ask("batch", 300, "batch", 100)
    start_s, i = engine.now_s, 0
    while engine.now_s < start_s + 60.0 and "batch" not in engine.finished_s:
        while engine.scheduler.get_request_counts()[1] < 8:
            engine.ask(f"flood-{i}", 200, "standard", 100)
            i += 1
        engine.step()
    assert "batch" in engine.finished_s
    assert engine.scheduler.faults.total == 0


def test_batch_work_never_stands_still_for_longer_than_its_bound(make_config: Any) -> None:
    """Work with an SLO that would take all of the device for ever: each bound lets one prompt of batch work in."""
    engine = ClassEngine(make_config)
    engine.learn()
    for i in range(4):
        engine.ask(f"batch-{i}", 1000, "batch")
    start_s, i = engine.now_s, 0
    while engine.now_s < start_s + 70.0:
        while sum(r.num_prompt_tokens for r in engine.scheduler.waiting) < 30_000:
            engine.ask(f"flood-{i}", 2500, "standard", 2)
            i += 1
        engine.step()
    engine.keep_steps = False
    begun = sorted(
        engine.first_scheduled_s[name] for name in engine.first_scheduled_s if name.startswith("batch")
    )
    assert len(begun) >= 3
    assert begun[0] - start_s <= 22.0
    assert all(after - before <= 25.0 for before, after in itertools.pairwise(begun))
    assert engine.scheduler.faults.total == 0


def test_of_two_tenants_the_one_that_does_not_flood_waits_as_if_it_were_alone(make_config: Any) -> None:
    waits = {}
    for flooded in (False, True):
        engine = ClassEngine(make_config)
        engine.learn()
        for i in range(200 if flooded else 0):
            engine.ask(f"flood-{i}", 1000, "standard", 4, slo_tenant="flood")
        for i in range(10):
            engine.run_until(lambda: False, most_s=2.0)
            engine.ask(f"light-{i}", 3000, "standard", 4, slo_tenant="light")
        engine.finish()
        waits[flooded] = max(engine.ttft_s(f"light-{i}") for i in range(10))
        assert len(engine.finished_s) == 24 + 10 + (200 if flooded else 0)
    assert waits[True] <= 1.5 * waits[False]


def test_an_unknown_class_is_the_default_and_is_said_once(make_config: Any, warned: list[str]) -> None:
    engine = ClassEngine(make_config)
    for i in range(3):
        engine.ask(f"r{i}", 20, "nobody")
    bond = engine.scheduler.views.bond
    engine.ask("wishes", 20, "nobody", ttft_slo_ms=500)
    assert bond(engine.scheduler.requests["wishes"]).slo_class.name == "standard"  # as the log has said
    engine.ask("odd", 20, 7)  # type: ignore[arg-type]
    engine.finish()
    assert [line for line in warned if "'nobody'" in line] == [
        "Requests ask for the class 'nobody', which is unknown: they get the default class, 'standard'."
    ]


def first_token(engine: ClassEngine, **asked: Any) -> dict[str, Any]:
    command = {"command": "first_token", **asked}
    return json.loads(engine.scheduler.control.answer(json.dumps(command)))


def test_a_router_is_told_what_the_gate_would_say(engine: ClassEngine) -> None:
    for i in range(8):
        engine.ask(f"standard-{i}", 700, "standard")
        engine.ask(f"batch-{i}", 900, "batch")
    engine.step()
    told = {name: first_token(engine, tokens=600, slo_class=name) for name in CLASSES["classes"]}
    assert {name: said["slo_class"] for name, said in told.items()} == {name: name for name in told}
    waits = [told[name]["wait_s"] for name in ("interactive", "standard", "batch")]
    assert waits == sorted(waits)
    assert waits[0] < waits[1] < waits[2]
    assert told["batch"]["ahead_tokens"] >= 7 * 900 + told["standard"]["ahead_tokens"]
    assert [told[name]["kept"] for name in ("interactive", "standard", "batch")] == [True, True, None]
    told_of: dict[bool, set[bool]] = {True: set(), False: set()}
    for i in range(20):
        engine.ask(f"i{i}", 500, "interactive")
        engine.step()
        kept = first_token(engine, tokens=600, slo_class="interactive")["kept"]
        engine.ask(f"asked-{i}", 600, "interactive")
        engine.step()
        told_of[kept].add(f"asked-{i}" in engine.refused)
    assert told_of[True] == {False}
    assert True in told_of[False]
    assert first_token(engine, tokens=5, slo_class="intractive")["error"].startswith(
        "slo_class 'intractive': unknown; "
    )
    assert first_token(engine, tokens=5, ttft_slo_ms=700)["slo_class"] == "interactive"


def test_aborted_while_it_waits_to_be_judged(engine: ClassEngine) -> None:
    engine.ask("gone", 7000, "interactive")
    engine.scheduler.finish_requests("gone", engine.scheduler.requests["gone"].status.FINISHED_ABORTED)
    engine.ask("here", 100, "interactive")
    engine.finish()
    assert not engine.refused
    assert engine.token_s["here"]


def test_who_occupies_the_engine_is_told_where_the_step_could_read_something(make_config: Any) -> None:
    engine = ClassEngine(make_config, max_num_seqs=4)
    controller, views = engine.scheduler.controller, []
    plan = controller.plan
    controller.plan = lambda view: views.append(view) or plan(view)
    for i in range(12):
        engine.ask(f"r{i}", 300, "batch" if i % 3 == 0 else "standard", 30 + i, slo_tenant=f"t{i % 2}")
    engine.finish()
    assert all(view.occupancy is not None for view in views if view.prefills or view.waiting)
    full = [view for view in views if view.unseen_waiting and not view.free_slots and not view.prefills]
    assert full
    assert all(view.occupancy is None for view in full)
    told = [view.occupancy for view in views if view.occupancy is not None]
    assert max(each.batch_kv_tokens for each in told) >= 300
    assert {name for each in told for name, count in each.tenants.items() if count} == {"t0", "t1"}


def test_one_that_was_relegated_harms_no_step_after_its_end(engine: ClassEngine) -> None:
    """Decodes alone ask no order whose turn it is: what it said last must not be taken for now."""
    engine.ask("beside", 16, "standard", 400)
    for i in range(60):
        engine.ask(f"s{i}", 2000, "standard", 4)
    engine.run_until(lambda: bool(engine.scheduler.controller.relegated), 20.0)
    engine.finish()  # which finds no fault
    assert not engine.scheduler.controller.relegated


def test_the_gate_forgets_who_has_ended_though_nobody_comes_after(engine: ClassEngine) -> None:
    for i in range(20):
        engine.ask(f"s{i}", 2000, "standard", 4)
    engine.step()
    assert len(engine.scheduler.controller.gate.standing) > 10
    names = set(engine.scheduler.requests)
    engine.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
    assert not engine.scheduler.controller.gate.standing


class Heard:
    """A telemetry that keeps what it is told."""

    def __init__(self) -> None:
        self.counted: Counter[tuple[str, str]] = Counter()
        self.gaps: Counter[tuple[str, float | None]] = Counter()
        self.first_tokens: Counter[str] = Counter()

    def count(self, name: str, slo_class: str) -> None:
        self.counted[name, slo_class] += 1

    def note(self, _record: Any, _running: int, _waiting: int, gaps: Any, firsts: Any, *_others: Any) -> None:
        self.gaps.update({(each.slo_class, each.slo_s): each.decodes for each in gaps})
        self.first_tokens.update(each.slo_class for each in firsts)


def test_the_figures_tell_the_classes_apart(engine: ClassEngine) -> None:
    heard = engine.scheduler.telemetry = Heard()
    for i in range(40):
        engine.ask(f"i{i}", 500, "interactive", 5)
    for i in range(60):
        engine.ask(f"s{i}", 700, "standard", 9)
    engine.step()
    waiting = dict(engine.scheduler.queues().waiting)
    engine.finish()
    refused = len(engine.refused)
    late = sum(engine.ttft_s(f"s{i}") > 3.0 for i in range(60))
    assert waiting["standard"] > waiting.get("interactive", 0)
    assert heard.counted["refused_requests", "interactive"] == refused > 0
    assert heard.first_tokens == {"interactive": 40 - refused, "standard": 60}
    assert heard.gaps == {("interactive", 0.05): 4 * (40 - refused), ("standard", 0.1): 8 * 60}
    assert 0 < late <= heard.counted["relegated_requests", "standard"] <= 60
