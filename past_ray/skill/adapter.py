"""LoRA adapters as skill vectors: pure functions, no files (``adapter_folder`` has those).

An adapter changes a weight by ``scaling * B @ A``, so it is a skill vector in factors: its dense
form can be added to any checkpoint, and a weighted sum of adapters is again an adapter.

Shapes: out and in are those of the weight ``[out, in]``, r is the rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from past_ray.errors import SkillVectorError

VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 accepts as ``max_lora_rank``."""

TILE_ROWS = 256
"""Rows of a weight that are multiplied out together; see ``lora_delta``."""

EXACT_SVD_SIZE = 768
"""Matrices with a side up to this get an exact SVD: 1.6 s for 49152 x 576 on one core."""

NUM_POWER_ITERATIONS = 8
"""Of the randomised SVD. White noise, the worst case, loses 6e-4 of its energy (2: 9e-3)."""

NUM_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """One weight's change, ``scaling * B @ A``."""

    a: Tensor
    """``[r, in]``, PEFT's ``lora_A``."""

    b: Tensor
    """``[out, r]``, PEFT's ``lora_B``."""

    scaling: float
    """``alpha / r``, or ``alpha / sqrt(r)`` with rank-stabilised LoRA."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Columns of B and rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The changed weights of a model.

    Example: ``Adapter(modules={"model.layers.0.self_attn.q_proj.weight": module}, config={})``.
    """

    modules: dict[str, LoraModule]
    """Sorted, by the name that the changed weight has in the base checkpoint."""

    config: dict[str, Any]
    """``adapter_config.json`` as it was read; empty for an adapter that was computed."""


def lora_delta(module: LoraModule, *, rows: slice = slice(None)) -> Tensor:
    """Return ``scaling * B @ A`` in float32, or the rows of it that ``rows`` selects.

    Any slice gives the bits of the whole. A matrix product promises that only for equal shapes, so
    the rows are always multiplied out in the same tiles: 256 from each multiple of 256.

    Args:
        module: The factors, in any floating point dtype.
        rows: Consecutive rows of the result.

    Returns:
        ``[rows, in]``.
    """
    num_rows, num_columns = module.shape
    start, stop, step = rows.indices(num_rows)
    assert step == 1, "rows must be consecutive"
    a = _aligned(module.a)
    delta = torch.empty(max(stop - start, 0), num_columns)
    for top in range(start - start % TILE_ROWS, stop, TILE_ROWS):
        tile = _aligned(module.b[top : top + TILE_ROWS]) @ a
        first, last = max(start, top), min(stop, top + TILE_ROWS)
        delta[first - start : last - start] = tile[first - top : last - top]
    return delta.mul_(module.scaling)


def concatenate(parts: Sequence[tuple[float, Adapter]]) -> Adapter:
    """Return the adapter of ``sum_i weight_i * delta_i``; only its factors are rounded, once.

    ``sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] @ [A_1; A_2; ...]``, so the ranks add
    up. (Adding A's and B's separately, PEFT's ``linear``, brings in every ``B_i A_j``.) Zeros fill
    all modules up to one rank that vLLM accepts; the scaling of the result is 1.

    Args:
        parts: Weights, which may be negative, and adapters, which may change different modules.

    Raises:
        SkillVectorError: Two adapters disagree about a weight's shape, a weight is not finite,
            nothing is changed at all, or the rank exceeds vLLM's largest.
    """
    if not all(math.isfinite(weight) for weight, _ in parts):
        raise SkillVectorError(
            f"weights must be finite numbers, got {[weight for weight, _ in parts]}."
        )
    by_name: dict[str, list[tuple[float, LoraModule]]] = {}
    for weight, adapter in parts:
        for name, module in adapter.modules.items():
            by_name.setdefault(name, []).append((weight, module))
    if not by_name:
        raise SkillVectorError(
            f"adapters must change at least one weight, got {len(parts)} adapters that change none."
        )
    _check_same_shapes(by_name)
    rank = vllm_rank(max(sum(module.rank for _, module in found) for found in by_name.values()))
    modules = {name: _stack(by_name[name], rank=rank) for name in sorted(by_name)}
    return Adapter(modules=modules, config={})


