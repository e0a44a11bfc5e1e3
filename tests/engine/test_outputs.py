"""Refusals in an API server's own books: vLLM's real output processor, without a model."""

from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import IterationStats

from vllm_sarathi.core.gate import Refusal
from vllm_sarathi.engine.admission import stop_reason
from vllm_sarathi.engine.http import refusal_error
from vllm_sarathi.engine.vllm.outputs import divert_outputs

WHY = stop_reason(Refusal("chat", 3.2, 0.5))


@pytest.fixture(autouse=True)
def _diverting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutputProcessor, "process_outputs", OutputProcessor.process_outputs)
    for _ in range(2):
        divert_outputs(refusal_error)


def request(name: str, n: int = 1) -> EngineCoreRequest:
    params = SamplingParams(n=n, max_tokens=4, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
    fields: dict[str, Any] = dict.fromkeys(
        ("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank")
    )
    return EngineCoreRequest(
        request_id=name,
        external_req_id=name,
        prompt_token_ids=[1, 2],
        sampling_params=params,
        arrival_time=0.0,
        **fields,
    )


def refused(name: str) -> EngineCoreOutput:
    return EngineCoreOutput(name, [], finish_reason=FinishReason.ABORT, stop_reason=WHY)


class Books:
    """An output processor with requests in it."""

    def __init__(self) -> None:
        self.processor = OutputProcessor(None, log_stats=True)
        self.stats = IterationStats()

    def add(self, name: str, n: int = 1) -> RequestOutputCollector:
        asked = request(name, n)
        queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, name)
        parent = ParentRequest(asked) if n > 1 else None
        for index in range(n):
            if parent is not None:
                asked = request(*[parent.get_child_info(index)[0]])
            self.processor.add_request(asked, None, parent, index, queue)
        return queue

    def process(self, *outputs: EngineCoreOutput) -> Any:
        return self.processor.process_outputs(list(outputs), 100.0, self.stats)


def test_vllm_counts_nothing_of_a_refused_request() -> None:
    """Neither an answer, nor a first token, nor times that are none: of a request that was never scheduled."""
    books = Books()
    queue, other = books.add("late"), books.add("served")
    done = EngineCoreOutput("served", [5], finish_reason=FinishReason.LENGTH)
    books.process(refused("late"), done)
    (finished,) = books.stats.finished_requests
    assert finished.finish_reason == FinishReason.LENGTH
    assert len(books.stats.time_to_first_tokens_iter) == 1
    with pytest.raises(Exception, match="3200 ms, and 500 ms is the SLO") as error:
        queue.get_nowait()
    assert error.value.status_code == 429  # type: ignore[attr-defined]
    answered = other.get_nowait()
    assert answered is not None
    assert answered.finished


def test_one_refusal_among_several_answers_to_a_prompt_is_told_at_once() -> None:
    """And who is told ends the others, as vLLM's generate does with any error."""
    books = Books()
    queue = books.add("parent", n=3)
    books.process(refused("1_parent"))
    with pytest.raises(Exception, match="cannot be met now"):
        queue.get_nowait()
    ended = books.processor.abort_requests(["parent"], internal=True)
    assert set(ended) == {"0_parent", "1_parent", "2_parent"}
    assert not books.processor.has_unfinished_requests()


def test_a_refusal_of_whom_nobody_waits_for_is_nothing() -> None:
    books = Books()
    assert books.process(refused("gone")).request_outputs == []


def test_what_ends_by_a_stop_token_is_an_answer() -> None:
    books = Books()
    queue = books.add("a")
    books.process(EngineCoreOutput("a", [5], finish_reason=FinishReason.STOP, stop_reason=5))
    answered = queue.get_nowait()
    assert answered is not None
    assert answered.outputs[0].stop_reason == 5
