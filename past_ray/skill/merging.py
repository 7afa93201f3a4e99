"""Several skill vectors made into one: pure functions on chunks of their entries.

Shapes: K = vectors, n = entries of a chunk. ``chunks`` are the same n entries of K flat float32
vectors, all finite. Everything is element-wise, so chunks merge to the same bytes as the whole.

TIES trims by magnitude over a whole vector, which no chunk sees. Two passes that only count find
the threshold exactly, in memory that does not grow with the vector::

    counts = sum(count_high_bits(chunk) for chunk in vector)
    high, rank = find_high_bits(counts, rank=num_kept(density, num_entries=n))
    counts = sum(count_low_bits(chunk, high=high) for chunk in vector)
    threshold = find_threshold(counts, high=high, rank=rank)

Counts of different chunks, files and threads add up in any order.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from past_ray.errors import SkillVectorError

LOW_BITS = 16
"""A float32's magnitude has 31 bits; the second pass counts the low 16 of them."""

NUM_HIGH_BINS = 2 ** (31 - LOW_BITS)
NUM_LOW_BINS = 2**LOW_BITS

FIRST_NON_FINITE_BIN = 0x7F80
"""High bits of infinity; those of NaN are not smaller."""

FLOAT32_MAGNITUDE = 0x7FFF_FFFF
"""All bits of a float32 but its sign. As integers they are ordered as the magnitudes are."""

NUM_BIT_VALUES = 2**32
"""Random bits are uniform below this number."""


def linear(chunks: Sequence[Tensor], *, weights: Sequence[float]) -> Tensor:
    """Return ``[n]`` float32 ``sum_i w_i v_i``.

    Weights are rounded to float32, then each product, then each sum, from first to last. One vector
    of weight 1 comes back bit for bit.

    Args:
        chunks: K times ``[n]``.
        weights: K numbers of any sign; negative takes a skill away.

    Reference:
        Task Arithmetic https://arxiv.org/abs/2212.04089 section 2.
    """
    merged = chunks[0] * weights[0]
    for chunk, weight in zip(chunks[1:], weights[1:], strict=True):
        # A fused multiply-add would round once in some places and twice in others.
        merged.add_(chunk * weight)
    return merged


def ties(
    chunks: Sequence[Tensor], *, weights: Sequence[float], thresholds: Sequence[float]
) -> Tensor:
    """Return ``[n]`` float32: the weighted mean of the kept entries that agree on a sign.

    With ``u_i = w_i v_i`` where ``|v_i| >= thresholds_i``, else 0 (trim), and
    ``s = sign(sum_i u_i)`` (elect): ``sum_A u_i / sum_A w_i`` over ``A = {i: sign(u_i) = s}``,
    and 0 where ``s`` is 0 (disjoint mean). Zeros agree with nothing. With weights 1 this is the
    paper's formula; weights that are all scaled alike give the same mean.

    Sums are float64, rounded once at the end: in float32, a small entry between two large ones
    that cancel would lose its vote, depending on the order of the vectors.

    Args:
        chunks: K times ``[n]``.
        weights: K numbers, none negative; 0 silences a vector.
        thresholds: K magnitudes that an entry must reach to be kept.

    Raises:
        SkillVectorError: A weight is negative or not finite.

    Reference:
        TIES-Merging https://arxiv.org/abs/2306.01708 section 4.2; its scaling by lambda is the
        caller's.

    Differs from the paper:
        Entries tied at the threshold are all kept. Weights are ours. Where the masses cancel
        exactly, nothing is merged, as its formula says; its code takes the commonest sign then.
    """
    _check_not_negative(weights)
    trimmed = [
        _zero_unless(chunk.abs() >= threshold, chunk).double().mul_(weight)
        for chunk, weight, threshold in zip(chunks, weights, thresholds, strict=True)
    ]
    mass = trimmed[0].clone()
    for entries in trimmed[1:]:
        mass.add_(entries)
    elected = mass.sign_()
    total, total_weight = torch.zeros_like(elected), torch.zeros_like(elected)
    for entries, weight in zip(trimmed, weights, strict=True):
        # |u_i| where u_i agrees, else 0.
        support = entries.mul_(elected).clamp_(min=0)
        total.add_(support)
        total_weight.add_(support.sign_().mul_(weight))
    total_weight.add_(total_weight == 0)
    return total.div_(total_weight).mul_(elected).float()


