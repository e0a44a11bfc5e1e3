"""An image whose attention looks both ways is read in one step, whatever the budget is."""

from typing import Any

import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

from tests.engine.cases.conftest import OURS, SLO_S, MakeEngine, warm_up
from tests.engine.virtual import LinearDevice, VirtualEngine, Work, share_kept
from vllm_sarathi import SarathiConfig
from vllm_sarathi.engine.vllm.images import encoder_inputs

IMAGE_TOKENS = 576
PROMPT_TOKENS = 640
WORST_TTFT = 5.0
"""Over stock's: where the image alone takes longer than the SLO, waiting only breaks both."""

POLICIES = {
    "auto": SarathiConfig(calibration_dir="none"),
    **OURS,
    "short-slo": SarathiConfig(tbt_slo_ms=60.0, calibration_dir="none"),
    "fixed-512": SarathiConfig(token_budget=512, calibration_dir="none"),
    "fixed-40": SarathiConfig(token_budget=40, calibration_dir="none"),
    "chunked-only-100": SarathiConfig(scheduler="chunked-only", token_budget=100, calibration_dir="none"),
    "orca-100": SarathiConfig(scheduler="orca", token_budget=100, calibration_dir="none"),
    "prefill-first-100": SarathiConfig(scheduler="prefill-first", token_budget=100, calibration_dir="none"),
    "hybrid-only": SarathiConfig(scheduler="hybrid-only", calibration_dir="none"),
}


def whole_images_only(config: object) -> None:
    config.scheduler_config.disable_chunked_mm_input = True  # type: ignore[attr-defined]


def image(name: str, offset: int) -> MultiModalFeatureSpec:
    place = PlaceholderRange(offset=offset, length=IMAGE_TOKENS)
    return MultiModalFeatureSpec(data=None, modality="image", identifier=name, mm_position=place)


def give_encoder(engine: VirtualEngine, tokens_per_step: int = 2048, cache_tokens: int = 4096) -> None:
    """Let the scheduler of a model without images take some."""
    engine.scheduler.max_num_encoder_input_tokens = tokens_per_step
    engine.scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=cache_tokens)


def chunk_ends(engine: VirtualEngine, name: str) -> list[int]:
    """Return the positions of a prompt at which the chunks that were read of it end."""
    position, ends = 0, []
    for step in engine.steps:
        if name in step.scheduled and position < PROMPT_TOKENS:
            position += step.scheduled[name]
            ends.append(position)
    return ends


def read_an_image(
    make_engine: MakeEngine, sarathi: SarathiConfig | None, offset: int, **limits: int
) -> VirtualEngine:
    engine = make_engine(sarathi, change=whole_images_only, **limits)
    give_encoder(engine)
    for number in range(4):
        engine.add(f"chat{number}", 40, max_tokens=2000)
    engine.run(60)
    engine.add("image", PROMPT_TOKENS, max_tokens=20, mm_features=[image("cat", offset)])
    engine.run_until_answered("image", most_s=60)
    inside = [end for end in chunk_ends(engine, "image") if offset < end < offset + IMAGE_TOKENS]
    assert not inside or sarathi is None, f"the image at {offset} was cut at {inside}"
    return engine


@pytest.mark.parametrize("offset", [0, 20, 64])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_image_is_not_cut(make_engine: MakeEngine, policy: str, offset: int) -> None:
    stock = read_an_image(make_engine, None, offset)
    ours = read_an_image(make_engine, POLICIES[policy], offset)
    assert ours.ttft_s("image") <= WORST_TTFT * stock.ttft_s("image")


