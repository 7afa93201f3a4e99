"""Weights as they pass Ray's object store: one copy in, none out.

Pickled alone, a torch tensor is written through several temporary copies. NumPy arrays leave the
pickle as they are (protocol 5, out of band): Ray copies their memory into the store once, and who
gets them reads it there.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class SharedWeights(Mapping[str, Tensor]):
    """Tensors by name. After a transfer they are views of shared memory: read them, never write."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors, without a copy where they are contiguous on the CPU."""
        self._tensors = {
            name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        """Hand all memory to pickle as NumPy arrays of bytes, which every dtype can be read as."""
        arrays: list[np.ndarray[Any, Any]] = [
            tensor.view(-1).view(torch.uint8).numpy() for tensor in self._tensors.values()
        ]
        described = [
            (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()
        ]
        return _rebuilt, (described, arrays)


def _rebuilt(
    described: list[tuple[str, torch.dtype, tuple[int, ...]]],
    arrays: list["np.ndarray[Any, Any]"],
) -> SharedWeights:
    tensors: dict[str, Tensor] = {}
    with warnings.catch_warnings():
        # The memory is read-only, and nothing writes to weights that were received.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        for (name, dtype, shape), array in zip(described, arrays, strict=True):
            tensors[name] = torch.frombuffer(array, dtype=dtype).view(shape)
    return SharedWeights(tensors)