def truncated_svd(matrix: Tensor, *, rank: int) -> tuple[LoraModule, float]:
    """Return the best approximation of a rank, and the share of the matrix's energy that it keeps.

    ``W_r = U_r S_r V_r^T``, as ``B = U_r sqrt(S_r)`` and ``A = sqrt(S_r) V_r^T``. Large matrices
    are first projected on the range that power iterations from a fixed seed find; the energy
    ``|W_r|_F^2 / |W|_F^2 = 1 - |W - W_r|_F^2 / |W|_F^2`` is measured on the matrix in any case.

    Args:
        matrix: ``[out, in]``.
        rank: At least 1; cut to the smaller side of ``matrix``.

    Returns:
        The factors with scaling 1, and the energy in [0, 1]; 1 for a matrix of zeros.

    Raises:
        SkillVectorError: ``rank`` is below 1, or the matrix is not finite.

    Reference:
        Randomised range finder: https://arxiv.org/abs/0909.4061 algorithm 4.4.
    """
    if rank < 1:
        raise SkillVectorError(f"rank must be at least 1, got {rank}.")
    norm = _norm(matrix)
    if not math.isfinite(norm):
        raise SkillVectorError(
            "a matrix must be finite to be approximated, found NaN or infinity in it."
            " Look for the step at which the checkpoint diverged."
        )
    matrix = matrix.float()
    rank = min(rank, *matrix.shape)
    basis = None if min(matrix.shape) <= EXACT_SVD_SIZE else _range_basis(matrix, rank=rank)
    u, s, vh = torch.linalg.svd(matrix if basis is None else basis.T @ matrix, full_matrices=False)
    root = s[:rank].sqrt()
    left = u[:, :rank] if basis is None else basis @ u[:, :rank]
    module = LoraModule(a=root[:, None] * vh[:rank], b=left * root, scaling=1.0)
    return module, 1.0 if norm == 0 else max(0.0, 1 - (_distance(matrix, module) / norm) ** 2)


def vllm_rank(rank: int) -> int:
    """Return the smallest ``max_lora_rank`` of vLLM that holds ``rank``.

    Raises:
        SkillVectorError: There is none.
    """
    if rank > VLLM_LORA_RANKS[-1]:
        raise SkillVectorError(
            f"an adapter's rank must be at most {VLLM_LORA_RANKS[-1]}, the largest that vLLM"
            f" serves, got {rank} (ranks add up when adapters are summed). Sum fewer or smaller"
            " adapters, approximate the sum at a lower rank, or merge it into the model's weights."
        )
    return next(allowed for allowed in VLLM_LORA_RANKS if allowed >= rank)


def _aligned(factor: Tensor) -> Tensor:
    """Copy into fresh float32 memory: a matrix product's bits may depend on the address."""
    return torch.empty(factor.shape).copy_(factor)


def _check_same_shapes(by_name: dict[str, list[tuple[float, LoraModule]]]) -> None:
    shapes = {name: [module.shape for _, module in found] for name, found in by_name.items()}
    offenders = [
        f"{name} {' and '.join(map(str, dict.fromkeys(found)))}"
        for name, found in sorted(shapes.items())
        if len(set(found)) > 1
    ]
    if offenders:
        raise SkillVectorError(
            "adapters that are summed must agree about each weight's shape, found"
            f" {len(offenders)} with several (first: {', '.join(offenders[:NUM_NAMES_SHOWN])})."
            " Use adapters of one base model."
        )


def _stack(found: list[tuple[float, LoraModule]], *, rank: int) -> LoraModule:
    """Lay one weight's factors side by side and fill up with zeros to ``rank``."""
    a = torch.cat([module.a.float() for _, module in found])
    b = torch.cat(
        [(module.b.double() * (weight * module.scaling)).float() for weight, module in found], dim=1
    )
    num_missing = rank - a.shape[0]
    return LoraModule(a=pad(a, (0, 0, 0, num_missing)), b=pad(b, (0, num_missing)), scaling=1.0)


def _range_basis(matrix: Tensor, *, rank: int) -> Tensor:
    """Orthonormal columns ``[out, 2 rank + 10]`` that nearly span the leading left directions."""
    generator = torch.Generator().manual_seed(0)
    size = min(2 * rank + 10, *matrix.shape)
    start = torch.randn(matrix.shape[1], size, generator=generator)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(NUM_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis


def _distance(matrix: Tensor, module: LoraModule) -> float:
    """Frobenius norm of ``matrix - lora_delta(module)``, without holding the difference."""
    tops = range(0, matrix.shape[0], TILE_ROWS)
    tiles = (slice(top, top + TILE_ROWS) for top in tops)
    return math.hypot(*(_norm(matrix[rows] - lora_delta(module, rows=rows)) for rows in tiles))


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
