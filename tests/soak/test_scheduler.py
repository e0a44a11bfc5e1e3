"""The scheduler-level soak, cut down; `make soak` runs the whole: SOAK_REQUESTS=100000."""

import os

import pytest

from tests.engine.fuzz.life import Life
from tests.engine.fuzz.setups import Setup
from tests.soak import lives
from tests.soak.lives import MOST_GROWTH_MIB, MOST_NAMES_KEPT, check_books, soak, strings_in

pytest.importorskip("vllm")

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "1000"))
SEED = int(os.environ.get("SOAK_SEED", "0"))


@pytest.mark.timeout(max(300, REQUESTS // 20))
def test_nothing_is_lost_kept_or_stuck() -> None:
    soaked = soak(REQUESTS, SEED, events=lives.EVENTS if REQUESTS > 10_000 else 60)
    print(soaked)
    assert not soaked.broken, "\n".join(soaked.broken)
    assert soaked.requests >= REQUESTS
    assert soaked.growth_mib <= MOST_GROWTH_MIB


def test_a_book_that_keeps_names_is_found() -> None:
    life = Life(Setup("classes"))
    life.scheduler.views._cached_at_start.update({f"r{i}": 0 for i in range(MOST_NAMES_KEPT + 1)})
    assert set(strings_in(life.scheduler.views)) >= {"r0", "r128"}
    with pytest.raises(AssertionError, match="129 of 0 requests are kept"):
        check_books(life)
