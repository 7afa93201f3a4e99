"""The safetensors layout: where in a file each tensor's bytes lie.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes
without gaps. The library reads whole tensors; streaming needs offsets, which it does not give.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from past_ray.errors import SkillVectorError, StorageError
from past_ray.locations import RandomAccessFile

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit; a larger length is a damaged file, not a header."""

FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights may be stored in: each of these fits into float32 without loss."""

_OTHER_DTYPES = {"I64": torch.int64}
_DTYPES = FLOAT_DTYPES | _OTHER_DTYPES
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Example: ``StoredTensor(dtype="BF16", shape=(2, 3), offset=128)`` occupies bytes 128 to 140.
    """

    dtype: str
    """As the header names it: ``F32``, ``BF16``, ``F16``, ``I8`` and so on."""

    shape: tuple[int, ...]
    """Sizes along its axes; ``()`` is a scalar."""

    offset: int
    """Of its first byte from the start of the file."""

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype, if weights may have it.

        Raises:
            SkillVectorError: Another one.
        """
        if self.dtype not in _DTYPES:
            raise SkillVectorError(
                f"weights must be stored in one of {', '.join(FLOAT_DTYPES)}, found {self.dtype}."
                " Use the checkpoint from before quantisation, or convert float64 to float32."
            )
        return _DTYPES[self.dtype]


def read_header(file: RandomAccessFile, label: str) -> dict[str, StoredTensor]:
    """Return the tensors of an open safetensors file, checked against the file's size.

    Args:
        file: Open file.
        label: What messages call it.

    Raises:
        StorageError: The file is truncated, or its header is damaged.
    """
    if file.size < 8:
        raise _damaged(label, f"it has {file.size} bytes")
    length = int.from_bytes(_read(file, 0, 8), "little")
    if length > min(MAX_HEADER_BYTES, file.size - 8):
        raise _damaged(label, f"its header claims {length} bytes of {file.size}")
    try:
        header: Any = json.loads(_read(file, 8, length))
        tensors = {
            name: _stored_tensor(entry, data_start=8 + length)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise _damaged(label, f"its header is no tensor table ({error})") from error
    _check_layout(tensors, label=label, data_start=8 + length, size=file.size)
    return tensors


def lay_out(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> tuple[bytes, dict[str, StoredTensor]]:
    """Return the first bytes of a file that holds these tensors, and where each one goes.

    Wide dtypes come first, so that every tensor starts at a multiple of its item size; names are
    sorted within a dtype. The same tensors always give the same bytes.
    """
    ordered = sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        start, end = end, end + math.prod(shapes[name]) * dtypes[name].itemsize
        entries[name] = {
            "dtype": _CODES[dtypes[name]],
            "shape": list(shapes[name]),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    stored = {
        name: StoredTensor(
            dtype=entries[name]["dtype"],
            shape=tuple(shapes[name]),
            offset=data_start + entries[name]["data_offsets"][0],
        )
        for name in ordered
    }
    return len(text).to_bytes(8, "little") + text, stored


def num_bytes(tensor: StoredTensor) -> int:
    """Bytes that a tensor occupies, from the bits in its dtype's name; ``BOOL`` names none."""
    digits = "".join(c for c in tensor.dtype.split("_")[0] if c.isdigit())
    return tensor.numel * int(digits or 8) // 8


def _read(file: RandomAccessFile, offset: int, count: int) -> bytes:
    buffer = bytearray(count)
    file.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def _stored_tensor(entry: Mapping[str, Any], *, data_start: int) -> StoredTensor:
    start, stop = (int(bound) for bound in entry["data_offsets"])
    shape = tuple(int(size) for size in cast(Sequence[Any], entry["shape"]))
    tensor = StoredTensor(dtype=str(entry["dtype"]), shape=shape, offset=data_start + start)
    if min((*shape, start), default=0) < 0 or stop - start != num_bytes(tensor):
        raise ValueError(f"{tensor.dtype}{list(shape)} does not fill bytes {start} to {stop}")
    return tensor


def _check_layout(
    tensors: Mapping[str, StoredTensor], *, label: str, data_start: int, size: int
) -> None:
    """Refuse gaps, overlaps and a file that ends early or late."""
    end = data_start
    for name in sorted(tensors, key=lambda name: (tensors[name].offset, num_bytes(tensors[name]))):
        tensor = tensors[name]
        if tensor.offset != end:
            raise _damaged(label, f"{name} starts at byte {tensor.offset} instead of {end}")
        end += num_bytes(tensor)
    if end != size:
        raise _damaged(label, f"its header describes {end} bytes and the file has {size}")


def _damaged(label: str, found: str) -> StorageError:
    return StorageError(
        f"{label} must be a complete safetensors file, but {found}. Copy or train it again."
    )
