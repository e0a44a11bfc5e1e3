"""What vLLM captures as CUDA graphs, and what its host does around a step.

A step of decodes alone replays a graph that was captured for its number of tokens, or for the next size above; what
prompts add runs piece by piece from the same graphs, with the attention between them. Beyond the largest size every
kernel is launched by the host, layer after layer, and a step takes at least as long as that.
"""

from bisect import bisect_left

CAPTURE_LIMIT = 512
CAPTURE_LIMIT_BLACKWELL = 1024
"""The largest captured size by default (`VllmConfig._set_cudagraph_sizes`), on devices of capability 10 the second."""

LAUNCH_S, LAYER_LAUNCHES = 5e-6, 12
"""A kernel's launch by the host, and launches of a layer, where nothing is captured: steps cannot be quicker than
their launches. A launch costs 4 to 7 microseconds on today's hosts; no row of the silicon sample is bound by it."""

BLACKWELL = ("b200", "b300", "gb200", "gb300")


def capture_limit(system: str) -> int:
    """Return the largest size that vLLM captures by default on a device."""
    return CAPTURE_LIMIT_BLACKWELL if system.lower().startswith(BLACKWELL) else CAPTURE_LIMIT


def captured_sizes(most_sequences: int, limit: int = CAPTURE_LIMIT) -> tuple[int, ...]:
    """Return the sizes that vLLM captures, in tokens: 1, 2, 4, in steps of 8 to 256, then of 16.

    Args:
        most_sequences: `max_num_seqs`; twice as many are captured.
        limit: the largest size, as `capture_limit` says.
    """
    largest = min(2 * most_sequences, limit)
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16))
    return tuple(size for size in sizes if size <= largest)


def eager_s(layers: int) -> float:
    """Return the least time of a step that no graph holds."""
    return layers * LAYER_LAUNCHES * LAUNCH_S


def padded(tokens: int, sizes: tuple[int, ...]) -> int:
    """Return the tokens of the graph that a step of `tokens` runs in; the same number beyond the largest."""
    place = bisect_left(sizes, tokens)
    return sizes[place] if place < len(sizes) else tokens
