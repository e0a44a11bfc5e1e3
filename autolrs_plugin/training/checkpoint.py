"""A captured state as one file: tensors as safetensors, everything else as JSON in its header. No pickle."""

import hashlib
import json
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from datetime import date, time, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from autolrs_plugin.core.files import written_whole
from autolrs_plugin.training.plain import FIXED, Count, class_at, is_fixed, is_plain
from autolrs_plugin.training.tree import Composite, Sharding, TensorCopy

VERSION = 2
_HEADER = "autolrs"

_COLLECTIONS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "Size": lambda items: torch.Size(list(items)),
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or cannot be trusted."""


def write_checkpoint(state: dict[str, Any], path: Path) -> str:
    """Write `state` (as `JobState.capture` gives it) to `path`, whole or not at all; return the file's SHA-256.

    Raises:
        CheckpointError: the state holds something that is neither a tensor nor plain data; the message says where. Or
            the file cannot be written, for the disk is full, say; what was there before stays.
    """
    tensors, metadata = _packed(state)
    try:
        with written_whole(path) as scratch:
            save_file(tensors, scratch, metadata=metadata)
            with open(scratch, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path}: the state cannot be written ({reason}), and the one before it is whole; make room on that disk."
        ) from error


def read_checkpoint(path: Path, sha256: str) -> dict[str, Any]:
    """Return the state that `write_checkpoint` wrote, its tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, was changed since, or is of another version.
    """
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: the checkpoint cannot be read ({error.strerror}).") from error
    if found != sha256:
        raise CheckpointError(
            f"{path}: the checkpoint is not the one that was written (its SHA-256 differs)."
        )
    with safe_open(path, framework="pt", device="cpu") as opened:
        return _unpacked(str(path), opened.metadata(), opened.get_tensor)


def checkpoint_bytes(state: dict[str, Any]) -> bytes:
    """Return what `write_checkpoint` would write, to be sent.

    Raises:
        CheckpointError: as there.
    """
    tensors, metadata = _packed(state)
    return bytes(save(tensors, metadata))


def checkpoint_from_bytes(data: bytes) -> dict[str, Any]:
    """Return the state in what `checkpoint_bytes` gave, its tensors on the CPU.

    Raises:
        CheckpointError: it is of another version.
    """
    length = int.from_bytes(data[:8], "little")  # of the header that every safetensors file begins with
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    return _unpacked("the state received", metadata, load(data).__getitem__)


def _packed(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors = _Tensors()
    # The job's own objects are of this process alone.
    plain = {key: value for key, value in state.items() if key != "origins"}
    document = {"version": VERSION, "state": _encode(plain, tensors, "state")}
    return tensors.by_name, {_HEADER: json.dumps(document, allow_nan=False)}


def _unpacked(
    origin: str, metadata: Mapping[str, str], tensor: Callable[[str], torch.Tensor]
) -> dict[str, Any]:
    document = json.loads(metadata[_HEADER])
    if document["version"] != VERSION:
        raise CheckpointError(f"{origin}: is of version {document['version']}; this is version {VERSION}.")
    state: dict[str, Any] = _decode(document["state"], _Read(tensor))
    return state


class _Read:
    """The tensors in a file: what was one copy when it was written, is one."""

    def __init__(self, tensor: Callable[[str], torch.Tensor]) -> None:
        self.tensor = tensor
        self._copies: dict[str, Any] = {}

    def once(self, encoded: Any, decode: Callable[[], Any]) -> Any:
        """Return what `encoded` stands for, decoded where it is first met."""
        key = json.dumps(encoded)
        if key not in self._copies:
            self._copies[key] = decode()
        return self._copies[key]


class _Tensors:
    """The tensors of a file, by name; safetensors takes no two of one storage, and none with gaps."""

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}
        self._storages: set[int] = set()
        self._encoded: dict[int, dict[str, Any]] = {}

    def once(self, kept: TensorCopy | Composite | Count, where: str) -> dict[str, Any]:
        """Return a copy as JSON; one that is met twice goes into the file once."""
        if id(kept) not in self._encoded:
            if isinstance(kept, Count):  # two that are at the same place are two by their number
                encoded = {
                    "count": [_encode(v, self, where) for v in (kept.start, kept.step)],
                    "number": len(self._encoded),
                }
            else:
                encode: Any = _encode_tensor if isinstance(kept, TensorCopy) else _encode_composite
                encoded = encode(kept, self, where)
            self._encoded[id(kept)] = encoded
        return self._encoded[id(kept)]

    def add(self, tensor: torch.Tensor) -> str:
        whole = tensor.contiguous()
        if whole.numel() and whole.untyped_storage().data_ptr() in self._storages:
            whole = whole.clone()
        self._storages.add(whole.untyped_storage().data_ptr())
        name = str(len(self.by_name))
        self.by_name[name] = whole
        return name


def _encode(value: Any, tensors: _Tensors, where: str) -> Any:
    """Return `value` as JSON in which every object is a tagged type; its tensors go into `tensors`."""
    if is_fixed(value):
        return _encode_fixed(value)
    if value is None or (isinstance(value, bool | str) and not isinstance(value, Enum)) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, TensorCopy | Composite | Count):
        return tensors.once(value, where)
    if type(value) in (dict, OrderedDict, Counter) or _is_default_dict(value):
        tag = type(value).__name__ if type(value) in (OrderedDict, Counter) else "dict"
        pairs = [
            [_encode(k, tensors, where), _encode(v, tensors, f"{where}[{k!r}]")] for k, v in value.items()
        ]
        return {tag: pairs}
    if type(value) is deque:
        return {"deque": [_encode(v, tensors, where) for v in value], "maxlen": value.maxlen}
    if type(value) is tuple and all(type(v) is int for v in value):  # the state of Python's generator, say
        return {"tuple": list(value)}
    if type(value) in (list, tuple, set, frozenset, torch.Size):
        items = [_encode(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]
        return items if type(value) is list else {type(value).__name__: items}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and np.isfinite(value).all():
        return {"ndarray": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, np.ndarray) and is_plain(value):
        dtype = np.lib.format.dtype_to_descr(value.dtype)  # type: ignore[no-untyped-call]
        return {"memory": value.tobytes().hex(), "dtype": dtype, "shape": list(value.shape)}
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {"scalar": _encode(value.item(), tensors, where), "dtype": str(value.dtype)}
    if type(value) in (bytes, bytearray):
        return {type(value).__name__: value.hex()}
    if type(value) is complex:
        return {"complex": [_encode(part, tensors, where) for part in (value.real, value.imag)]}
    if type(value) in (range, slice):
        return {type(value).__name__: [value.start, value.stop, value.step]}
    if isinstance(value, np.dtype) and not value.hasobject and value.names is None:
        return {"dtype of numpy": value.str}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    raise CheckpointError(
        f"{where}: a {type(value).__module__}.{type(value).__qualname__} cannot be written as safetensors and JSON, "
        "so this run cannot be resumed from disk; leave run_dir out, or keep plain data there."
    )


def _encode_fixed(value: Any) -> dict[str, Any]:
    kind = type(value)
    if isinstance(value, Enum):
        by_name = value.name in kind.__members__  # what of flags is put together has no name of its own
        return {"member": [kind.__module__, kind.__qualname__, value.name if by_name else value.value]}
    if kind is timedelta:
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    return {
        "fixed": kind.__name__,
        "text": value.isoformat() if isinstance(value, date | time) else str(value),
    }


def _decode_member(module: str, name: str, member: Any) -> Any:
    kind = class_at(module, name)
    if kind is None or not issubclass(kind, Enum):
        raise CheckpointError(f"{module}.{name}: is in the checkpoint, and no enumeration in this process.")
    return kind[member] if isinstance(member, str) and member in kind.__members__ else kind(member)


def _decode_fixed(name: str, text: str) -> Any:
    kind: Any = next(kind for kind in FIXED if kind.__name__ == name)
    return kind.fromisoformat(text) if issubclass(kind, date | time) else kind(text)


def _is_default_dict(value: Any) -> bool:
    return isinstance(value, dict) and type(value).__name__ == "defaultdict"


def _encode_tensor(kept: TensorCopy, tensors: _Tensors, where: str) -> dict[str, Any]:
    data = kept.data
    if data.layout == torch.sparse_coo:
        parts = [tensors.add(data._indices()), tensors.add(data._values())]
        form = {"shape": list(data.shape), "coalesced": data.is_coalesced()}
        return {"sparse": parts, "device": str(kept.device), **form}
    if data.layout != torch.strided:
        raise CheckpointError(f"{where}: a {data.layout} tensor cannot be written; leave run_dir out.")
    encoded: dict[str, Any] = {"tensor": tensors.add(data), "device": str(kept.device)}
    if kept.grad is not None:
        encoded["grad"] = _encode_tensor(kept.grad, tensors, f"{where}.grad")
    if not data.is_contiguous():
        encoded["stride"] = list(data.stride())
    if kept.sharding is not None:
        encoded["sharding"] = _encode_sharding(kept.sharding, where)
    return encoded


def _encode_composite(kept: Composite, tensors: _Tensors, where: str) -> dict[str, Any]:
    if kept.kind not in torch.serialization.get_safe_globals():
        raise CheckpointError(
            f"{where}: a {kept.kind.__name__} cannot be written, for its package has not named it to torch as safe to "
            "load (torch.serialization.add_safe_globals); leave run_dir out."
        )
    parts = {name: _encode(part, tensors, f"{where}.{name}") for name, part in kept.parts.items()}
    form = {"shape": list(kept.shape), "stride": list(kept.stride)}
    return {
        "composite": _full_name(kept.kind),
        "parts": parts,
        "context": _encode(kept.context, tensors, where),
        **form,
    }


def _full_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _decode_composite(name: str, values: dict[str, Any], read: _Read) -> Composite:
    known = {_full_name(k): k for k in torch.serialization.get_safe_globals() if isinstance(k, type)}
    if name not in known:
        raise CheckpointError(f"{name}: is in the checkpoint, and its package has not been imported here.")
    parts = {key: _decode(part, read) for key, part in values["parts"].items()}
    context = _decode(values["context"], read)
    return Composite(known[name], parts, context, tuple(values["shape"]), tuple(values["stride"]))


def _encode_sharding(sharding: Sharding, where: str) -> dict[str, Any]:
    dims: list[int | None] = []
    for placement in sharding.placements:
        if type(placement).__name__ not in ("Shard", "Replicate"):
            raise CheckpointError(
                f"{where}: a tensor placed by {placement} cannot be written; leave run_dir out."
            )
        dims.append(getattr(placement, "dim", None))
    return {"dims": dims, "shape": list(sharding.shape), "stride": list(sharding.stride)}


def _decode(value: Any, read: _Read) -> Any:
    if isinstance(value, list):
        return [_decode(v, read) for v in value]
    if not isinstance(value, dict):
        return value
    (tag, body), *options = value.items()
    extra = dict(options)
    if tag == "tensor":
        return read.once(value, lambda: _decode_tensor(read.tensor(body), extra, read))
    if tag == "sparse":
        form, coalesced = extra["shape"], extra["coalesced"]
        indices, values = map(read.tensor, body)
        data = torch.sparse_coo_tensor(indices, values, form, is_coalesced=coalesced, check_invariants=True)
        return TensorCopy(data, torch.device(extra["device"]))
    if tag == "composite":
        return read.once(value, lambda: _decode_composite(body, extra, read))
    if tag == "count":
        return read.once(value, lambda: Count(*(_decode(v, read) for v in body)))
    if tag in ("dict", "OrderedDict", "Counter"):
        kind = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}[tag]
        return kind({_decode(k, read): _decode(v, read) for k, v in body})
    if tag == "deque":
        return deque((_decode(v, read) for v in body), extra["maxlen"])
    if tag == "tuple" and all(type(v) is int for v in body):
        return tuple(body)
    if tag in _COLLECTIONS:
        return _COLLECTIONS[tag](_decode(v, read) for v in body)
    plain: dict[str, Callable[[], Any]] = {
        "member": lambda: _decode_member(*body),
        "timedelta": lambda: timedelta(*body),
        "fixed": lambda: _decode_fixed(body, extra["text"]),
        "float": lambda: float(body),
        "bytes": lambda: bytes.fromhex(body),
        "bytearray": lambda: bytearray.fromhex(body),
        "complex": lambda: complex(*(_decode(part, read) for part in body)),
        "range": lambda: range(*body),
        "slice": lambda: slice(*body),
        "ndarray": lambda: np.array(body, dtype=extra["dtype"]),
        "memory": lambda: _array(bytearray.fromhex(body), extra),
        "scalar": lambda: np.dtype(extra["dtype"]).type(_decode(body, read)),
        "dtype of numpy": lambda: np.dtype(body),
        "dtype": lambda: getattr(torch, body),
        "device": lambda: torch.device(body),
    }
    return plain[tag]()


def _array(memory: bytearray, extra: dict[str, Any]) -> np.ndarray:
    """Return an array whose type may be one of records."""

    def fields(dtype: Any) -> Any:
        if isinstance(dtype, str):
            return dtype
        return [(name, fields(inner), *map(tuple, shape)) for name, inner, *shape in dtype]

    dtype = np.lib.format.descr_to_dtype(fields(extra["dtype"]))  # type: ignore[no-untyped-call]
    return np.frombuffer(memory, dtype).reshape(extra["shape"])


def _decode_tensor(data: torch.Tensor, extra: dict[str, Any], read: _Read) -> TensorCopy:
    stride = extra.get("stride")
    # A tensor whose elements overlap (an expanded one) was written out in full and stays so.
    if stride is not None and 0 not in stride:
        data = torch.empty_strided(data.shape, stride, dtype=data.dtype).copy_(data)
    sharding = _decode_sharding(extra["sharding"]) if "sharding" in extra else None
    grad = _decode(extra["grad"], read) if "grad" in extra else None
    return TensorCopy(data, torch.device(extra["device"]), sharding, grad)


def _decode_sharding(values: dict[str, Any]) -> Sharding:
    from torch.distributed.tensor import Replicate, Shard  # slow to import, and only where tensors are spread

    placements = tuple(Replicate() if dim is None else Shard(dim) for dim in values["dims"])
    return Sharding(None, placements, tuple(values["shape"]), tuple(values["stride"]))
