"""Who can run, asked of vLLM's own scheduler: without a blocker a request runs, and asking changes nothing."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from vllm_sarathi.engine.vllm.queues import waiting_requests
from vllm_sarathi.engine.vllm.runnable import Admission, Blocker, can_hide, has_runnable_prefill
from vllm_sarathi.testing.modelled import ModelledEngine

ADAPTERS = [LoRARequest(name, number, f"/nowhere/{name}") for number, name in enumerate("abc", 1)]


@pytest.fixture
def make_engine(make_config: Any) -> Any:
    """Return a function that builds an engine with vLLM's own scheduler."""

    def make(blocks: int = 400, **engine_args: Any) -> ModelledEngine:
        return ModelledEngine(make_config(**engine_args), num_blocks=blocks)

    return make


def blocker_of(engine: ModelledEngine, request: Any, **admission: Any) -> Blocker | None:
    return Admission(engine.scheduler, **admission).blocker(request)


def test_a_free_engine_blocks_nobody(make_engine: Any) -> None:
    engine = make_engine()
    assert blocker_of(engine, engine.add("a", 100)) is None


def test_without_a_slot_nobody_runs(make_engine: Any) -> None:
    engine = make_engine(max_num_seqs=2)
    for name in "ab":
        engine.add(name, 4, max_tokens=40)
    engine.step()
    assert blocker_of(engine, engine.add("c", 4)) is Blocker.SLOT
    engine.abort("a")
    assert blocker_of(engine, engine.scheduler.requests["c"]) is None


def test_a_session_that_waits_for_input_keeps_its_slot(make_engine: Any) -> None:
    engine = make_engine(max_num_seqs=2)
    session = engine.add("session", 4, max_tokens=1, resumable=True)
    engine.step()
    assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
    assert blocker_of(engine, session) is Blocker.STREAMING_INPUT
    engine.add("a", 4, max_tokens=40)
    engine.step()
    assert blocker_of(engine, engine.add("b", 4)) is Blocker.SLOT


def test_a_grammar_has_to_be_compiled(make_engine: Any) -> None:
    engine = make_engine()
    params = {"structured_outputs": StructuredOutputsParams(json={"type": "object"})}
    request = engine.add("json", 20, sampling=params)
    assert blocker_of(engine, request) is Blocker.GRAMMAR
    assert not has_runnable_prefill(engine.scheduler)
    request.structured_output_request.grammar = object()
    assert blocker_of(engine, request) is None
    assert has_runnable_prefill(engine.scheduler)
    request.structured_output_request.grammar = ValueError("no such schema")
    assert blocker_of(engine, request) is Blocker.GRAMMAR


def test_behind_a_grammar_that_compiles_somebody_can_run(make_engine: Any) -> None:
    engine = make_engine()
    params = {"structured_outputs": StructuredOutputsParams(json={"type": "object"})}
    engine.add("json", 20, sampling=params)
    engine.add("plain", 20)
    assert has_runnable_prefill(engine.scheduler)


@pytest.mark.parametrize(
    ("state", "fresh", "holding"),
    [(PauseState.PAUSED_NEW, Blocker.PAUSED, None), (PauseState.PAUSED_ALL, Blocker.PAUSED, Blocker.PAUSED)],
)
def test_a_pause_keeps_new_requests_out(
    make_engine: Any, state: PauseState, fresh: Blocker | None, holding: Blocker | None
) -> None:
    engine = make_engine(max_num_batched_tokens=16)
    engine.add("half", 40)
    engine.step()
    request = engine.add("new", 20)
    engine.scheduler.set_pause_state(state)
    assert blocker_of(engine, request) is fresh
    # What is half read goes on unless all is paused.
    assert has_runnable_prefill(engine.scheduler) == (state == PauseState.PAUSED_NEW)
    request.num_computed_tokens = 4  # as one whose KV cache has come from elsewhere
    assert blocker_of(engine, request) is holding


def test_what_a_remote_prefill_has_left_must_have_come(make_engine: Any) -> None:
    engine = make_engine()
    request = engine.add("remote", 40)
    request.kv_transfer_params = {"do_remote_prefill": True}
    assert blocker_of(engine, request) is None
    engine.scheduler.connector = SimpleNamespace()
    assert blocker_of(engine, request) is Blocker.TRANSFER
    request.status, request.num_computed_tokens = RequestStatus.WAITING_FOR_REMOTE_KVS, 32
    assert blocker_of(engine, request) is Blocker.REMOTE_KV
    engine.scheduler.finished_recving_kv_req_ids.add("remote")
    assert blocker_of(engine, request) is None


def test_an_output_from_before_a_preemption_has_to_be_delivered(make_engine: Any) -> None:
    engine = make_engine()
    request = engine.add("a", 40)
    request.num_stale_output_tokens = 1
    assert blocker_of(engine, request) is Blocker.STALE_OUTPUT
    request.drop_stale_output = True
    assert blocker_of(engine, request) is None


def lora_engine(make_engine: Any, max_loras: int) -> Any:
    return make_engine(enable_lora=True, max_loras=max_loras, max_lora_rank=8, max_num_batched_tokens=64)


def test_adapters_of_all_that_run_count(make_engine: Any) -> None:
    engine = lora_engine(make_engine, 1)
    half = engine.add("a", 200, lora_request=ADAPTERS[0])
    engine.step()
    same, other = (
        engine.add("a2", 20, lora_request=ADAPTERS[0]),
        engine.add("b", 20, lora_request=ADAPTERS[1]),
    )
    base = engine.add("base", 20)
    assert half.is_prefill_chunk
    assert [blocker_of(engine, r) for r in (same, other, base)] == [None, Blocker.ADAPTER, None]


