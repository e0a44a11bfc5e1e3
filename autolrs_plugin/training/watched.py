"""What a step may change and nobody can set back: seen by what tells how far it has come."""

import bz2
import contextlib
import ctypes
import decimal
import gc
import hashlib
import hmac
import io
import json
import lzma
import os
import queue
import warnings
import zlib
from collections.abc import Iterator, Mapping
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any

import numpy as np
import torch

from autolrs_plugin.training.databases import database_seen, is_cursor, is_database, rows_left
from autolrs_plugin.training.fingerprint import tensor_digest
from autolrs_plugin.training.handed import ELSEWHERE
from autolrs_plugin.training.items import buffer_of
from autolrs_plugin.training.libraries import is_users
from autolrs_plugin.training.plain import ATOMS, CONTAINERS, attributes_of, count_at, is_plain
from autolrs_plugin.training.rng import GENERATORS, state_of
from autolrs_plugin.training.slots import held

DEEP = 8
"""How deep iterators inside of iterators are looked into."""

AT_ONCE = 2**16
"""Items of a container that are read at a time."""

FEW = 64
"""Most numbers of a tensor in a batch that are read."""

BYTES, SAMPLED = 2**31, 2**24
"""Bytes of tensors and arrays that are read in all; of an array beyond that, a part of the second size."""


_COMPRESSORS: tuple[Any, ...] = (
    *(type(zlib.compressobj()), type(zlib.decompressobj())),
    *(bz2.BZ2Compressor, bz2.BZ2Decompressor, lzma.LZMACompressor, lzma.LZMADecompressor),
)
"""Only their own memory tells how far they have come: it has the counts of bytes that went in and came out."""

_CALLABLE_ITERATOR = type(iter(int, 1))

RUNNING: tuple[Any, ...] = (
    *{type(hashlib.new(name)) for name in hashlib.algorithms_guaranteed},
    *(hashlib.blake2b, hashlib.blake2s, hmac.HMAC, *_COMPRESSORS),
)
"""Hashes, of which a copy tells how far they have come, and compressors: they take in, and cannot be set back."""


def position(iterator: Any, depth: int = 0) -> Any:
    """Return what tells how far an iterator has come; a new object each time where nothing does."""
    if isinstance(iterator, _COMPRESSORS):
        return _memory_of(iterator)
    if isinstance(iterator, RUNNING):
        return _taken_in(iterator.copy())
    if isinstance(iterator, io.IOBase):
        return _place_in(iterator)
    if is_database(iterator):
        return database_seen(iterator)
    if is_cursor(iterator):
        return object() if rows_left(iterator) else None
    if type(iterator).__module__.startswith(ELSEWHERE):
        return _in_another_process(iterator)
    if isinstance(iterator, np.random.SeedSequence):
        return iterator.n_children_spawned
    if isinstance(iterator, GeneratorType | CoroutineType | AsyncGeneratorType):
        return _frame(iterator, depth)
    if hasattr(iterator, "_num_yielded"):  # a DataLoader's
        return iterator._num_yielded
    seen: list[Any] = []
    for name in ("line_num", "index", "iterindex"):  # of a csv.reader and of numpy's iterators
        with contextlib.suppress(ValueError):  # a numpy.nditer has an index only if asked for one
            if isinstance(value := getattr(iterator, name, None), int):
                seen.append(value)
    if " object at 0x" not in (text := repr(iterator)):  # as itertools.count says where it is
        seen.append(text)
    elif (hint := getattr(iterator, "__length_hint__", None)) is not None:
        seen.append(hint())
    if attributes := attributes_of(iterator):
        seen.append({name: _visible(value) for name, value in attributes.items()})
    seen += [position(i, depth + 1) for i in _inside(iterator) if depth < DEEP]
    if not seen or type(iterator).__module__ == "itertools":
        seen.append(_reduced(iterator))
    return seen


def _in_another_process(proxy: Any) -> Any:
    """Return what a manager's process holds for a proxy, where it gives that out."""
    if not hasattr(proxy, "_getvalue"):
        return None
    try:
        value = proxy._getvalue()
    except Exception:  # whatever the other process says
        return None
    return value if is_plain(value) else attributes_of(value)


def _memory_of(thing: Any) -> bytes:
    """Return what an object of C has in its own memory, after what every object has."""
    begin = object.__basicsize__
    return ctypes.string_at(id(thing) + begin, type(thing).__basicsize__ - begin)


def _taken_in(copy: Any) -> Any:
    return copy.digest(32) if copy.name.startswith("shake") else copy.digest()


