"""Cached prefixes as vLLM's own lookup counts them, whatever came between two looks, and without a trace."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.caches import cache_of, full, mamba, sliding
from vllm_sarathi.engine.vllm.prefix_cache import CachedPrefixes, cached_tokens, reader_of
from vllm_sarathi.testing.modelled import ModelledEngine

CACHES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "full": lambda: (full(),),
    "sliding": lambda: (full(), sliding(40)),
    "window alone": lambda: (sliding(40),),
    "hybrid": lambda: (full(), mamba()),
}


def make_engine(make_config: Any, kind: str, blocks: int = 60, **engine_args: Any) -> ModelledEngine:
    config = make_config(enable_prefix_caching=True, max_num_batched_tokens=64, max_num_seqs=4, **engine_args)
    if kind == "hybrid":
        kind_of: Any = type(config.cache_config)
        config.cache_config = copied = kind_of.__new__(kind_of)
        vars(copied).update(vars(make_config(enable_prefix_caching=True).cache_config))
        copied.mamba_cache_mode = "align"
    return ModelledEngine(config, blocks, kv_cache_config=cache_of(blocks, *CACHES[kind]()))


def count(scheduler: Any, request: Any) -> int:
    """Return what vLLM's own manager finds, or what the request has already."""
    found = scheduler.kv_cache_manager.get_computed_blocks(request)[1]
    return request.num_computed_tokens or found


def run(engine: ModelledEngine, rng: random.Random, steps: int, look: Callable[[list[Any]], None]) -> int:
    """Serve turns of conversations that share prefixes; `look` is called before each step with who waits."""
    scheduler = engine.scheduler
    histories = [[rng.randrange(500) for _ in range(rng.randrange(20, 90))] for _ in range(5)]
    hits = 0
    for i in range(steps):
        if rng.random() < 0.5:
            history = rng.choice(histories)
            history += [rng.randrange(500) for _ in range(rng.randrange(1, 12))]
            del history[150:]
            engine.add(f"r{i}", list(history), max_tokens=rng.choice((1, 4, 20)))
        if scheduler.requests and rng.random() < 0.05:
            engine.abort(rng.choice(sorted(scheduler.requests)))
        if not scheduler.running and rng.random() < 0.1:
            scheduler.reset_prefix_cache()
        waiting = list(scheduler.waiting)
        look(waiting)
        hits += sum(count(scheduler, request) > 0 for request in waiting)
        engine.step()
    return hits


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("seed", range(4))
def test_a_lookup_counts_as_vllm_counts(make_config: Any, kind: str, seed: int) -> None:
    engine = make_engine(make_config, kind)
    scheduler = engine.scheduler
    pool = scheduler.kv_cache_manager.block_pool

    def look(waiting: list[Any]) -> None:
        before = [(block.ref_cnt, block.block_hash) for block in pool.blocks], pool.get_num_free_blocks()
        found = [cached_tokens(scheduler, request) for request in waiting]
        after = [(block.ref_cnt, block.block_hash) for block in pool.blocks], pool.get_num_free_blocks()
        assert after == before
        assert found == [count(scheduler, request) for request in waiting]

    assert run(engine, random.Random(seed), 300, look) > 50


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_remembered_is_what_a_lookup_finds(make_config: Any, kind: str, seed: int) -> None:
    engine = make_engine(make_config, kind)
    prefixes = CachedPrefixes(engine.scheduler)

    def look(waiting: list[Any]) -> None:
        prefixes.refresh(waiting, most_lookups=10**6)
        assert [prefixes.tokens(r) for r in waiting] == [count(engine.scheduler, r) for r in waiting]

    assert run(engine, random.Random(seed), 300, look) > 50


def test_a_refresh_is_bounded_and_comes_to_all_in_turn(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(make_config, "full", blocks=400)
    engine.add("first", list(range(100)), max_tokens=1)
    waiting = [engine.add(f"w{i}", [*range(100), i], max_tokens=1) for i in range(10)]
    prefixes = CachedPrefixes(engine.scheduler)
    assert [prefixes.tokens(request) for request in waiting] == [0] * 10
    engine.step()
    engine.step()
    waiting = list(engine.scheduler.waiting)
    assert len(waiting) > 5
    pool, lookups = engine.scheduler.kv_cache_manager.block_pool, []
    look = pool.get_cached_block
    monkeypatch.setattr(pool, "get_cached_block", lambda *args: lookups.append(args) or look(*args))
    for calls in range(1, len(waiting) + 1):
        prefixes.refresh(waiting, most_lookups=4)
        assert (
            len(lookups) <= 12 * calls
        )  # one request: 6 blocks that are there, one that is not, and a check
        assert sum(prefixes.tokens(request) == 96 for request in waiting) == calls


@pytest.mark.parametrize(
    ("sampling", "found"), [({}, 96), ({"prompt_logprobs": 1}, 0), ({"skip_reading_prefix_cache": True}, 0)]
)
def test_a_request_that_does_not_read_the_cache_finds_nothing(
    make_config: Any, sampling: dict[str, Any], found: int
) -> None:
    engine = make_engine(make_config, "full", blocks=400)
    prompt = list(range(100))
    engine.add("a", prompt, max_tokens=1)
    engine.drain()
    request = engine.add("b", prompt, sampling=sampling)
    assert cached_tokens(engine.scheduler, request) == found
    prefixes = CachedPrefixes(engine.scheduler)
    assert prefixes.tokens(request) == found
    prefixes.refresh([request])
    assert prefixes.tokens(request) == found


def test_a_preempted_request_finds_its_own_blocks(make_config: Any) -> None:
    engine = make_engine(make_config, "full", blocks=400)
    request = engine.add("a", 100, max_tokens=20)
    prefixes = CachedPrefixes(engine.scheduler)
    assert prefixes.tokens(request) == 0
    for _ in range(6):
        engine.step()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert request in list(engine.scheduler.waiting)
    prefixes.refresh([request])
    assert prefixes.tokens(request) == count(engine.scheduler, request)


def test_who_reads_what_one_that_waits_lacks(make_config: Any) -> None:
    engine = make_engine(make_config, "full")
    scheduler, shared = engine.scheduler, list(range(300))
    engine.add("reader", [*shared, 1, 2], max_tokens=1)
    engine.step()
    reader = scheduler.requests["reader"]
    engine.add("sibling", [*shared, 7, 7], max_tokens=1)
    engine.add("other", list(range(1000, 1300)), max_tokens=1)
    sibling, other = scheduler.requests["sibling"], scheduler.requests["other"]
    found = cached_tokens(scheduler, sibling)
    assert 0 < found <= reader.num_computed_tokens < 300
    assert reader_of(scheduler, sibling, found, [other, reader]) == 1
    assert reader_of(scheduler, other, 0, [reader]) is None
    # One that is behind what is cached already brings nothing.
    assert reader_of(scheduler, sibling, reader.num_computed_tokens + 16, [reader]) is None
    engine.add("short", shared[: reader.num_computed_tokens + 1], max_tokens=1)
    short = scheduler.requests["short"]
    assert reader_of(scheduler, short, found, [reader]) is None  # it lacks no whole block
