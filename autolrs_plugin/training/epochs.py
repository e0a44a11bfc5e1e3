"""What the batches of an epoch depend on: what their source held when it began, and the order in which they came."""

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from autolrs_plugin.training.fingerprint import digest_of
from autolrs_plugin.training.holdings import made_anew, plain_in
from autolrs_plugin.training.inventory import Inventory
from autolrs_plugin.training.plain import joined
from autolrs_plugin.training.rng import set_state_of, state_of
from autolrs_plugin.training.tree import Copier, Restorer
from autolrs_plugin.training.watched import batch_seen

Moving = Callable[[], Mapping[str, torch.Tensor]]
"""Returns the parameters that a step may change, by name."""


class Source:
    """All that a source of batches reaches and that steps may change: its state can be taken, and gone back to.

    Plain attributes and variables as large as `plain.MOST_BYTES` allows, generators, and, where a sampler looks at a
    model, the weights that a step may change, buffers and modes.

    Args:
        source: the batches.
        moving: the parameters that a step may change.
    """

    def __init__(self, source: Any, moving: Moving) -> None:
        self._source = source
        self._moving = moving

    def state(self, copier: Copier | None = None) -> dict[str, Any]:
        """Return what is held now, as copies in host memory, by path and name."""
        copier = copier or Copier(torch.device("cpu"))
        found, moving = self._found()
        held = found.lasting()
        attributes = {path: plain_in(slots, moving) for path, slots in held.items()}
        buffers = {path: module._buffers for path, module in found.modules.items() if module._buffers}
        return {
            "attributes": copier.copy(attributes, note=True),
            "names": {path: list(slots.get()) for path, slots in held.items()},
            "parameters": copier.copy(_parameters(found, moving)),
            "buffers": copier.copy(buffers),
            "modes": {path: module.training for path, module in found.modules.items()},
            "generators": {path: state_of(generator) for path, generator in found.generators.items()},
        }

    def go_to(self, state: Mapping[str, Any], origins: Mapping[int, Any] | None = None) -> None:
        """Hold what `state` has; of what was the same then as now, and is not in it, only what is new goes.

        Args:
            state: what `state()` or `changed()` returned.
            origins: the objects that the copies are of, as the copier noted them: they are put back themselves, and
                what is new stays, such as an iterator.
        """
        found, moving = self._found()
        restorer, parameters = Restorer(origins), _parameters(found, moving)
        with torch.no_grad():
            for name in parameters.keys() & state["parameters"].keys():
                restorer.into(parameters[name], state["parameters"][name])
            for path, module in found.modules.items():
                for name, kept in state["buffers"].get(path, {}).items():
                    module._buffers[name] = restorer.restored(module._buffers.get(name), kept)
                module.training = state["modes"].get(path, module.training)
            for path, slots in found.lasting().items():
                now = slots.get()
                for name in now.keys() - state["names"].get(path, now.keys()) if origins is None else ():
                    slots.delete(name)
                for name, kept in state["attributes"].get(path, {}).items():
                    restored = restorer.restored(now.get(name), kept)
                    if name not in now or now[name] is not restored:
                        slots.set(name, restored)
        for path, kept in state["generators"].items():
            value = Restorer().restored(None, kept)
            generator = found.generators.get(path) or made_anew(found, path, value)
            if generator is not None:
                set_state_of(generator, value)

    @contextmanager
    def as_it_was(self, state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Inside, it holds what `state` has; afterwards what it held before. Yield all that it holds inside."""
        copier = Copier()
        now = self.state(copier)
        try:
            self.go_to(state)
            yield self.state()
        finally:
            self.go_to(now, copier.origins)

    def changed(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the part of `state` that is not what is held now: that alone need be kept to go back to it."""
        now = self.state(Copier(share=True))
        parts = {}
        for part in ("attributes", "buffers"):
            parts[part] = {
                path: {name: kept for name, kept in values.items() if _differs(kept, now[part], path, name)}
                for path, values in state[part].items()
            }
        parameters = {
            name: kept
            for name, kept in state["parameters"].items()
            if _differs(kept, now, "parameters", name)
        }
        return {**state, **parts, "parameters": parameters}

    def _found(self) -> tuple[Inventory, set[int]]:
        return Inventory({"": self._source}, {}, data=True), {id(p) for p in self._moving().values()}


def _parameters(found: Inventory, moving: set[int]) -> dict[str, torch.Tensor]:
    return {
        joined(path, name): parameter
        for path, module in found.modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in moving
    }


def _differs(kept: Any, now: Mapping[str, Any], path: str, name: str) -> bool:
    values = now.get(path, {})
    return name not in values or digest_of(values[name]) != digest_of(kept)


class Order:
    """Tells by one number in what order an epoch's batches have come so far.

    A loader's are told apart by the indices that its sampler gives, for what a data set makes of them may depend on
    how far training is. A list has one order. Others are told apart by what is in them.

    Args:
        source: the batches.

    Attributes:
        seen: the number.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._fixed = isinstance(source, list | tuple)
        self._by_index = (
            isinstance(source, DataLoader)
            and type(source).__iter__ is DataLoader.__iter__
            and not isinstance(source.dataset, IterableDataset)
        )
        self._sampler: _NotedSampler | None = None
        self.seen = 0

    def begin(self) -> AbstractContextManager[None]:
        """Inside, an epoch begins: the iterator is made."""
        self.seen = 0
        return self._through_sampler() if self._by_index else nullcontext()

    def note(self, batch: Any) -> None:
        """Take note of the next batch."""
        if self._sampler is not None:
            self.seen = self._sampler.ahead.popleft()
        elif not self._fixed:
            self.seen = batch_seen(batch, self.seen)

    @contextmanager
    def _through_sampler(self) -> Iterator[None]:
        loader = self._source
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        own = vars(loader)[name]
        self._sampler = vars(loader)[name] = _NotedSampler(own)  # torch lets no one set it
        # Persistent workers have an iterator already, which draws from the sampler that it was made with.
        if loader._iterator is not None:
            loader._iterator._index_sampler = self._sampler
        try:
            yield
        finally:
            vars(loader)[name] = own


class _NotedSampler:
    """A sampler that notes what it gives: workers are given indices before their batches are asked for."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.ahead: deque[int] = deque()

    def __iter__(self) -> Iterator[Any]:
        return self._noted(iter(self._sampler))

    def __len__(self) -> int:
        return len(self._sampler)

    def _noted(self, given: Iterator[Any]) -> Iterator[Any]:
        seen = 0
        for indices in given:
            seen = zlib.crc32(repr(indices).encode(), seen)
            self.ahead.append(seen)
            yield indices
