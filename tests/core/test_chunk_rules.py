"""Where a prompt may be cut, beside a twin that tries every place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sarathi.core.chunk_rules import ANYWHERE, ChunkRules


def places(rules: ChunkRules, start: int, end: int) -> list[int]:
    """Return every position after `start` where a chunk may end."""

    def allowed(cut: int) -> bool:
        return cut == end or (
            cut % rules.multiple == 0
            and cut <= end - rules.tail_tokens
            and not any(first < cut < last for first, last in rules.whole)
        )

    return [cut for cut in range(start + 1, end + 1) if allowed(cut)]


@st.composite
def prompts(draw: st.DrawFn) -> tuple[ChunkRules, int, int]:
    end = draw(st.integers(1, 120))
    start = draw(st.integers(0, end - 1))
    edges = sorted(draw(st.sets(st.integers(start, end), max_size=6)))
    whole = tuple(zip(edges[::2], edges[1::2], strict=False))
    rules = ChunkRules(whole, draw(st.sampled_from((1, 1, 4, 7, 50))), draw(st.integers(0, 5)))
    return rules, start, end


@given(prompts(), st.integers(0, 130))
def test_a_chunk_is_the_largest_that_is_allowed(prompt: tuple[ChunkRules, int, int], tokens: int) -> None:
    rules, start, end = prompt
    ends = [cut for cut in places(rules, start, end) if cut <= start + tokens]
    assert rules.fit(start, end, tokens) == (max(ends) - start if ends else 0)


@given(prompts())
def test_the_least_chunk_is_the_first_that_is_allowed(prompt: tuple[ChunkRules, int, int]) -> None:
    rules, start, end = prompt
    assert rules.least(start, end) == min(places(rules, start, end)) - start


@pytest.mark.parametrize("tokens", [0, 1, 7, 99, 100, 500])
def test_without_rules_any_chunk_will_do(tokens: int) -> None:
    assert ANYWHERE.fit(20, 120, tokens) == min(tokens, 100)
    assert ANYWHERE.least(20, 120) == 1
