"""Where prompts may be cut, beside vLLM's own rules."""

import copy
import random
from typing import Any

import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from tests.engine.caches import cache_of, full, mamba
from vllm_sarathi.core.chunk_rules import ANYWHERE
from vllm_sarathi.engine.vllm.chunking import Chunking
from vllm_sarathi.testing.modelled import NGRAM, ModelledEngine

BLOCK = 48
"""Of a state-space layer; models have 528 and the like."""


def item(offset: int, length: int) -> MultiModalFeatureSpec:
    position = PlaceholderRange(offset=offset, length=length)
    return MultiModalFeatureSpec(data=None, modality="image", identifier=f"i{offset}", mm_position=position)


def test_text_can_be_cut_anywhere(make_config: Any) -> None:
    engine = ModelledEngine(make_config())
    assert Chunking(engine.scheduler).rules(engine.add("a", 100), 0) is ANYWHERE


@pytest.mark.parametrize("by", ["flag", "attention"])
def test_items_that_must_not_be_cut_are_whole(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    config = make_config()
    if by == "flag":
        config.scheduler_config.disable_chunked_mm_input = True
    else:  # bidirectional attention inside an image
        monkeypatch.setitem(vars(config.model_config), "is_mm_prefix_lm", True)  # vLLM works it out once
    engine = ModelledEngine(config)
    chunking = Chunking(engine.scheduler)
    request = engine.add("a", 200, mm_features=[item(20, 30), item(50, 40), item(120, 10), item(125, 10)])
    assert chunking.rules(request, 0).whole == ((20, 50), (50, 90), (120, 135))
    assert chunking.rules(request, 60).whole == ((60, 90), (120, 135))
    assert chunking.rules(request, 135).whole == ()
    assert chunking.rules(engine.add("text", 20), 0) is ANYWHERE


def test_items_can_be_cut_otherwise(make_config: Any) -> None:
    engine = ModelledEngine(make_config())
    request = engine.add("a", 200, mm_features=[item(20, 30)])
    assert Chunking(engine.scheduler).rules(request, 0) is ANYWHERE


def test_what_no_step_holds_is_not_whole(make_config: Any, warned: list[str]) -> None:
    config = make_config(long_prefill_token_threshold=48)
    config.scheduler_config.disable_chunked_mm_input = True
    engine = ModelledEngine(config)
    chunking = Chunking(engine.scheduler)
    request = engine.add("a", 200, mm_features=[item(20, 48), item(80, 49), item(150, 20)])
    assert chunking.rules(request, 0).whole == ((20, 68), (80, 129), (150, 170))
    assert not warned
    assert chunking.rules(request, 80) is ANYWHERE
    assert chunking.rules(request, 81).whole == ((81, 129), (150, 170)), "what is left of it fits"
    assert chunking.rules(request, 80) is ANYWHERE
    assert [message.split(" is cut")[0] for message in warned] == ["An image (or other item) of 49 tokens"]


def test_a_last_token_begins_with_places_for_its_drafts(make_config: Any) -> None:
    for drafts, config in ((0, make_config()), (3, make_config(speculative_config=NGRAM))):
        engine = ModelledEngine(config)
        chunking, request = Chunking(engine.scheduler), engine.add("a", 33)
        assert chunking.beginning(request, 31) == (2, ANYWHERE)
        for start in (32, 33):  # all of it is there where it has come from elsewhere
            assert chunking.beginning(request, start) == (1 + drafts, ANYWHERE)


def hybrid_engine(make_config: Any, step_tokens: int = 256, **engine_args: Any) -> ModelledEngine:
    config = make_config(
        enable_prefix_caching=True, max_num_batched_tokens=step_tokens, block_size=BLOCK, **engine_args
    )
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.mamba_cache_mode = "align"
    return ModelledEngine(config, 200, kv_cache_config=cache_of(200, full(BLOCK), mamba(BLOCK)))


@pytest.mark.parametrize("seed", range(3))
def test_a_state_space_model_is_cut_at_blocks_as_vllm_does(make_config: Any, seed: int) -> None:
    engine, rng = hybrid_engine(make_config), random.Random(seed)
    scheduler = engine.scheduler
    chunking = Chunking(scheduler)
    for i in range(300):
        prompt = rng.randrange(1, 250)
        request = engine.add(f"r{i}", prompt)
        request.num_computed_tokens = start = rng.randrange(0, prompt) // BLOCK * BLOCK
        rules, tokens = chunking.rules(request, start), rng.randrange(1, 257)
        chunk = scheduler._mamba_block_aligned_split(request, min(tokens, prompt - start))
        fit = rules.fit(start, prompt, tokens)
        # vLLM may end a chunk earlier, where it keeps a state for others.
        assert chunk <= fit
        assert (chunk == 0) == (fit == 0)
        assert scheduler._mamba_block_aligned_split(request, rules.least(start, prompt)) > 0


def test_a_budget_below_the_least_chunk_reads_nothing(make_config: Any) -> None:
    engine = hybrid_engine(make_config)
    for name in "ab":
        engine.add(name, 10, max_tokens=60)
    engine.step()
    long = engine.add("long", 230)
    rules = Chunking(engine.scheduler).rules(long, 0)
    least = rules.least(0, 230)
    assert least == BLOCK
    for budget, scheduled in (
        (2 + least - 1, {"a": 1, "b": 1}),
        (2 + least, {"a": 1, "b": 1, "long": least}),
    ):
        engine.scheduler.max_num_scheduled_tokens = budget
        assert engine.step().scheduled == scheduled


@pytest.mark.parametrize("limits", [{"step_tokens": BLOCK - 1}, {"long_prefill_token_threshold": BLOCK - 1}])
def test_a_block_that_no_step_holds_is_cut_as_by_vllm(make_config: Any, limits: dict[str, int]) -> None:
    engine = hybrid_engine(make_config, **limits)
    assert Chunking(engine.scheduler).rules(engine.add("a", 230), 0) is ANYWHERE
