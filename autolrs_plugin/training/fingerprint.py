"""Fingerprints: of the weights, for every action; and of everything that is reached, to see that nothing was missed."""

import ctypes
import hashlib
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from autolrs_plugin.training.plain import BUFFERS
from autolrs_plugin.training.tree import Composite, TensorCopy, plain_tensors

SHORT = 200
"""Characters of a value that are in its digest as they are."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_fingerprint(trainable: Mapping[str, torch.Tensor], frozen: Mapping[str, torch.Tensor]) -> str:
    """Return a few bytes that change when a weight does: cheap enough for every action.

    Trainable parameters count by the sum of their bits as integers, frozen ones by torch's count of writes.
    """
    sums = [_bit_sum(part) for p in trainable.values() for part in plain_tensors(p)]
    digest = hashlib.sha256()
    for device in dict.fromkeys(s.device for s in sums):
        digest.update(repr(torch.stack([s for s in sums if s.device == device]).tolist()).encode())
    digest.update(repr([(p._version, p.data_ptr()) for p in frozen.values()]).encode())
    return digest.hexdigest()[:16]


def weights_digest(parameters: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and every bit of `parameters`."""
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        for part in plain_tensors(parameter):
            with _bytes_of(part) as data:
                digest.update(data)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Return a digest of a value's types and bits, by its content and not by its identity."""
    return hashlib.sha256("\n".join(f"{k} {v}" for k, v in leaves("", value)).encode()).hexdigest()[:16]


def leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the path to every leaf of nested state, with a digest of it."""
    if isinstance(value, TensorCopy):
        if value.grad is not None:
            yield from leaves(f"{path}.grad", value.grad)
        value = value.data
    if isinstance(value, Composite):
        yield path, f"{value.kind.__name__} {value.context!r}"
        value = value.parts
    if isinstance(value, dict):
        yield path, f"{type(value).__name__} {list(map(str, value))}"
        for key, item in value.items():
            yield from leaves(f"{path}[{key!r}]", item)
    elif isinstance(value, list | tuple | deque) and not isinstance(value, torch.Size):
        yield path, f"{type(value).__name__} of {len(value)}"
        for index, item in enumerate(value):
            yield from leaves(f"{path}[{index}]", item)
    elif isinstance(value, set | frozenset):
        yield path, f"{type(value).__name__} {sorted(map(repr, value))}"  # in no order of its own
    elif isinstance(value, torch.Tensor):
        yield path, f"{value.dtype} {tuple(value.shape)} {tensor_digest(value)}"
    elif isinstance(value, np.ndarray):
        yield path, f"{value.dtype} {value.shape} {zlib.crc32(np.ascontiguousarray(value).tobytes())}"
    elif isinstance(value, (bytes, *BUFFERS)):
        yield path, f"{type(value).__name__} {len(value)} {zlib.crc32(value)}"
    else:
        yield path, short(f"{type(value).__name__} {value!r}")


def short(text: str) -> str:
    """Return a text as it is where it is short, and otherwise its beginning with a number that all of it decides."""
    return text if len(text) <= SHORT else f"{text[:SHORT]} {zlib.crc32(text.encode(errors='replace'))}"


def tensor_digest(tensor: torch.Tensor) -> int:
    """Return a number that changes when a bit of a tensor does; on an accelerator, the sum of its bits."""
    parts = list(plain_tensors(tensor))
    if len(parts) > 1:
        return zlib.crc32(repr([tensor_digest(part) for part in parts]).encode())
    tensor = parts[0]
    if tensor.layout in PARTS_OF:
        inner = [getattr(tensor, name)() for name in PARTS_OF[tensor.layout]]
        return zlib.crc32(repr([(tuple(part.shape), tensor_digest(part)) for part in inner]).encode())
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        return int(tensor._version)
    if tensor.device.type != "cpu":
        return int(_bit_sum(tensor))
    with _bytes_of(tensor) as data:
        return zlib.crc32(data)


PARTS_OF = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
"""The methods that give the tensors which a sparse one consists of, by its layout."""


@contextmanager
def _bytes_of(tensor: torch.Tensor) -> Iterator[Any]:
    """Give the bytes of a tensor, which are there inside only."""
    data = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    # Not numpy(), after which nobody can resize the tensor any more.
    yield (ctypes.c_ubyte * data.nbytes).from_address(data.data_ptr()) if data.nbytes else b""


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    integers = tensor.view(_INTEGERS[tensor.element_size()])
    if tensor.is_contiguous() and tensor.element_size() < 8:
        flat = integers.reshape(-1)
        per_word = 8 // tensor.element_size()
        # Whole 64-bit words are summed thirty times as fast as smaller integers, which torch widens first.
        if flat.numel() % per_word == 0 and flat.storage_offset() % per_word == 0 and flat.numel():
            integers = flat.view(torch.int64)
    return integers.sum(dtype=torch.int64)