@pytest.mark.parametrize("policy", ["auto", *OURS, "short-slo"])
def test_an_image_as_large_as_a_step_does_not_wait_for_the_decodes_to_end(
    make_engine: MakeEngine, policy: str
) -> None:
    """vLLM raises its limit to the largest image and no further; stock cuts it beside decodes."""
    limits = {"max_num_batched_tokens": IMAGE_TOKENS}
    stock = read_an_image(make_engine, None, 20, **limits)
    ours = read_an_image(make_engine, POLICIES[policy], 20, **limits)
    assert ours.ttft_s("image") <= WORST_TTFT * stock.ttft_s("image")
    assert len([gap for gap in ours.gaps_s(0.0, "chat0") if gap > 0.25]) == 1, "of the step that holds it"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "limits",
    [
        {"long_prefill_token_threshold": 512},
        {"max_num_batched_tokens": IMAGE_TOKENS - 64},
        {"max_num_scheduled_tokens": IMAGE_TOKENS - 64},
    ],
    ids=lambda limits: next(iter(limits)),
)
def test_an_image_that_no_step_holds_is_cut_as_by_stock(
    make_engine: MakeEngine, warned: list[str], policy: str, limits: dict[str, int]
) -> None:
    """Else it would wait for ever, and all behind it."""

    def ttft_s(sarathi: SarathiConfig | None) -> float:
        engine = make_engine(sarathi, change=whole_images_only, **limits)
        give_encoder(engine)
        for number in range(2):
            engine.add(f"chat{number}", 40, max_tokens=1500)
        engine.run(40)
        engine.add("image", PROMPT_TOKENS, max_tokens=5, mm_features=[image("cat", 0)])
        engine.run(2)
        engine.add("text", 100, max_tokens=5)
        engine.run_until_answered("image", "text", most_s=60)
        return max(engine.ttft_s("image"), engine.ttft_s("text"))

    stock_s = ttft_s(None)
    assert not warned
    assert ttft_s(POLICIES[policy]) <= WORST_TTFT * stock_s
    assert len([message for message in warned if "is cut" in message]) == 1


@pytest.mark.parametrize("order", OURS)
def test_a_full_encoder_holds_up_nobody_else(make_engine: MakeEngine, order: str) -> None:
    """An image that finds no room in the encoder's cache: the half-read prompt goes on."""

    def ttft_s(sarathi: SarathiConfig | None) -> float:
        engine = make_engine(sarathi)
        give_encoder(engine, cache_tokens=IMAGE_TOKENS)
        engine.add("chat", 40, max_tokens=2000)
        engine.run(60)
        # Half of its image is read, and the whole of it is in the encoder's cache.
        engine.add("long", 6000, max_tokens=20, mm_features=[image("a", 0)])
        engine.run_until(lambda: engine.scheduler.requests["long"].num_computed_tokens >= 64)
        engine.add("image", PROMPT_TOKENS, max_tokens=20, mm_features=[image("b", 0)])
        engine.run_until_answered("long", "image", most_s=200)
        return max(engine.ttft_s("long"), engine.ttft_s("image"))

    assert ttft_s(OURS[order]) <= 1.5 * ttft_s(None)


def charge_encoder(engine: VirtualEngine, embedding_s: float, device: LinearDevice) -> None:
    """Let each embedding that the encoder computes take its time."""
    work_of, embeddings = engine._work, 0

    def work(step: Any) -> Work:
        nonlocal embeddings
        inputs = step.output.scheduled_encoder_inputs.items()
        requests = engine.scheduler.requests
        embeddings = sum(requests[name].get_num_encoder_embeds(i) for name, items in inputs for i in items)
        return work_of(step)

    engine._work = work  # type: ignore[method-assign]
    engine.device = lambda work: device(work) + embedding_s * embeddings


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("order", OURS)
def test_an_encoder_that_takes_longer_than_the_slo_costs_few_gaps(
    make_engine: MakeEngine, order: str, whole: bool
) -> None:
    """An image every two seconds: each in a step of its own would make 1.4% of the gaps late."""
    engine = make_engine(OURS[order], change=whole_images_only if whole else None)
    give_encoder(engine)
    charge_encoder(engine, 0.2 / IMAGE_TOKENS, LinearDevice(token_s=0.0001))
    for number in range(4):
        engine.add(f"chat{number}", 40, max_tokens=6000)
    warm_up(engine)
    start_s, names = engine.now_s, [f"image{number}" for number in range(50)]
    for name in names:
        engine.add(name, PROMPT_TOKENS, max_tokens=20, mm_features=[image(name, 30)])
        engine.run_to(engine.now_s + 2.0)
    engine.run_until_answered(*names)
    kept = share_kept(engine.gaps_s(start_s, "chat"), SLO_S)
    assert kept >= 0.99, kept
    assert max(map(engine.ttft_s, names)) <= 6.0


def test_what_is_encoded_is_not_counted_again(make_engine: MakeEngine) -> None:
    engine = make_engine(OURS["fcfs"])
    give_encoder(engine)
    engine.add("image", PROMPT_TOKENS, mm_features=[image("a", 0), image("b", IMAGE_TOKENS)])
    request = engine.scheduler.requests["image"]
    assert encoder_inputs(engine.scheduler, request, 0) == ((0, IMAGE_TOKENS), (IMAGE_TOKENS, IMAGE_TOKENS))
    engine.scheduler.encoder_cache_manager.allocate(request, 0)
    assert encoder_inputs(engine.scheduler, request, 100) == ((IMAGE_TOKENS, IMAGE_TOKENS),)