def image(offset: int, tokens: int, name: str = "image") -> MultiModalFeatureSpec:
    position = PlaceholderRange(offset=offset, length=tokens)
    return MultiModalFeatureSpec(data=None, modality="image", identifier=name, mm_position=position)


def test_an_image_needs_room_in_the_encoder_cache(make_engine: Any) -> None:
    engine = make_engine(max_num_batched_tokens=1024, max_model_len=1024)
    scheduler = engine.scheduler
    scheduler.max_num_encoder_input_tokens = 600
    scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=600)
    first = engine.add("first", 640, max_tokens=20, mm_features=[image(0, 576, "x")])
    assert blocker_of(engine, first) is None
    scheduler.encoder_cache_manager.allocate(first, 0)
    begins, later = (engine.add(str(at), 640, mm_features=[image(at, 576)]) for at in (0, 20))
    known = engine.add("known", 640, mm_features=[image(0, 576, "x")])
    assert [blocker_of(engine, r) for r in (begins, later, known)] == [Blocker.ENCODER, None, None]


def test_blocks_for_the_whole_prompt_and_for_the_decodes(make_engine: Any) -> None:
    engine = make_engine(blocks=13)  # one is vLLM's own
    engine.add("a", 30, max_tokens=100)
    engine.step()
    request = engine.add("b", 160)
    assert blocker_of(engine, request) is None
    assert blocker_of(engine, request, decodes=1) is Blocker.BLOCKS
    assert can_hide(engine.scheduler, 0, request)
    assert not can_hide(engine.scheduler, 1, request)
    assert blocker_of(engine, engine.add("c", 161)) is Blocker.BLOCKS


def test_the_watermark_stays_free_beside_others(make_engine: Any) -> None:
    engine = make_engine(blocks=20, watermark=0.2)  # 4 blocks, one more is vLLM's own
    fits, alone = engine.add("fits", 14 * 16), engine.add("alone", 15 * 16)
    assert [blocker_of(engine, r) for r in (fits, alone)] == [None, None]
    engine.abort("fits")
    engine.abort("alone")
    engine.add("a", 4, max_tokens=100)
    engine.step()
    assert blocker_of(engine, engine.add("b", 14 * 16)) is None
    assert blocker_of(engine, engine.add("c", 14 * 16 + 1)) is Blocker.BLOCKS


def test_blocks_that_a_running_request_shares_are_not_needed_again(make_engine: Any) -> None:
    engine = make_engine(blocks=13, enable_prefix_caching=True)
    shared = [i % 500 for i in range(128)]
    engine.add("a", shared, max_tokens=100)
    engine.step()
    assert blocker_of(engine, engine.add("b", [*shared, *range(30)])) is None
    assert blocker_of(engine, engine.add("c", [*range(30), *shared])) is Blocker.BLOCKS
    engine.abort("a")
    assert blocker_of(engine, engine.scheduler.requests["b"]) is None


def state_of(scheduler: Any) -> list[Any]:
    """Return what asking must not change."""
    manager = scheduler.kv_cache_manager
    singles = manager.coordinator.single_type_managers
    return [
        [r.request_id for r in waiting_requests(scheduler)],
        [(r.request_id, r.status, r.num_computed_tokens) for r in scheduler.running],
        manager.block_pool.get_num_free_blocks(),
        [block.ref_cnt for block in manager.block_pool.blocks],
        [{name: len(blocks) for name, blocks in single.req_to_blocks.items()} for single in singles],
        vars(scheduler.encoder_cache_manager).copy(),
    ]


@pytest.mark.parametrize("seed", range(12))
def test_without_a_blocker_the_head_of_the_queue_runs(make_engine: Any, seed: int) -> None:
    """Requests of all kinds come, end and are aborted; before each step the head of the queue is asked about."""
    rng = random.Random(seed)
    engine = make_engine(
        blocks=rng.choice((24, 40, 400)),
        max_num_seqs=rng.choice((2, 4, 16)),
        enable_lora=True,
        max_loras=rng.choice((1, 2)),
        max_lora_rank=8,
        enable_prefix_caching=rng.random() < 0.5,
        watermark=rng.choice((0.0, 0.1)),
    )
    scheduler = engine.scheduler
    asked, seen = 0, set()
    for i in range(300):
        if rng.random() < 0.4:
            common = [7] * rng.choice((0, 32, 64))
            prompt = [*common, *(rng.randrange(500) for _ in range(rng.choice((3, 20, 90))))]
            adapter = rng.choice((None, None, *ADAPTERS))
            engine.add(f"r{i}", prompt, max_tokens=rng.choice((1, 5, 40)), lora_request=adapter)
        if engine.scheduler.requests and rng.random() < 0.05:
            engine.abort(rng.choice(sorted(scheduler.requests)))
        if rng.random() < 0.1:
            scheduler.set_pause_state(rng.choice(list(PauseState)))
        first = next(waiting_requests(scheduler), None)
        if first is not None:
            before = state_of(scheduler)
            blocker = Admission(scheduler, len(scheduler.running)).blocker(first)
            assert state_of(scheduler) == before
            running = {r.request_id for r in scheduler.running}
            left = scheduler.max_num_scheduled_tokens - sum(
                r.num_tokens - r.num_computed_tokens for r in scheduler.running
            )
            step = engine.step()
            if left > 0 and not step.preempted:
                asked += 1
                seen.add(blocker)
                ran = first.request_id in step.scheduled and first.request_id not in running
                if blocker is not Blocker.BLOCKS:  # those are counted on the safe side
                    assert ran == (blocker is None), blocker
        else:
            engine.step()
    assert asked > 60
    assert {None, Blocker.PAUSED} <= seen
