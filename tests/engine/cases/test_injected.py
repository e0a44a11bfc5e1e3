"""An error of ours, wherever it comes up, costs a step of stock scheduling and no request."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.cases.conftest import OURS, MakeEngine
from tests.engine.cases.test_images import give_encoder, image, whole_images_only
from tests.engine.virtual import VirtualEngine
from vllm_sarathi.core.limits.fit import Fit
from vllm_sarathi.core.order.index import WaitingIndex
from vllm_sarathi.core.types import Reason, StepRecord
from vllm_sarathi.engine import scheduler as our_scheduler
from vllm_sarathi.engine.vllm.chunking import Chunking
from vllm_sarathi.engine.vllm.limits import sees_all_waiting
from vllm_sarathi.engine.vllm.runnable import Admission

LORA = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}


def chats(engine: VirtualEngine) -> None:
    engine.add("x", 400, max_tokens=20)
    engine.run(3)
    engine.add("y", 3000, max_tokens=20)
    engine.add("z", 100, max_tokens=20)


def grammar(engine: VirtualEngine) -> None:
    ready = {"structured_outputs": StructuredOutputsParams(json={"type": "object"})}
    engine.add("json", 40, max_tokens=20, sampling=ready)
    engine.step()
    chats(engine)


def adapters(engine: VirtualEngine) -> None:
    for number in (1, 2):
        adapter = LoRARequest(f"adapter{number}", number, "/nowhere")
        engine.add(f"lora{number}", 40, max_tokens=20, lora_request=adapter)
    chats(engine)


def images(engine: VirtualEngine) -> None:
    give_encoder(engine)
    engine.add("image", 640, max_tokens=20, mm_features=[image("cat", 20)])
    chats(engine)


PLACES: dict[str, tuple[Any, str, Callable[[VirtualEngine], None]]] = {
    "sizing": (Fit, "__call__", chats),
    "who can run": (Admission, "blocker", chats),
    "who can run, of a grammar": (Admission, "blocker", grammar),
    "where an image is cut": (Chunking, "rules", images),
    "which adapters run": (our_scheduler, "adapters_of", adapters),
    "a queue that grows": (WaitingIndex, "add", chats),
    "a queue that shrinks": (WaitingIndex, "discard", chats),
    "a queue that is looked at": (WaitingIndex, "candidates", chats),
}


@pytest.mark.parametrize("order", OURS)
@pytest.mark.parametrize("place", PLACES)
def test_an_error_of_ours_ends_no_engine_and_loses_no_request(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, place: str, order: str
) -> None:
    owner, name, life = PLACES[place]
    engine_args = LORA if life is adapters else {}
    engine = make_engine(OURS[order], change=whole_images_only if life is images else None, **engine_args)
    called = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        raise RuntimeError("injected")

    monkeypatch.setattr(owner, name, fail)
    life(engine)
    engine.run_until(lambda: not engine.scheduler.requests or life is grammar, most_s=120)
    engine.run(40)
    left = set(engine.scheduler.requests) - {"json"}  # its grammar is compiled in a thread, on a real clock
    assert not left
    if called:  # arrival order has no index to fail
        assert engine.scheduler.faults.total > 0
    elif owner is our_scheduler:
        assert not sees_all_waiting(engine.scheduler)  # such a vLLM asks for nobody's adapter
    else:
        assert owner is WaitingIndex
        assert order == "fcfs"


def test_the_gaps_of_a_step_that_stock_scheduling_served_count(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(OURS["fcfs"])
    records: list[StepRecord] = []
    engine.scheduler.telemetry = SimpleNamespace(note=lambda record, *_: records.append(record))
    engine.add("x", 40, max_tokens=40)
    engine.run(3)

    def fail(*args: Any) -> Any:
        raise RuntimeError("injected")

    monkeypatch.setattr(Fit, "__call__", fail)
    engine.add("y", 3000, max_tokens=20)
    engine.run_until(lambda: not engine.scheduler.requests)
    served_by_stock = [record for record in records if record.reason is Reason.FAULT]
    assert any(record.shape.prefill_work for record in served_by_stock)
    assert [_work_of(record.shape) for record in records] == [_work_of(step.work) for step in engine.steps]


def _work_of(step: Any) -> tuple[int, int]:
    return step.tokens, step.decodes
