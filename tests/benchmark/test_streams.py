"""The streaming client against a server whose answers are known."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from tests.benchmark.fake_vllm import FAKE
from vllm_sarathi.benchmark.live.server import Server, serve
from vllm_sarathi.benchmark.live.streams import Delivery, StreamRecord, StreamRequest, play


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("fake") / "log"
    with serve("m", log_path=log, env={"FAKE_REFUSE": "forbidden"}, command=FAKE) as running:
        yield running


def play_now(server: Server, *requests: StreamRequest) -> list[StreamRecord]:
    return asyncio.run(play(server.base_url, "m", requests)).records


def test_tokens_are_counted_by_id_and_not_by_delivery(server: Server) -> None:
    [record] = play_now(server, StreamRequest("a", "two words", max_tokens=5))
    assert [delivery.tokens for delivery in record.deliveries] == [2, 1, 1, 1]
    assert record.output_tokens == 5
    assert record.prompt_tokens == 2
    assert record.text == "w0 w1 w2 w3 w4 "
    assert record.error is None


def test_times_are_ordered_and_start_when_the_request_was_to_be_sent(server: Server) -> None:
    seen: list[Delivery] = []
    late = StreamRequest("late", "hello", max_tokens=4, send_at_s=0.3)
    [record] = asyncio.run(
        play(server.base_url, "m", [late], on_delivery=lambda _, delivery: seen.append(delivery))
    ).records
    times = [delivery.at_s for delivery in record.deliveries]
    assert record.sent_s >= 0.3
    assert times == sorted(times)
    assert record.ttft_s == times[0] - record.sent_s
    assert len(record.gaps_s) == len(times) - 1
    assert sum(record.gaps_s) == pytest.approx(times[-1] - times[0])
    assert tuple(seen) == record.deliveries


def test_a_request_is_sent_on_its_cue(server: Server) -> None:
    first = StreamRequest("first", "hello", max_tokens=30)
    second = StreamRequest("second", "hello", max_tokens=3, after=("first", 10))
    refused = StreamRequest("refused", "forbidden", max_tokens=3)
    last = StreamRequest("last", "hello", max_tokens=3, after=("refused", 2))
    told, cued, _, after_refused = play_now(server, first, second, refused, last)
    tenth = [delivery.at_s for delivery in told.deliveries if delivery.tokens][8]  # the first one holds two
    assert cued.sent_s >= tenth
    assert after_refused.output_tokens == 3  # nobody waits for a stream that has ended


def test_a_refused_request_is_recorded_and_the_others_run(server: Server) -> None:
    requests = [StreamRequest("bad", "forbidden", 3), StreamRequest("good", "allowed", 3)]
    bad, good = play_now(server, *requests)
    assert bad.error is not None
    assert "HTTP 400" in bad.error
    assert "refused by the fake" in bad.error
    assert bad.deliveries == ()
    assert bad.ttft_s is None
    assert (good.name, good.error, good.output_tokens) == ("good", None, 3)


def test_nobody_listening_is_an_error_in_the_record() -> None:
    [record] = asyncio.run(play("http://127.0.0.1:9", "m", [StreamRequest("a", "hello", 3)])).records
    assert record.error


def test_a_client_that_is_held_up_says_so(server: Server) -> None:
    def dawdle(_request: StreamRequest, delivery: Delivery) -> None:
        time.sleep(0.4)

    played = asyncio.run(
        play(server.base_url, "m", [StreamRequest("a", "hello", max_tokens=1)], on_delivery=dawdle)
    )
    assert played.client_stall_s >= 0.3
