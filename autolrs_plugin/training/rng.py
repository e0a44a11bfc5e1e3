"""Random number generators of every kind: their states read, set back, and seeded anew for a probe."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch

from autolrs_plugin.training.checking import named

Generator: TypeAlias = (
    torch.Generator | np.random.Generator | np.random.BitGenerator | np.random.RandomState | random.Random
)

GENERATORS = (
    *(torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState),
    random.Random,
)


def check_generator(generator: object) -> None:
    """Raise TypeError if `generator` is of no kind that can be read and set back."""
    if not isinstance(generator, GENERATORS) or isinstance(generator, random.SystemRandom):
        raise TypeError(
            f"generators: {named(generator)} is none; valid are torch.Generator, numpy.random.Generator, "
            "numpy.random.BitGenerator, numpy.random.RandomState and random.Random."
        )


def rng_state(generators: Sequence[Generator] = ()) -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's own generators (each device's) and of `generators`."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "generators": [state_of(generator) for generator in generators],
    }
    # Asking an accelerator that has not been used yet would start it.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any], generators: Sequence[Generator] = ()) -> None:
    """Set every generator to what `rng_state` read, given the same `generators`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])
    for generator, value in zip(generators, state["generators"], strict=True):
        set_state_of(generator, value)


def seed_all(seed: int, generators: Sequence[Generator] = ()) -> None:
    """Seed every generator; each of `generators` gets a seed of its own, drawn from `seed`."""
    words = np.random.SeedSequence(seed).generate_state(3 + len(generators))
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
    for generator, word in zip(generators, words[3:], strict=True):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(int(word))
        elif isinstance(generator, np.random.Generator | np.random.BitGenerator):
            bits = _bits_of(generator)
            bits.state = type(bits)(int(word)).state
        else:
            generator.seed(int(word))


@contextmanager
def rng_kept(generators: Sequence[Generator] = ()) -> Iterator[None]:
    """Whatever is drawn or seeded inside, every generator is afterwards what it was before."""
    state = rng_state(generators)
    try:
        yield
    finally:
        set_rng_state(state, generators)


def _bits_of(generator: np.random.Generator | np.random.BitGenerator) -> Any:
    return generator.bit_generator if isinstance(generator, np.random.Generator) else generator


def state_of(generator: Generator) -> Any:
    if isinstance(generator, np.random.Generator | np.random.BitGenerator):
        return _bits_of(generator).state
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.get_state()


def set_state_of(generator: Generator, value: Any) -> None:
    if isinstance(generator, np.random.Generator | np.random.BitGenerator):
        _bits_of(generator).state = value
    elif isinstance(generator, random.Random):
        generator.setstate(value)
    else:
        generator.set_state(value)


def like_state(value: Any) -> Generator:
    """Return a new generator of the kind whose state `state_of` returned as `value`."""
    if isinstance(value, torch.Tensor):
        return torch.Generator()
    if isinstance(value, tuple):
        return random.Random()
    if "has_gauss" in value:
        return np.random.RandomState()
    return np.random.Generator(getattr(np.random, value["bit_generator"])())


def spawned_by(generator: Generator) -> int:
    """Return how many generators one of numpy's has spawned: no part of its state, and nobody can set it back."""
    numpys = isinstance(generator, np.random.Generator | np.random.BitGenerator)
    seed = _bits_of(generator).seed_seq if numpys else None  # type: ignore[arg-type]
    return int(getattr(seed, "n_children_spawned", 0))
