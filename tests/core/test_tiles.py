"""The tile is found from step times, and then the budget uses it."""

import math
import random
from typing import Any

import pytest

from tests.core.devices import Device, Loop, roofline
from vllm_sarathi.core.config import SarathiConfig
from vllm_sarathi.core.controller import StepController
from vllm_sarathi.core.steptime.model import StepTimeModel
from vllm_sarathi.core.types import StepShape

SLO_MS = 250.0


def in_tiles(tile: int, speed: float = 1.0) -> Device:
    """Return a device whose linear layers take whole tiles of tokens."""

    def seconds(shape: StepShape) -> float:
        tokens = math.ceil(shape.tokens / tile) * tile
        padded = StepShape(
            tokens, shape.decodes, shape.decode_context_tokens, shape.prefill_work, shape.sequences
        )
        return roofline(speed)(padded)

    return seconds


def loop_on(device: Device, **fields: Any) -> Loop:
    return Loop(StepController(SarathiConfig(tbt_slo_ms=SLO_MS)), device, prompt_tokens=7001, **fields)


@pytest.mark.parametrize("tile", [32, 64, 128, 256])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_tile_is_found_and_filled(tile: int, noise: float) -> None:
    loop = loop_on(in_tiles(tile), noise=noise, rng=random.Random(tile))
    loop.run(400)
    # Where no step between two stairs was ever worth while, nothing tells the tile from its half.
    assert loop.controller.model.tile_tokens in (tile, tile // 2)
    filled = [b for b in loop.budgets[200:] if b % tile in (0, tile - 1)]
    assert len(filled) > 0.75 * 200  # but for the last chunks of prompts
    late = sum(t > SLO_MS / 1e3 for t in loop.times_s[200:])
    assert late <= 0.02 * 200


def test_more_is_read_in_a_second_than_by_a_line_through_the_stairs(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_per_s = {}
    for name in ("stairs", "line"):
        if name == "line":
            monkeypatch.setattr("vllm_sarathi.core.steptime.tiles.CANDIDATES", (1,))
        loop = loop_on(in_tiles(256))
        loop.run(600)
        if name == "stairs":  # a line that breaks the SLO now and then reads the more for it
            assert sum(t > SLO_MS / 1e3 for t in loop.times_s) <= 0.01 * 600
        tokens_per_s[name] = sum(loop.budgets) / loop.now_s
    assert tokens_per_s["stairs"] > 1.02 * tokens_per_s["line"]


def test_a_device_without_tiles_is_not_given_any() -> None:
    for seed in range(5):
        for noise in (0.0, 0.02, 0.1):
            loop = loop_on(roofline(), noise=noise, outliers=0.01, rng=random.Random(seed))
            loop.run(300)
            loop.device = roofline(2.0)
            loop.run(300)
            assert loop.controller.model.tile_tokens == 1


def test_the_tile_is_remembered() -> None:
    loop = loop_on(in_tiles(128))
    loop.run(200)
    model = StepTimeModel()
    model.load(loop.controller.model.to_mapping())
    assert model.tile_tokens == 128
    broken = loop.controller.model.to_mapping() | {"tile": 100}
    with pytest.raises(ValueError):
        StepTimeModel().load(broken)
