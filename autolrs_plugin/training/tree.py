"""Nested state (tensors in dicts, lists and tuples): copied so that nothing else refers to it, and put back in place.

An optimizer's `state_dict()` returns live references and its `load_state_dict()` aliases or casts, so neither can
undo a step exactly. Here a copy is a copy, and going back writes into the very tensors that are in use, because
compiled graphs, flattened buffers and the caller's own variables refer to them.
"""

import copy
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from autolrs_plugin.training.plain import ALWAYS, BUFFERS, Count, count_at, entries, is_fixed

_NOTED = (*BUFFERS, torch.Tensor, np.ndarray, dict, list, deque, set)
_CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is spread over processes (a DTensor); each process copies its own part alone.

    Attributes:
        mesh: the devices; None where it was read from a file.
        placements: one for each dimension of the mesh.
        shape: of the whole tensor.
        stride: of the whole tensor.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """The values of a tensor, and where the tensor itself lives.

    Attributes:
        data: the values, on any device.
        device: the device of the tensor that was copied.
        sharding: how the whole tensor is spread, of which this is the part of this process; None where it is whole.
        grad: the copy of its gradient, where it is a leaf of no module, which the gradients of parameters leave out.
    """

    data: torch.Tensor
    device: torch.device
    sharding: Sharding | None = None
    grad: Any = None


@dataclass(frozen=True, slots=True)
class Composite:
    """A tensor that consists of others, such as a state of 8 bits with its scales.

    Its own copying cannot be relied on: torchao's gives the same memory where the device is the same.

    Attributes:
        kind: its type.
        parts: the tensors that it consists of, by the name of the attribute.
        context: what else its type needs to put them together.
        shape: of the whole.
        stride: of the whole.
    """

    kind: Any
    parts: dict[str, Any]
    context: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def is_sharded(tensor: Any) -> bool:
    """Tell whether a tensor is a DTensor."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor, in the same memory; the whole of one that is not spread."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_constant(value: Any) -> bool:
    """Tell whether a value is a number, a string or a tuple of these, such as the state of Python's generator."""
    return isinstance(value, _CONSTANTS) or (
        type(value) is tuple and all(type(v) in _CONSTANTS for v in value)
    )


def part_names(tensor: Any) -> list[str]:
    """Return the attributes that hold the tensors that this one consists of; none of an ordinary one."""
    if (
        not isinstance(tensor, torch.Tensor)
        or is_sharded(tensor)
        or not hasattr(tensor, "__tensor_flatten__")
    ):
        return []
    return list(tensor.__tensor_flatten__()[0])


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield this process's part of a tensor, in the same memory; of one that consists of others, theirs."""
    names = part_names(tensor)
    for name in names:
        yield from plain_tensors(getattr(tensor, name))
    if not names:
        yield from plain_tensors(tensor.to_local()) if is_sharded(tensor) else [tensor.detach()]