def drop_and_rescale(chunk: Tensor, *, drop_rate: float, bits: Tensor) -> Tensor:
    """Return ``[n]`` float32: each entry 0 with probability p, else divided by ``1 - p``.

    The mean over ``bits`` is ``chunk``. DARE merges what this returns with ``linear`` or ``ties``.

    Args:
        chunk: ``[n]``.
        drop_rate: The paper's p, in [0, 1); realised to 2**-32. 0 returns the entries unchanged.
        bits: ``[n]`` int64, uniform in [0, 2**32); other bits for each vector.

    Raises:
        SkillVectorError: ``drop_rate`` is not in [0, 1).

    Reference:
        DARE https://arxiv.org/abs/2311.03099 section 3.
    """
    if not 0 <= drop_rate < 1:
        raise SkillVectorError(
            f"drop_rate must be in [0, 1), got {drop_rate}. 0.9 drops nine entries of ten."
        )
    is_kept = bits >= round(drop_rate * NUM_BIT_VALUES)
    return _zero_unless(is_kept, chunk / (1 - drop_rate))


def num_kept(density: float, *, num_entries: int) -> int:
    """Return how many of ``num_entries`` the share ``density`` is: the nearest number, at least 1.

    Raises:
        SkillVectorError: ``density`` is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise SkillVectorError(
            f"density must be in (0, 1], got {density}. TIES keeps 0.2 of the entries; 1 keeps all."
        )
    return max(1, round(density * num_entries))


def count_high_bits(chunk: Tensor) -> Tensor:
    """Return ``[2**15]`` int64: first pass, how many entries have which high magnitude bits."""
    return torch.bincount(_magnitude_bits(chunk) >> LOW_BITS, minlength=NUM_HIGH_BINS)


def count_low_bits(chunk: Tensor, *, high: int) -> Tensor:
    """Return ``[2**16]`` int64: second pass, the low bits of entries with these high bits."""
    bits = _magnitude_bits(chunk)
    low = bits[bits >> LOW_BITS == high] & (NUM_LOW_BINS - 1)
    return torch.bincount(low, minlength=NUM_LOW_BINS)


def find_high_bits(counts: Tensor, *, rank: int) -> tuple[int, int]:
    """Return the high bits of the ``rank``-th largest magnitude, and its rank among those.

    Args:
        counts: ``[2**15]`` sum of ``count_high_bits`` over the whole vector.
        rank: From 1, the largest, to the number of entries.

    Raises:
        SkillVectorError: An entry is infinite or NaN.
    """
    num_broken = int(counts[FIRST_NON_FINITE_BIN:].sum())
    if num_broken:
        raise SkillVectorError(
            f"a skill vector must be finite, got {num_broken} entries that are not. Training"
            " diverged: look at the loss and lower the learning rate."
        )
    return _bin_of_rank(counts, rank)


def find_threshold(counts: Tensor, *, high: int, rank: int) -> float:
    """Return the magnitude sought: exactly ``rank`` entries reach it, and those tied with it.

    With the rank of all entries it is the smallest magnitude, so every entry is kept, zeros too.

    Args:
        counts: ``[2**16]`` sum of ``count_low_bits`` over the whole vector.
        high: From ``find_high_bits``.
        rank: From ``find_high_bits``.
    """
    low, _ = _bin_of_rank(counts, rank)
    bits = torch.tensor(high << LOW_BITS | low, dtype=torch.int32)
    return bits.view(torch.float32).item()


def _check_not_negative(weights: Sequence[float]) -> None:
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise SkillVectorError(
            f"TIES weights must be finite and not negative, got {list(weights)}: a mean over the"
            " agreeing vectors needs a positive sum. Merge linearly to take a skill away."
        )


def _zero_unless(is_kept: Tensor, chunk: Tensor) -> Tensor:
    """Return ``[n]`` float32: ``torch.where(is_kept, chunk, 0.0)``.

    That one branches on every element; this is several times faster where the mask is irregular.
    """
    return (chunk.view(torch.int32) * is_kept).view(torch.float32)


def _magnitude_bits(chunk: Tensor) -> Tensor:
    return chunk.view(torch.int32) & FLOAT32_MAGNITUDE


def _bin_of_rank(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds the ``rank``-th entry from the top, and its rank inside it."""
    assert 1 <= rank <= int(counts.sum()), "a rank beyond the entries that were counted"
    num_from_top = counts.flip(0).cumsum(0)
    from_top = int((num_from_top < rank).sum())
    num_above = int(num_from_top[from_top - 1]) if from_top else 0
    return len(counts) - 1 - from_top, rank - num_above
