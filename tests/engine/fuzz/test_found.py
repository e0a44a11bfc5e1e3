"""What the fuzz has found, each cut down to the few events that matter: stock vLLM lives through all of them."""

from dataclasses import replace

import pytest

from tests.engine.fuzz.events import Add, Event, Grammar, Part, Pause, Steps
from tests.engine.fuzz.life import Life
from tests.engine.fuzz.setups import Setup

FOUND: dict[str, tuple[Setup, list[Event]]] = {
    # The adapters of those that a step leaves out count: the next one holds all of them (an assertion of vLLM's).
    "three adapters in a step": (
        Setup("chunked-only", limit=256, blocks=29, caching=True, adapters=2, drafts=3, threshold=20),
        [
            Add(126, 14, seed=5, adapter=3),
            Add(131, 22, seed=5, adapter=2),
            Add(82, 17, seed=3, adapter=1),
        ],
    ),
    # A running request that gets nothing counts, too: here its image is larger than the budget.
    "an adapter beside an image that waits": (
        Setup("prefill-first@24", limit=256, blocks=27, caching=True, adapters=1, images="whole"),
        [Add(160, 2, adapter=3, images=(49,)), Add(61, 17, seed=5, adapter=1)],
    ),
    # Decodes stand for a prompt that cannot be let in: nobody moves any more.
    "decodes stand for a paused prompt": (
        Setup("prefill-first", slots=2, limit=256, blocks=400, caching=True, threshold=20),
        [Add(16, 22, seed=4), Steps(7), Pause("PAUSED_NEW"), Add(178, 13, seed=5), Steps(23)],
    ),
    "decodes stand for an adapter without a slot": (
        Setup("prefill-first", limit=64, block_size=32, blocks=400, caching=True, adapters=1, threshold=20),
        [
            Add(179, 10, seed=4, adapter=3),
            Add(13, 20, seed=1),
            Add(162, 7, seed=4),
            Add(4, 5, seed=1, adapter=2),
            Add(4, 14, seed=1, copies=2, adapter=3),
        ],
    ),
    "the same in a hybrid model": (
        Setup(
            "prefill-first",
            limit=64,
            block_size=32,
            blocks=400,
            caching=True,
            adapters=1,
            groups="hybrid",
            threshold=20,
        ),
        [
            Add(179, 10, seed=4, adapter=3),
            Add(13, 20, seed=1, slo_ms=20.0),
            Add(162, 7, seed=4),
            Add(4, 5, seed=1, adapter=2),
            Add(4, 14, seed=1, copies=2, adapter=3),
        ],
    ),
    "decodes stand for one behind an adapter without a slot": (
        Setup(
            "prefill-first",
            limit=256,
            blocks=29,
            caching=True,
            adapters=2,
            drafts=3,
            connector="fail",
            threshold=20,
        ),
        [
            Add(161, 19, seed=4, adapter=1, remote=95, how="async send", slo_ms=20.0),
            Add(146, 17, seed=1, copies=5, adapter=2, remote=112, how="send"),
            Steps(6, 0.02),
            Steps(6, 0.02),
            Add(81, 12, seed=4, adapter=3, slo_ms=20.0),
            Add(14, 7, adapter=3, slo_ms=20.0),
            Steps(1),
            Add(135, 2, seed=4, adapter=2, grammar=True, how="async send"),
            Add(1, 9, seed=1, adapter=3, grammar=True, remote=1, how="async"),
            Add(82, 17, seed=3, adapter=1, remote=50, how="async send"),
            Add(92, 1, seed=5, copies=5, adapter=3, slo_ms=200.0),
        ],
    ),
    # What was loaded from elsewhere waits in a queue of its own, which vLLM serves first.
    "decodes stand for a load": (
        Setup("prefill-first", slots=8, block_size=32, blocks=24, groups="sliding", connector="recompute"),
        [
            Add(17, 6, copies=5),
            Add(10, 4, seed=1, copies=5, remote=4, how="async"),
            Add(116, 9, seed=2, copies=2, remote=39, how="async"),
        ],
    ),
    "decodes stand for a stream's next part": (
        Setup("prefill-first", slots=8, limit=256, block_size=32, blocks=27, caching=True, streams=True),
        [Add(60, 19, seed=1, stream=True), Part(0, 30), Add(4, 4, seed=3, stream=True), Part(1, 30)],
    ),
    # vLLM ends it when it comes to it in its queue: also where nobody is let in.
    "a grammar that does not compile": (
        Setup("deadline", slots=1, limit=256, block_size=32, blocks=400, caching=True),
        [Add(12, 3, seed=1, grammar=True), Grammar(0, well=False)],
    ),
    "a grammar that does not compile, at the end of a queue": (
        Setup("deadline-late", slots=1, limit=64, block_size=32, blocks=40, caching=True),
        [Add(16, 16, seed=3, copies=5), Add(212, 5, copies=5, grammar=True), Grammar(2, well=False)],
    ),
}

CUT: dict[str, tuple[Setup, list[Event]]] = {
    "by a fixed budget": (
        Setup("fixed", slots=1, block_size=8, blocks=400, caching=True, images="whole"),
        [Add(70, 8, seed=3, copies=2, images=(26,))],
    ),
    "by a budget that shrinks": (
        Setup("unattainable", slots=8, blocks=400, caching=True, images="whole"),
        [Add(51, 13, seed=4, copies=5, images=(9,))],
    ),
    "by a baseline's": (
        Setup("chunked-only@24", slots=8, limit=256, blocks=400, images="whole"),
        [Add(11, 2, seed=1, copies=5), Add(90, 15, seed=5, images=(6,))],
    ),
    # Stock cuts here, too: a prompt whose image comes next gets what others have left.
    "by what is left of a step": (
        Setup("slo", "async", in_flight=2, slots=8, block_size=32, blocks=400, images="whole"),
        [Add(209, 4, copies=5, images=(104, 146))],
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name: str) -> None:
    setup, events = FOUND[name]
    Life(setup.stock).play(events)
    Life(setup).play(events)


@pytest.mark.parametrize("name", CUT)
def test_images_stay_whole(name: str) -> None:
    setup, events = CUT[name]
    Life(setup).play(events)


@pytest.mark.parametrize(
    "policy", ["slo", "deadline", "sjf", "fixed", "prefill-first", "chunked-only", "orca"]
)
@pytest.mark.parametrize("name", FOUND)
def test_no_other_policy_has_the_same_fault(name: str, policy: str) -> None:
    setup, events = FOUND[name]
    Life(replace(setup, policy=policy)).play(events)
