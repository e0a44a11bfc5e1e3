"""The workloads: drawn from a seed, with the lengths and the text that they state."""

import json
import re

import pytest

from vllm_sarathi.benchmark.workloads import (
    WORKLOADS,
    Workload,
    dataset_lines,
    draw_lengths,
    quick,
    write_prompts,
)


def encode(text: str) -> list[str]:
    """A tokenizer whose tokens change when a text is cut inside a word, as those of real ones do."""
    return re.findall(r"\w{1,4}|\s+|[^\w\s]{1,3}", text)


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_lengths_are_seeded_and_within_their_ranges(workload: Workload) -> None:
    lengths = draw_lengths(workload, seed=0)
    assert lengths == draw_lengths(workload, seed=0)
    assert lengths != draw_lengths(workload, seed=1)
    assert len(lengths) == workload.requests
    counts = [
        sum(
            kind.prompt_tokens[0] <= each.prompt_tokens <= kind.prompt_tokens[1]
            and kind.output_tokens[0] <= each.output_tokens <= kind.output_tokens[1]
            for each in lengths
        )
        for kind in workload.kinds
    ]
    assert sum(counts) == workload.requests
    for kind, count in zip(workload.kinds, counts, strict=True):
        assert count == pytest.approx(kind.share * workload.requests, abs=0.5)


def test_the_mix_is_15_percent_very_long_prompts_also_when_it_is_quick() -> None:
    for workload in (WORKLOADS["mix"], quick(WORKLOADS["mix"])):
        very_long = sum(each.prompt_tokens >= 2000 for each in draw_lengths(workload, 0))
        assert very_long == round(0.15 * workload.requests)


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_every_request_fits_into_the_servers_context(workload: Workload) -> None:
    assert all(kind.prompt_tokens[1] + kind.output_tokens[1] <= 4096 for kind in workload.kinds)


def test_prompts_are_of_exactly_so_many_tokens_and_no_two_start_alike() -> None:
    counts = [1, 2, 7, 50, 50, 50, 400, 1999]
    prompts = write_prompts(counts, encode)
    assert [len(encode(prompt)) for prompt in prompts] == counts
    longer = [prompt for prompt in prompts if len(prompt) > 20]
    assert len({prompt[:20] for prompt in longer}) == len(longer)


def test_a_text_that_is_too_short_is_said() -> None:
    with pytest.raises(RuntimeError, match="too short"):
        write_prompts([50], encode, text="a few words and no more")


def test_the_data_set_is_what_vllm_reads_and_the_same_each_time() -> None:
    lengths = draw_lengths(quick(WORKLOADS["chat"]), 0)
    lines = dataset_lines(lengths, encode)
    assert lines == dataset_lines(lengths, encode)
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["output_tokens"] for row in rows] == [each.output_tokens for each in lengths]
    assert [len(encode(row["prompt"])) for row in rows] == [each.prompt_tokens for each in lengths]
