"""The conformance suite on the real engine: every policy gives the tokens of stock's scheduler.

One engine goes by one policy after the other.
"""

import pytest

from tests.engine.real.engines import Pair, RealEngine, prompt
from tests.engine.test_conformance import POLICIES

pytestmark = pytest.mark.slow

LENGTHS = (6, 300, 40, 1, 420, 90, 7, 150, 33, 400)


@pytest.mark.parametrize("policy", [name for name in POLICIES if "@" not in name])
def test_the_tokens_of_stock(pair: Pair, policy: str) -> None:
    def scene(engine: RealEngine) -> None:
        for i, length in enumerate(LENGTHS):
            engine.add(f"r{i}", prompt(i, length), max_tokens=10 + 3 * i)
            engine.step(2)
        engine.abort("r4")

    def crowded(engine: RealEngine) -> None:
        for i in range(16):
            engine.add(f"c{i}", prompt(20 + i, 250), max_tokens=30)

    pair.ours.change(POLICIES[policy])
    assert pair.ours.scheduler.controller.config.scheduler == POLICIES[policy].scheduler
    _, run = pair.compare(scene, aborted="r4")
    assert run.distinct >= len(LENGTHS) - 1  # the one that is aborted may have said nothing
    _, run = pair.compare(crowded)
    assert run.distinct == 16