class Copier:
    """Copies nested state once; a tensor met twice is one copy.

    Args:
        place: the device for the copies; None for each tensor's own.
        share: refer to the live tensors instead of copying them: for state that is written out at once.

    Attributes:
        origins: by the id of a copy, what it is a copy of, where `copy` was asked to note that.
    """

    def __init__(self, place: torch.device | None = None, share: bool = False) -> None:
        self._place = place
        self.shares = share
        self._copies: dict[int, TensorCopy | Composite | Count] = {}
        self._reused: set[int] = set()
        self.origins: dict[int, Any] = {}
        # Containers of tensors are made anew by some state_dict(): they must outlive their ids.
        self._seen: list[Any] = []

    def copy(self, value: Any, old: Any = None, note: bool = False) -> Any:
        """Return a copy of `value`, made in the memory of `old` (an earlier copy that nobody needs) where it fits.

        Args:
            value: what is copied.
            old: the earlier copy.
            note: whether to note what each copy is a copy of, so that going back gives the very same objects.
        """
        if (
            type(value) in ALWAYS
            or is_constant(value)
            or isinstance(value, TensorCopy | Composite | Count)
            or is_fixed(value)
        ):  # nobody writes to a copy
            return value
        if isinstance(value, torch.Tensor):
            if id(value) not in self._copies:
                self._seen.append(value)
                if part_names(value):
                    self._copies[id(value)] = self._copy_parts(value, old)
                else:
                    grad = value.grad if note and value.is_leaf else None
                    kept = None if grad is None else self.copy(grad, getattr(old, "grad", None))
                    self._copies[id(value)] = replace(self._copy_tensor(value, old), grad=kept)
            copied: Any = self._copies[id(value)]
        elif (count := count_at(value)) is not None:
            self._seen.append(value)
            copied = self._copies.setdefault(id(value), count)
        elif isinstance(value, dict):
            olds = old if isinstance(old, dict) else {}
            copied = copy.copy(value)  # of the same type, with its default factory
            for key, item in entries(copied):
                copied[key] = self.copy(item, olds.get(key), note)
        elif isinstance(value, list | tuple | deque):
            before = list(old) if isinstance(old, list | tuple | deque) else []
            items = [self.copy(v, before[i] if i < len(before) else None, note) for i, v in entries(value)]
            copied = _like(value, items)
        else:
            copied = copy.deepcopy(value)
        if note and isinstance(value, _NOTED):
            self.origins[id(copied)] = value
        return copied

    def _copy_parts(self, whole: Any, old: Any) -> Composite:
        names, context = whole.__tensor_flatten__()
        olds = old.parts if isinstance(old, Composite) else {}
        parts = {name: self.copy(getattr(whole, name), olds.get(name)) for name in names}
        return Composite(type(whole), parts, context, tuple(whole.shape), tuple(whole.stride()))

    def _copy_tensor(self, whole: torch.Tensor, old: Any) -> TensorCopy:
        whole = whole.detach()
        tensor, sharding = local(whole), None
        if part_names(tensor):
            raise TypeError(
                f"a {type(tensor).__name__} that is spread over processes cannot be copied; keep optimizer states of "
                "32 bits with FSDP2, or train with DistributedDataParallel."
            )
        if is_sharded(whole):
            sharding = Sharding(
                whole.device_mesh, tuple(whole.placements), tuple(whole.shape), tuple(whole.stride())
            )
        if self.shares:
            return TensorCopy(tensor, tensor.device, sharding)
        place = self._place or tensor.device
        # Fresh memory costs more than the copy itself; the memory of the copy before is warm.
        # One tensor that has become two was one copy before, whose memory only one of them can have.
        unused = isinstance(old, TensorCopy) and id(old) not in self._reused
        if (
            unused
            and (old.device, old.sharding) == (tensor.device, sharding)
            and _same_form(old.data, tensor)
        ):
            old.data.copy_(tensor)
            self._reused.add(id(old))
            return old  # type: ignore[no-any-return]
        return TensorCopy(tensor.to(place, copy=True), tensor.device, sharding)


