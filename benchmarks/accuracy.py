"""How far an injected checkpoint is from ``target + (rl - sft)`` in float64, rounded once."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

CHUNK = 4_000_000
"""Numbers compared at a time; float64 temporaries of this size stay in the cache."""

DROPPED_BITS = {torch.bfloat16: 45, torch.float32: 29}
"""Mantissa bits that a float64 has more than the dtype."""

SAME_SIZE = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass(kw_only=True)
class Deviation:
    """Differences between a result and the float64 reference."""

    elements: int = 0
    """Numbers compared."""

    off: int = 0
    """Numbers that are not the reference."""

    max_abs: float = 0.0
    """Largest absolute difference."""

    max_steps: int = 0
    """Largest difference counted in neighbouring numbers of the dtype."""

    def is_right(self) -> bool:
        """Tell whether only a second rounding can explain the differences."""
        return self.max_steps <= 1 and self.off <= 1e-3 * self.elements


def compare(out: Path, parents: Mapping[str, Path], *, every: int = 1) -> Deviation:
    """Compare every ``every``-th tensor of ``out``, sorted by name.

    Raises:
        ValueError: A tensor is missing, superfluous, or not in the target's dtype.
    """
    deviation = Deviation()
    with ExitStack() as stack:
        results = _open(out, stack)
        rl, sft, target = (_open(parents[name], stack) for name in ("rl", "sft", "target"))
        if results.keys() != target.keys():
            raise ValueError(f"{out} must hold the tensors of {parents['target']}")
        for name in sorted(target)[::every]:
            readers = (results[name], rl[name], sft[name], target[name])
            for parts in _chunks([reader.get_tensor(name) for reader in readers]):
                _add(deviation, *parts)
    return deviation


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to ``dtype``, half to even.

    ``exact.to(torch.bfloat16)`` goes through float32 and so rounds twice. Here the mantissa is cut
    as an integer, which holds for the normal numbers of ``dtype``.
    """
    bits, dropped = exact.view(torch.int64), DROPPED_BITS[dtype]
    odd = (bits >> dropped) & 1
    rounded = (bits + odd + (1 << (dropped - 1)) - 1) & -(1 << dropped)
    return rounded.view(torch.float64).to(dtype)


def _add(deviation: Deviation, result: Tensor, rl: Tensor, sft: Tensor, target: Tensor) -> None:
    if result.dtype != target.dtype:
        raise ValueError(f"the result must be {target.dtype}, got {result.dtype}")
    wanted = round_once(target.double() + (rl.double() - sft.double()), result.dtype)
    deviation.elements += result.numel()
    if off := int(torch.count_nonzero(result != wanted)):
        deviation.off += off
        difference = float((result.double() - wanted.double()).abs().max())
        steps = int((_rank(result) - _rank(wanted)).abs().max())
        deviation.max_abs = max(deviation.max_abs, difference)
        deviation.max_steps = max(deviation.max_steps, steps)


def _rank(values: Tensor) -> Tensor:
    """Number the dtype's values in ascending order, both zeros as 0."""
    bits = values.view(SAME_SIZE[values.dtype]).long()
    lowest = torch.iinfo(SAME_SIZE[values.dtype]).min
    return torch.where(bits < 0, lowest - bits, bits)


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Return the open file of every tensor."""
    files = [
        stack.enter_context(safe_open(file, framework="pt"))
        for file in sorted(folder.glob("*.safetensors"))
    ]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def _chunks(tensors: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    yield from zip(*(tensor.flatten().split(CHUNK) for tensor in tensors), strict=True)
