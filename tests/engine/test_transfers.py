"""KV that another engine has computed: what vLLM's scheduler makes of our connector without a device."""

from typing import Any

import pytest

from vllm_sarathi import SarathiConfig
from vllm_sarathi.engine.vllm.transfers import arrived, remote_prefill, transfers
from vllm_sarathi.testing.modelled import NGRAM, ModelledEngine, Step


class Receiver(ModelledEngine):
    """An engine whose requests may have been read elsewhere; `here` is whose KV comes by the end of the next step."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.link = self.scheduler.connector = transfers()
        self.here: set[str] = set()

    def _execute(self, step: Step) -> Any:
        result = super()._execute(step)
        if self.here:
            self.link.take(self.here)
            result.kv_connector_output = arrived(self.here)
            self.here = set()
        return result


@pytest.mark.parametrize("sarathi", [None, SarathiConfig(tbt_slo_ms=50.0), SarathiConfig(token_budget=64)])
@pytest.mark.parametrize("beside", [False, True])
def test_a_prompt_that_was_read_elsewhere_takes_one_token_here(
    make_config: Any, sarathi: SarathiConfig | None, beside: bool
) -> None:
    engine = Receiver(make_config(sarathi))
    if beside:
        engine.add("local", 20, max_tokens=30)
        for _ in range(3):
            engine.step()
    engine.add("remote", 40, max_tokens=4, sampling={"extra_args": remote_prefill()})
    for _ in range(3):
        assert "remote" not in engine.step().scheduled
    assert list(engine.link.loading) == ["remote"], "blocks are there, and nothing but its KV is waited for"
    engine.here = {"remote"}
    engine.step()
    scheduled = [engine.step().scheduled for _ in range(8)]
    mine = [step["remote"] for step in scheduled if "remote" in step]
    assert mine == [1, 1, 1, 1], "its last token of prompt, and three of its answer"
    assert "remote" in engine.finished


def test_a_prompt_that_is_loaded_within_a_step_begins_with_drafts_beside_it(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only vLLM learns that one token is left, and it begins one with places for its drafts or not at all."""
    engine = Receiver(make_config(SarathiConfig(tbt_slo_ms=50.0), speculative_config=NGRAM))
    monkeypatch.setattr(
        engine.link,
        "get_num_new_matched_tokens",
        lambda request, found: (request.num_tokens - 1 - found, False),
    )
    engine.add("local", 20, max_tokens=60)
    for _ in range(3):
        engine.step()
    engine.add("remote", 40, max_tokens=4, sampling={"extra_args": remote_prefill()})
    assert "remote" in engine.step().scheduled