def called_by(iterator: Any) -> Any:
    """Return the function that `iter(function, sentinel)` calls; None for other iterators."""
    if not isinstance(iterator, _CALLABLE_ITERATOR):
        return None
    parts = iterator.__reduce__()[1]
    return parts[0] if len(parts) == 2 else None


def _frame(generator: Any, depth: int) -> Any:
    prefix = next(p for p in ("gi", "cr", "ag") if hasattr(generator, f"{p}_frame"))
    frame = getattr(generator, f"{prefix}_frame")
    if frame is None:
        return None
    inside = [position(i, depth + 1) for i in _inside(generator) if depth < DEEP]
    return {"at": frame.f_lasti, "inside": inside, **{k: _visible(v) for k, v in frame.f_locals.items()}}


def _inside(iterator: Any) -> list[Any]:
    """Return the iterators that an iterator draws from: also those that no variable holds."""
    found: list[Any] = []
    for thing in [*gc.get_referents(iterator), *attributes_of(iterator).values()]:
        parts = thing if isinstance(thing, tuple) else (thing,)
        found += [part for part in parts if isinstance(part, Iterator) and part is not iterator]
    return found


def _reduced(iterator: Any) -> Any:
    """Return what an iterator of Python's own would be copied as, where it can be; otherwise a new object."""
    if not any("__reduce__" in vars(kind) for kind in type(iterator).__mro__[:-1]):
        return object()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it goes out of use with Python 3.14
        try:
            return [_part(part) for part in _flat(iterator.__reduce__())]
        except TypeError:
            return object()


def _part(value: Any) -> Any:
    if isinstance(value, ATOMS):
        return value
    if isinstance(value, list):
        return len(value)
    return position(value, DEEP) if isinstance(value, Iterator) else type(value).__name__


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _place_in(file: Any) -> Any:
    """Return how far a file has been read; of one that is written to at its end, a log, nothing."""
    if file.closed:
        return "closed"
    if not file.readable() or not file.seekable():
        return None
    try:
        place = file.tell()
        if file.writable() and place >= os.fstat(file.fileno()).st_size:
            return None
    except OSError:  # a text does not tell while one goes through its lines; some files have no number
        return None if file.writable() and not isinstance(file, io.TextIOBase) else object()
    return place


def _visible(value: Any) -> Any:
    """Return of a variable what can be compared: plain values and queues by their content, others by identity."""
    if isinstance(value, queue.Queue):  # of a thread that reads ahead
        return [batch_seen(item) for item in list(value.queue)]
    return value if is_plain(value) else id(value)


