"""The fixed grid on which tensors are hashed and summed.

A flattened tensor is cut into blocks of ``BLOCK`` entries. Digests and sums are taken block by
block and then put together in order, so they do not depend on how a tensor was cut into chunks for
reading, on the number of threads, or on shards.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

BLOCK = 1 << 18
"""Entries of one block: 1 MiB in float32, so that a block stays in a core's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Entries ``start`` to ``stop`` of a flattened tensor; both on the grid or the tensor's end."""

    name: str
    """Which tensor."""

    start: int
    """First entry, a multiple of ``BLOCK``."""

    stop: int
    """One past the last entry."""

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.stop - self.start


@dataclass(slots=True, kw_only=True)
class Measures:
    """What is found out about a chunk, and then about a tensor, while it streams past.

    Example: ``Measures(sums={"square": [0.5, 0.25]})`` of two blocks.
    """

    digests: dict[str, tuple[torch.dtype, bytes]] = field(default_factory=dict)
    """Dtype, and digests of the blocks in order, concatenated, by what was hashed."""

    sums: dict[str, list[float]] = field(default_factory=dict)
    """Sums over each block in order, by what was summed."""

    corrections: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Pairs of entry numbers ``[n]`` int64 and corrections ``[n]`` float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTotals:
    """``Measures`` of a whole tensor."""

    digests: dict[str, str]
    """Digest of the tensor, by what was hashed."""

    sums: dict[str, float]
    """Exactly rounded sum of the blocks' sums, by what was summed."""

    corrections: tuple[Tensor, Tensor] | None
    """Entry numbers ``[n]`` in order and their corrections ``[n]``; None without any."""


class Workspace:
    """Buffers of one thread, allocated once and reused from chunk to chunk."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, role: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised ``[numel]`` buffer; the same memory for the same role."""
        buffer = self._buffers.get((role, dtype))
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[role, dtype] = torch.empty(numel, dtype=dtype)
        return buffer[:numel]


def cut(shapes: Mapping[str, tuple[int, ...]], *, chunk_blocks: int) -> Iterator[Chunk]:
    """Yield the chunks of all tensors in order; a tensor without entries has one empty chunk."""
    for name, shape in shapes.items():
        numel = math.prod(shape)
        for start in range(0, max(numel, 1), chunk_blocks * BLOCK):
            yield Chunk(name=name, start=start, stop=min(start + chunk_blocks * BLOCK, numel))


def blocks(values: Tensor) -> Iterable[Tensor]:
    """Cut ``[n]`` entries that start on the grid into blocks."""
    return values.split(BLOCK) if values.numel() else ()


def block_digests(values: Tensor) -> tuple[torch.dtype, bytes]:
    """Return the dtype of ``[n]`` entries and the BLAKE3 digests of their blocks, concatenated."""
    return values.dtype, b"".join(blake3(_bytes(block)).digest() for block in blocks(values))


def inner_product(left: Tensor, right: Tensor) -> float:
    """Return the sum of products of two float32 tensors of one shape, accumulated in float64.

    By NumPy's pairwise sum: the last digits of a BLAS dot product depend on its number of threads.
    """
    products = left.reshape(-1).double().numpy() * right.reshape(-1).double().numpy()
    return float(np.add.reduce(products))


def tensor_digest(dtype: torch.dtype, shape: tuple[int, ...], digests: bytes) -> str:
    """Return a tensor's digest: BLAKE3 over dtype, shape and the digests of its blocks."""
    name = str(dtype).removeprefix("torch.")
    return blake3(f"{name}\0{list(shape)}\0".encode() + digests).hexdigest()


def digests_of(totals: Mapping[str, TensorTotals], key: str) -> dict[str, str]:
    """Return the digests called ``key`` of the tensors that have one."""
    return {n: total.digests[key] for n, total in totals.items() if key in total.digests}


def weights_hash(digests: Mapping[str, str]) -> str:
    """Return the hash of a set of tensors: BLAKE3 over sorted names and their digests."""
    text = "".join(f"{name}\0{digests[name]}\n" for name in sorted(digests))
    return blake3(text.encode()).hexdigest()


def digest_of(tensor: Tensor) -> str:
    """Return what streaming gives for a tensor that is in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    dtype, digests = block_digests(flat)
    return tensor_digest(dtype, tuple(tensor.shape), digests)


def _bytes(block: Tensor) -> memoryview:
    return block.view(torch.uint8).numpy().data
