"""Rounding float32 values to the dtype that a checkpoint is stored in.

Shapes: n = elements. Everything is element-wise, so chunks of a tensor round as the whole does.

A skill vector is often smaller than half a step of its target's dtype: bfloat16 has steps of 2**-7
between 1 and 2, so a weight of 1 plus an update of 1e-4 rounds to nearest as 1 again. Stochastic
rounding keeps the update on average: it errs more in every weight but has no bias, and sums over
many weights come out right.
"""

import torch
from torch import Tensor

from past_ray.errors import SkillVectorError

FRACTION_BITS = 32
"""Bits after the point of an ordinal; as many as there are random bits per element."""

FLOAT32_MAGNITUDE = 0x7FFF_FFFF
"""All bits of a float32 but its sign."""

BFLOAT16_EXTRA_BITS = 16
"""Mantissa bits that float32 has and bfloat16 has not."""

FLOAT16_EXTRA_BITS = 13
"""Mantissa bits that float32 has and float16 has not."""

FLOAT16_SMALLEST_NORMAL_BITS = (127 - 14) << 23
"""2**-14, float16's smallest normal number, as a float32 bit pattern."""


def round_nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``values`` in ``dtype``, rounded to nearest with ties to even.

    Values half a step or more beyond the largest finite number become infinite.

    Args:
        values: ``[n]`` float32.
        dtype: Any floating dtype.
    """
    return values.to(dtype)


def round_stochastic(values: Tensor, dtype: torch.dtype, *, bits: Tensor) -> Tensor:
    """Return ``values`` in ``dtype``, rounded up or down at random so that the mean is exact.

    With ``a`` and ``b`` the neighbours of ``|x|`` in ``dtype``, ``a <= |x| < b``, the result has
    the sign of ``x`` and the magnitude ``b`` with probability ``(|x| - a) / (b - a)``, short of it
    by less than 2**-32, else ``a``.
    So a representable value never changes, and of nearest value ``r`` and other neighbour ``o``,
    ``o`` is drawn with probability ``|x - r| / |o - r|``.

    The numbers of a dtype are numbered in order of magnitude by their own bit patterns. ``x`` lies
    between two of them: at ordinal ``k + f``, ``f`` in [0, 1). ``floor(k + f + u)`` with ``u``
    uniform in [0, 1) is ``k + 1`` with probability ``f``.

    Beyond the largest finite number there is no neighbour to draw, and NaN has none either: both
    are rounded to nearest. Nothing becomes infinite that would not with ``round_nearest``.

    Args:
        values: ``[n]`` float32.
        dtype: float16, bfloat16 or float32, which returns ``values``.
        bits: ``[n]`` int64, uniform in [0, 2**32).

    Raises:
        SkillVectorError: ``dtype`` is another one.
    """
    if dtype == torch.float32:
        return values
    patterns = values.view(torch.int32)
    ordinals = _ordinals(values, dtype)
    rounded = ordinals.add_(bits).bitwise_right_shift_(FRACTION_BITS).to(torch.int16)
    signs = (patterns >> 16).to(torch.int16).bitwise_and_(-0x8000)
    drawn = rounded.bitwise_or_(signs).view(dtype)
    has_neighbours = values.abs() <= torch.finfo(dtype).max
    return torch.where(has_neighbours, drawn, values.to(dtype))


def _ordinals(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``[n]`` int64: where ``|values|`` lie among the numbers of ``dtype``.

    Fixed point with ``FRACTION_BITS`` after the point. In a binade, float32 and ``dtype`` are both
    evenly spaced, so a float32's extra mantissa bits are the fraction.
    """
    magnitudes = (values.view(torch.int32) & FLOAT32_MAGNITUDE).to(torch.int64)
    if dtype == torch.bfloat16:
        return magnitudes.bitwise_left_shift_(FRACTION_BITS - BFLOAT16_EXTRA_BITS)
    if dtype != torch.float16:
        raise SkillVectorError(
            f"stochastic rounding needs float16, bfloat16 or float32, got {dtype}."
            " Round to nearest, or store the target in one of these."
        )
    # Below its smallest normal number float16 is evenly spaced down to zero, but float32 is not.
    smallest = torch.finfo(dtype).smallest_normal
    ordinals_per_unit = 2.0**FRACTION_BITS / (smallest * torch.finfo(dtype).eps)
    below = (values.abs().clamp_(max=smallest).double() * ordinals_per_unit).to(torch.int64)
    above = magnitudes.sub_(FLOAT16_SMALLEST_NORMAL_BITS).clamp_(min=0)
    return below.add_(above.bitwise_left_shift_(FRACTION_BITS - FLOAT16_EXTRA_BITS))
