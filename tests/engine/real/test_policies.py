"""The conformance suite on the real engine: every policy gives the tokens of stock's scheduler."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.real.engines import SETTINGS, Pair, RealEngine, open_engine, prompt
from tests.engine.test_conformance import POLICIES

pytestmark = pytest.mark.slow

LIMIT = SETTINGS["max_num_batched_tokens"]
LENGTHS = (6, 300, 40, 1, 420, 90, 7, 150, 33, 400)


@pytest.fixture(scope="module")
def stock(tiny: Path) -> Iterator[RealEngine]:
    with open_engine(tiny) as engine:
        yield engine


@pytest.mark.parametrize("policy", [name for name in POLICIES if "@" not in name])
def test_the_tokens_of_stock(stock: RealEngine, tiny: Path, policy: str) -> None:
    def scene(engine: RealEngine) -> None:
        for i, length in enumerate(LENGTHS):
            engine.add(f"r{i}", prompt(i, length), max_tokens=10 + 3 * i)
            engine.step(2)
        engine.abort("r4")

    def crowded(engine: RealEngine) -> None:
        for i in range(16):
            engine.add(f"c{i}", prompt(20 + i, 250), max_tokens=30)

    config = POLICIES[policy]
    with open_engine(tiny, config.token_budget or LIMIT, config) as ours:
        _, run = Pair(stock, ours).compare(scene, aborted="r4")
        assert run.distinct >= len(LENGTHS) - 1  # the one that is aborted may have said nothing
        _, run = Pair(stock, ours).compare(crowded)
        assert run.distinct == 16