class Restorer:
    """Writes copies back into the live state; a tensor that was copied once is one tensor again.

    Args:
        origins: what the copies are copies of, as the Copier noted it: they are written in place and put back.

    Attributes:
        mesh: the devices of the parameter whose state is restored next, if it is spread over processes.
        replaced: counts that others have taken the place of.
    """

    def __init__(self, origins: Mapping[int, Any] | None = None) -> None:
        self.mesh: Any = None
        self.replaced: list[Any] = []
        self._origins = origins or {}
        self._restored: dict[int, Any] = {}
        self._written: set[int] = set()

    def into(self, tensor: torch.Tensor, kept: TensorCopy | Composite) -> None:
        """Write `kept` into `tensor`, which keeps its identity, memory and layout."""
        if isinstance(kept, Composite):
            for name, part in kept.parts.items():
                self.into(getattr(tensor, name), part)
        else:
            with torch.inference_mode() if tensor.is_inference() else nullcontext():
                local(tensor).copy_(kept.data)
        self._restored[id(kept)] = tensor
        self._written.add(id(tensor))

    def restored(self, live: Any, kept: Any) -> Any:
        """Return `kept` as live state: `live` itself, written in place, wherever its type and form allow it."""
        if type(kept) in ALWAYS or is_constant(kept) or is_fixed(kept):
            return kept
        live = self._origins.get(id(kept), live)
        if isinstance(kept, TensorCopy):
            return self._tensor(live, kept)
        if isinstance(kept, Composite):
            return self._composite(live, kept)
        if isinstance(kept, Count):
            return self._count(live, kept)
        if isinstance(kept, dict):
            before = live if isinstance(live, dict) else {}
            items = {key: self.restored(before.get(key), item) for key, item in kept.items()}
            target = live if isinstance(live, dict) else copy.copy(kept)  # of the same type
            target.clear()  # what is there now and was not then was made by a probe
            target.update(items)
            return target
        if isinstance(kept, list | tuple | deque):
            lives = list(live) if isinstance(live, list | tuple | deque) else []
            items_ = [self.restored(lives[i] if i < len(lives) else None, k) for i, k in enumerate(kept)]
            return _refilled(live, kept, items_)
        if isinstance(kept, set):
            return _refilled(live, kept, kept)
        if _same_array(live, kept):
            live[...] = kept
            return live
        if isinstance(kept, BUFFERS) and type(live) is type(kept):
            live[:] = kept  # type: ignore[assignment]
            return live
        return copy.deepcopy(kept)

    def _tensor(self, live: Any, kept: TensorCopy) -> torch.Tensor:
        if id(kept) in self._restored:
            return self._restored[id(kept)]
        # A tensor that has been written already now stands in two places of the state, but did not then.
        if (
            isinstance(live, torch.Tensor)
            and is_sharded(live) == (kept.sharding is not None)
            and live.device == kept.device
            and _same_form(local(live), kept.data)
            and id(live) not in self._written
        ):
            # An original may be expanded, or part of a graph: it is written only where it has changed.
            if id(kept) not in self._origins or not torch.equal(
                local(live.detach()), kept.data.to(kept.device)
            ):
                self.into(live.detach() if live.requires_grad else live, kept)
        else:
            live = self._whole(kept.data.to(kept.device, copy=True), kept.sharding)
        self._restored[id(kept)] = live
        self._written.add(id(live))
        if kept.grad is not None:
            live.grad = self.restored(live.grad, kept.grad)
        elif id(kept) in self._origins and live.is_leaf:
            live.grad = None
        return live

    def _composite(self, live: Any, kept: Composite) -> Any:
        if id(kept) not in self._restored:
            same = (
                type(live) is kept.kind and tuple(live.shape) == kept.shape and id(live) not in self._written
            )
            parts = {
                name: self.restored(getattr(live, name) if same else None, part)
                for name, part in kept.parts.items()
            }
            if not (same and all(getattr(live, name) is part for name, part in parts.items())):
                build = kept.kind
                live = build.__tensor_unflatten__(parts, kept.context, kept.shape, kept.stride)
            self._restored[id(kept)] = live
            self._written.add(id(live))
        return self._restored[id(kept)]

    def _count(self, live: Any, kept: Count) -> Any:
        """Return a count that is where `kept` says: one cannot go back, but a new one can take its place."""
        if id(kept) not in self._restored:
            same = repr(count_at(live)) == repr(kept)
            self._restored[id(kept)] = live if same else itertools.count(kept.start, kept.step)
            if not same and type(live) is itertools.count:
                self.replaced.append(live)
        return self._restored[id(kept)]

    def _whole(self, part: torch.Tensor, sharding: Sharding | None) -> torch.Tensor:
        if sharding is None:
            return part
        from torch.distributed.tensor import DTensor  # slow to import, and only where tensors are spread

        mesh = sharding.mesh if sharding.mesh is not None else self.mesh
        return DTensor.from_local(
            part, mesh, sharding.placements, run_check=False, shape=sharding.shape, stride=sharding.stride
        )


def _same_form(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
        return False
    # The layout in memory is the order in which a sum is taken, which bits depend on.
    return bool(a.layout == torch.strided and a.stride() == b.stride())


def _same_array(live: Any, kept: Any) -> bool:
    arrays = isinstance(kept, np.ndarray) and isinstance(live, np.ndarray) and live.flags.writeable
    return bool(arrays and (live.dtype, live.shape) == (kept.dtype, kept.shape))


def _like(container: Any, items: list[Any]) -> Any:
    if isinstance(container, deque):
        return deque(items, container.maxlen)
    if type(container) is list:
        return items
    if isinstance(container, list):
        copied = copy.copy(container)  # of the same type
        copied[:] = items
        return copied
    if hasattr(container, "_fields"):
        return type(container)(*items)
    return torch.Size(items) if isinstance(container, torch.Size) else tuple(items)


def _refilled(live: Any, kept: Any, items: Iterable[Any]) -> Any:
    """Return `live` with `items` in it, where it is a container of the type of `kept`; otherwise a new one."""
    same = type(live) is type(kept) and getattr(live, "maxlen", None) == getattr(kept, "maxlen", None)
    if same and isinstance(live, list):
        live[:] = items
    elif same and isinstance(live, deque):
        live.clear()
        live.extend(items)
    elif same and isinstance(live, set):
        if live != kept:  # otherwise it keeps the order in which it is iterated over
            live.clear()
            live.update(items)
    else:
        return set(items) if isinstance(kept, set) else _like(kept, list(items))
    return live