def batch_seen(batch: Any, seen: int = 0, depth: int = 0) -> int:
    """Return a number that tells a batch from others, whatever it holds: by a few numbers of each tensor and array.

    Args:
        batch: the batch.
        seen: the number of the batches before it.
        depth: of containers and objects around it.
    """
    if isinstance(batch, torch.Tensor) and batch.layout == torch.strided and not batch.is_nested:
        flat = batch.detach().reshape(-1)
        few = flat[:: 1 + flat.numel() // FEW].cpu().contiguous()
        return zlib.crc32(f"{tuple(batch.shape)}{few.tolist()}".encode(), seen)
    if isinstance(batch, np.ndarray) and not batch.dtype.hasobject:
        few = batch.reshape(-1)[:: 1 + batch.size // FEW]
        return zlib.crc32(f"{batch.shape}{few.tolist()}".encode(), seen)
    if isinstance(batch, ATOMS):
        return zlib.crc32(repr(batch).encode(), seen)
    inside: Any = batch if isinstance(batch, (*CONTAINERS, Mapping)) else attributes_of(batch)
    if isinstance(inside, set | frozenset):
        inside = sorted(inside, key=repr)
    for item in list(inside.items() if isinstance(inside, Mapping) else inside):
        seen = batch_seen(item, seen, depth + 1) if depth < DEEP else seen
    return zlib.crc32(type(batch).__name__.encode(), seen)


def data_seen(value: Any) -> int:
    """Return a number that changes when data does.

    All of it is read, up to `BYTES`, about half a second for a GiB, and that twice for a search. Of tensors beyond that
    torch's own count of writes is taken, and of arrays a part: what a step writes into them at few places may pass.
    """
    left, digest = [BYTES], 0
    for leaf in _leaves(value, left):
        digest = zlib.crc32(leaf, digest)
    return digest


def _leaves(value: Any, left: list[int], depth: int = 0) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        left[0] -= _bytes_in(value)
        read = left[0] >= 0 or value.layout != torch.strided
        yield f"{tensor_digest(value) if read else (value._version, value.data_ptr())}".encode()
    elif isinstance(value, np.ndarray):
        yield from _of_array(value, left)
    elif isinstance(value, CONTAINERS):
        items = list(value.items()) if isinstance(value, dict) else list(value)
        yield f"{type(value).__name__} {len(items)}".encode()
        if isinstance(value, set | frozenset):
            items.sort(key=repr)
        for begin in range(0, len(items), AT_ONCE):
            part = items[begin : begin + AT_ONCE]
            try:
                yield json.dumps(part).encode()
            except (TypeError, ValueError):  # not of numbers and texts alone
                for item in part:
                    yield from _leaves(item, left, depth + 1)
    elif (memory := buffer_of(value)) is not None:
        yield memory.cast("B")
    elif isinstance(value, GENERATORS):
        yield repr(state_of(value)).encode()
    elif depth < DEEP and (is_users(type(value)) or attributes_of(value)):
        for item in held(value).items():
            yield from _leaves(item, left, depth + 1)
    else:
        told = isinstance(value, ATOMS) or count_at(value) is not None
        yield (repr(value) if told else type(value).__name__).encode()


def _bytes_in(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size() if tensor.layout == torch.strided else 0


def _of_array(array: np.ndarray, left: list[int]) -> Iterator[Any]:
    if array.dtype.hasobject:
        yield from _leaves(array.tolist(), left, DEEP)
    elif isinstance(array, np.memmap) and array.mode == "r":  # nobody writes to it here
        yield b""
    else:
        left[0] -= array.nbytes
        flat = np.ascontiguousarray(
            array if left[0] >= 0 else array.reshape(-1)[:: 1 + array.nbytes // SAMPLED]
        )
        yield flat.reshape(-1).view(np.uint8) if flat.size else b""


_DENORMAL = torch.tensor(1e-310, dtype=torch.float64)
"""A number that is 0 where such are flushed, which nothing else tells."""


def _of_products(matmul: Any) -> tuple[Any, ...]:
    return matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction


def switches() -> dict[str, str]:
    """Return the settings of the process or the thread that a step may turn on or off."""
    backends, context = torch.backends, decimal.getcontext()
    kinds = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")
    attention = [getattr(backends.cuda, f"{kind}_enabled")() for kind in kinds]
    return {
        "torch.get_default_dtype()": str(torch.get_default_dtype()),
        "torch.is_grad_enabled()": str(torch.is_grad_enabled()),
        "torch.is_inference_mode_enabled()": str(torch.is_inference_mode_enabled()),
        "torch.is_autocast_enabled()": str([torch.is_autocast_enabled(d) for d in ("cpu", "cuda")]),
        "torch.get_autocast_dtype()": str([torch.get_autocast_dtype(d) for d in ("cpu", "cuda")]),
        "torch.get_flush_denormal": str((_DENORMAL * 1).item() == 0),
        "torch.backends.opt_einsum": str((backends.opt_einsum.enabled, backends.opt_einsum.strategy)),
        "torch.backends.mha.get_fastpath_enabled()": str(backends.mha.get_fastpath_enabled()),
        "torch.backends.mkldnn, nnpack": str(
            (torch._C._get_mkldnn_enabled(), torch._C._get_nnpack_enabled())
        ),
        "torch.backends.cuda.matmul": str(_of_products(backends.cuda.matmul)),
        "torch.is_deterministic_algorithms_warn_only_enabled()": str(
            torch.is_deterministic_algorithms_warn_only_enabled()
        ),
        "torch.are_deterministic_algorithms_enabled()": str(torch.are_deterministic_algorithms_enabled()),
        "torch.is_anomaly_enabled()": str(torch.is_anomaly_enabled()),
        "torch.get_num_threads()": str(torch.get_num_threads()),
        "torch.get_default_device()": str(torch.get_default_device()),
        "torch.backends.cuda.flash_sdp_enabled(), mem_efficient_sdp_enabled(), ...": str(attention),
        "numpy.geterr()": str(np.geterr()),
        "decimal.getcontext()": repr(context).partition(", flags")[0],
        "os.getcwd()": _present_folder(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.backends.cudnn": str(
            (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic)
        ),
    }


def _present_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # somebody has removed it, which ends no training
        return ""


_ENTERED = {
    "torch.is_grad_enabled()",
    "torch.is_inference_mode_enabled()",
    "torch.is_autocast_enabled()",
    "torch.get_autocast_dtype()",
    "torch.is_anomaly_enabled()",
    "torch.get_default_device()",
    "numpy.geterr()",
}
"""Settings that a with statement around the whole run may have: one around its construction need not be the same."""


def lasting_switches() -> dict[str, str]:
    """Return the settings that last: another process goes on with a run under the same ones."""
    return {name: value for name, value in switches().items() if name not in _ENTERED}
