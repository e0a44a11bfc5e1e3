"""Batches: the run's own stream with a position that can be gone back to, and streams for probes beside it."""

import copy
import itertools
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterDataPipe

from autolrs_plugin.training.arguments import takes
from autolrs_plugin.training.checking import named
from autolrs_plugin.training.epochs import Moving, Order, Source
from autolrs_plugin.training.rng import Generator, rng_kept, rng_state, set_rng_state
from autolrs_plugin.training.tree import Restorer

logger = logging.getLogger("autolrs_plugin")

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
"""A loader, list or other iterable that can be iterated again and again, or a function that gives one epoch's."""


_END = object()

DISTRIBUTED_SEEDS = 2**32
"""A sampler that shares the data out among processes must have the same seed on all of them; the last 32 bits are."""


class BatchStream:
    """The run's own batches, epoch after epoch, drawn exactly as `for batch in source` would draw them.

    Its position is what there was when the epoch began, and a count of batches: the state of all random number
    generators, and of all that the source reaches and that steps may change (the weights of a sampler, the model that
    it ranks by). Going back within a process to where it still stands costs nothing, anything else begins the epoch
    again as it was begun, skips, and sees that the batches came in the same order. A source that looks at what steps
    change during an epoch gives another one, and so does one whose data change amid an epoch: that is warned of once,
    since what follows is right where each batch is decided on alone, and no run is worth ending for it.

    Args:
        source: the batches.
        name: of the argument, for errors.
        generators: random number generators beside the global ones that the source may draw from.
        moving: the parameters that a step may change.

    Raises:
        TypeError: `source` can be iterated only once, or not at all.
    """

    def __init__(
        self, source: Batches, name: str, generators: Sequence[Generator] = (), moving: Moving = dict
    ) -> None:
        check_batches(source, name)
        self._source = source
        self._name = name
        self._generators = tuple(generators)
        self._held, self._order = Source(source, moving), Order(source)
        self._iterator: Iterator[Any] | None = None
        self._epoch: str | None = None
        self._epoch_rng: dict[str, Any] = {}
        self._begun: dict[str, Any] = {}
        self._starts_workers = False
        self._batches = 0
        self._epochs = 0
        self._warned = False

    def next(self) -> Any:
        """Return the next batch.

        Raises:
            ValueError: an epoch has no batches.
        """
        if self._iterator is not None and (batch := self._drawn()) is not _END:
            return batch
        self._epoch, self._epoch_rng, self._batches = uuid.uuid4().hex, rng_state(self._generators), 0
        self._begun = self._held.state()
        self._starts_workers = _has_no_workers_yet(self._source)
        self._epochs += 1
        self._begin_epoch()
        if (batch := self._drawn()) is _END:
            raise ValueError(_empty(self._source, self._name))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {
            "epoch": self._epoch,
            "rng": self._epoch_rng,
            "begun": self._begun and self._held.changed(self._begun),
            "batches": self._batches,
            "order": self._order.seen,
            "starts_workers": self._starts_workers,
            "epochs": self._epochs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go to a position; all that the source reaches must be what it was there, and is left so.

        The random number generators are left anywhere, and must be set by the caller. Return whether it has moved.

        Raises:
            ValueError: the epoch, begun again, has not as many batches.
        """
        if (state["epoch"], state["batches"]) == (self._epoch, self._batches):
            return False
        begun = self._begun if state["epoch"] == self._epoch else state["begun"]
        self._epoch, self._starts_workers = state["epoch"], state["starts_workers"]
        self._epoch_rng = Restorer().restored(None, state["rng"])
        self._batches, self._iterator, self._epochs = 0, None, state["epochs"]
        if self._epoch is None:
            return True
        if _keeps_workers(self._source):
            _make_workers(self._source, wanted=not self._starts_workers)
        with self._held.as_it_was(begun) as self._begun:
            set_rng_state(self._epoch_rng, self._generators)
            self._begin_epoch()
            while self._batches < state["batches"]:
                if self._drawn() is _END:
                    raise ValueError(
                        f"{self._name}: an epoch ended after {self._batches} batches and had {state['batches']} "
                        "before; it must give the same batches from the same random state."
                    )
        if self._order.seen != state["order"] and not self._warned:
            self._warned = True
            logger.warning(
                "%s: begun again, an epoch gave other batches than before among its first %d: they depend on what "
                "changes during the epoch, so those that follow may not be those of a run without AutoLRS; decide on "
                "their order when it begins, or give data= an object with state_dict() and load_state_dict().",
                self._name,
                self._batches,
            )
        self._order.seen = state["order"]
        return True

    def _begin_epoch(self) -> None:
        _set_epoch(self._source, self._epochs - 1)
        with self._order.begin():
            self._iterator = _epoch_of(self._source, self._name)

    def _drawn(self) -> Any:
        # Never `for batch in iterator`: some loaders are their own iterators, and would begin again.
        assert self._iterator is not None
        batch = next(self._iterator, _END)
        if batch is not _END:
            self._batches += 1
            self._order.note(batch)
        return batch


class ProbeBatches:
    """Batches for probes, in an order of each probe's own that leaves the run's stream alone.

    A loader draws its order from the random number generators, which are seeded for each probe, a sampler with
    `set_epoch` from the number that it is given; a list is shuffled.
    An unshuffled loader gives every probe its first batches.

    Args:
        source: the batches.
        name: of the argument, for errors.
        generators: random number generators beside the global ones that the source may draw from.

    Raises:
        TypeError: `source` can be iterated only once, or not at all.
    """

    def __init__(self, source: Batches, name: str, generators: Sequence[Generator] = ()) -> None:
        check_batches(source, name)
        self._name = name
        self._generators = tuple(generators)
        self._source = source
        if isinstance(source, DataLoader):
            # Persistent workers serve one iteration at a time: the probes' loader needs its own.
            loader: Any = copy.copy(source)
            loader._iterator = None
            self._source = loader

    def draw(self, seed: int) -> Iterator[Any]:
        """Yield batches without end; the generators must have been seeded with `seed` before.

        Raises:
            ValueError: an epoch has no batches.
        """
        order = np.random.default_rng(seed)
        if _keeps_workers(self._source):
            with rng_kept(self._generators):
                _make_workers(self._source, wanted=True)
        for epoch in itertools.count():
            _set_epoch(self._source, (seed + epoch) % DISTRIBUTED_SEEDS)
            empty = True
            batches: Iterable[Any] = _epoch_of(self._source, self._name)
            if isinstance(self._source, list | tuple):
                batches = (self._source[i] for i in order.permutation(len(self._source)))
            for batch in batches:
                empty = False
                yield batch
            if empty:
                raise ValueError(_empty(self._source, self._name))


def check_batches(source: object, name: str) -> None:
    """Raise TypeError naming the argument if `source` cannot be iterated again and again."""
    # A DataLoader may be wrapped into one that is an iterator as well, and begins again with iter().
    if isinstance(source, Iterator) and not isinstance(source, DataLoader):
        raise TypeError(
            f"{name}: a {type(source).__name__} can be iterated only once; give what it iterates over, such as a "
            "DataLoader or a list, or a function that returns a new one for each epoch."
        )
    if isinstance(source, DataLoader) and isinstance(source.dataset, IterDataPipe) and not source.num_workers:
        raise TypeError(
            f"{name}: is a DataLoader over a datapipe, which has one iterator at a time, so a probe would take the "
            "run's away; give a function that creates both for each epoch, such as "
            "lambda: DataLoader(IterableWrapper(items).shuffle(), batch_size=16), or num_workers=1."
        )
    if isinstance(source, str | bytes):
        raise TypeError(
            f"{name}: {source[:40]!r} is a text, and no batches; give a DataLoader or a list of batches."
        )
    if isinstance(source, Mapping):
        raise TypeError(
            f"{name}: a {type(source).__name__} gives its keys, and no batches; give what is in it, or a function that "
            "returns the batches of an epoch, such as lambda: zip(loaders['a'], loaders['b'])."
        )
    if isinstance(source, Set):
        raise TypeError(
            f"{name}: a {type(source).__name__} has no order that lasts; give a DataLoader or a list of batches."
        )
    iterable = isinstance(source, Iterable) or hasattr(source, "__getitem__")
    if isinstance(source, type) or not (iterable or callable(source)):
        raise TypeError(f"{name}: {named(source)} is neither iterable nor a function that returns an epoch.")
    if not iterable and not takes(source, 0):
        raise TypeError(
            f"{name}: is a function that needs an argument, and is called without any; give one that returns an epoch."
        )


def generators_of(source: object) -> list[torch.Generator]:
    """Return the generators that a DataLoader and its samplers were given."""
    samplers = [getattr(source, "sampler", None), getattr(source, "batch_sampler", None)]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
    found = [getattr(thing, "generator", None) for thing in (source, *samplers)]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def without_workers(loader: Any) -> Any:
    """Return a copy of a loader that shares no workers with it, and keeps none; what is no loader, as it is."""
    if not isinstance(loader, DataLoader):
        return loader
    own: Any = copy.copy(loader)
    if isinstance(vars(own).get("base_dataloader"), DataLoader):  # what Accelerate wraps
        own.base_dataloader = without_workers(own.base_dataloader)
    else:
        vars(own).update(_iterator=None, persistent_workers=False)  # torch lets no one set the latter
    return own


def _set_epoch(source: Any, epoch: int) -> None:
    """Tell a sampler that shuffles by the number of the epoch which one it is, as every loop over one has to."""
    sampler = getattr(source, "sampler", None)
    if sampler is not None and hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


def _keeps_workers(source: Any) -> bool:
    return isinstance(source, DataLoader) and bool(source.persistent_workers)


def _has_no_workers_yet(source: Any) -> bool:
    return _keeps_workers(source) and source._iterator is None


def _make_workers(source: Any, wanted: bool) -> None:
    """Give a loader with persistent workers its workers, or none: starting them draws a random number once."""
    if not wanted:
        source._iterator = None
    elif source._iterator is None:
        iter(source)


def _epoch_of(source: Batches, name: str) -> Iterator[Any]:
    if isinstance(source, Iterable) or hasattr(source, "__getitem__"):
        return iter(source)
    epoch = source()
    if not isinstance(epoch, Iterable) and not hasattr(epoch, "__getitem__"):
        raise TypeError(f"{name}: returned {named(epoch)}; it must return the batches of an epoch.")
    return iter(epoch)


def _empty(source: Batches, name: str) -> str:
    again = "" if isinstance(source, Iterable) else "; the function must return a new iterator each time"
    return f"{name}: an epoch of it has no batches{again}."
