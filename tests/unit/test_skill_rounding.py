import bisect
import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from past_ray.errors import SkillVectorError
from past_ray.skill.noise import uniform_bits
from past_ray.skill.rounding import round_nearest, round_stochastic

DTYPES = (torch.float16, torch.bfloat16)
EXTREME_BITS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)
INFINITE_PATTERN = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
FINITE_MAGNITUDES = {
    dtype: torch.arange(INFINITE_PATTERN[dtype], dtype=torch.int16).view(dtype).double().tolist()
    for dtype in DTYPES
}
# All of float32, and more often from half of float16's smallest number to its largest.
MAGNITUDE_PATTERNS = st.integers(0, 2**31 - 1) | st.integers(0x33000000, 0x477FFFFF)
STEP_AT_ONE = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def patterns(*values):
    """Float32 numbers from their bit patterns."""
    signed = [value - 2**32 if value >= 2**31 else value for value in values]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


def as_bits(values):
    return values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)


def draw(value, dtype, bits):
    return round_stochastic(tensor(value), dtype, bits=torch.tensor([bits])).double().item()


@pytest.mark.parametrize("dtype", DTYPES)
@given(pattern=MAGNITUDE_PATTERNS, sign=st.sampled_from((1.0, -1.0)))
def test_far_neighbours_share_of_the_random_bits_is_the_distance_to_the_near_one(
    dtype, pattern, sign
):
    magnitude = patterns(pattern).item()
    grid = FINITE_MAGNITUDES[dtype]
    if not magnitude < grid[-1]:
        return
    below = bisect.bisect_right(grid, magnitude) - 1
    a, b = grid[below], grid[below + 1]
    share = (Fraction(magnitude) - Fraction(a)) / (Fraction(b) - Fraction(a))
    num_up = math.floor(share * 2**32)
    # The result rises with the bits, so two of the 2**32 values tell about all of them.
    assert draw(sign * magnitude, dtype, 2**32 - 1 - num_up) == sign * a
    if num_up:
        assert draw(sign * magnitude, dtype, 2**32 - num_up) == sign * b
        assert draw(sign * magnitude, dtype, 2**32 - 1) == sign * b
    assert draw(sign * magnitude, dtype, 0) == sign * a


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_representable_value_changes(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    for bits in EXTREME_BITS:
        rounded = round_stochastic(every.float(), dtype, bits=torch.full((len(every),), bits))
        assert torch.equal(as_bits(rounded), as_bits(every))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quarters", [-3, -2, -1, 1, 2, 3])
def test_mean_of_many_draws_is_the_value(dtype, quarters):
    n, step = 2**16, STEP_AT_ONE[dtype]
    value = math.copysign(1 + abs(quarters) / 4 * step, quarters)
    bits = uniform_bits(seed=0, name="w", start=0, count=n)
    mean = round_stochastic(torch.full((n,), value), dtype, bits=bits).double().mean().item()
    # Hoeffding over draws in an interval of one step; rounding to nearest errs by a quarter step.
    tolerance = step * math.sqrt(math.log(2e9) / (2 * n))
    assert tolerance < step / 50
    assert abs(mean - value) < tolerance


def test_updates_too_small_for_the_dtype_survive_in_the_sum():
    # 2**16 weights of 1 and updates of 2**-12 add up to 16; a bfloat16 step at 1 is 2**-7.
    n = 2**16
    values = torch.full((n,), 1 + 2.0**-12)
    assert (round_nearest(values, torch.bfloat16).double() - 1).sum() == 0
    bits = uniform_bits(seed=0, name="w", start=0, count=n)
    updates = round_stochastic(values, torch.bfloat16, bits=bits).double() - 1
    assert updates.sum().item() == pytest.approx(16, abs=2.0**-7 * math.sqrt(n * math.log(2e9) / 2))


def test_subnormals_are_rounded_by_their_own_even_steps():
    # float16: multiples of 2**-24 below 2**-14. 2.5 steps up is 3, for half of the bits.
    assert draw(2.5 * 2.0**-24, torch.float16, 2**31) == 3 * 2.0**-24
    assert draw(2.5 * 2.0**-24, torch.float16, 2**31 - 1) == 2 * 2.0**-24
    # bfloat16: multiples of 2**-133 below 2**-126.
    assert draw(2.5 * 2.0**-133, torch.bfloat16, 2**31) == 3 * 2.0**-133
    assert draw(2.5 * 2.0**-133, torch.bfloat16, 2**31 - 1) == 2 * 2.0**-133


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_values_that_round_to_zero_keep_their_sign(dtype):
    values = tensor(0.0, -0.0, 1e-45, -1e-45)
    rounded = round_stochastic(values, dtype, bits=torch.zeros(4, dtype=torch.int64))
    assert as_bits(rounded).tolist() == [0, -(2**15), 0, -(2**15)]


@pytest.mark.parametrize("bits", EXTREME_BITS)
def test_beyond_the_largest_number_only_what_nearest_makes_infinite_becomes_infinite(bits):
    # float16: 65504 is the largest, the next step would be 65536, half-way is 65520.
    assert draw(65519.0, torch.float16, bits) == 65504.0
    assert draw(-65519.0, torch.float16, bits) == -65504.0
    assert draw(65520.0, torch.float16, bits) == math.inf
    assert draw(1e38, torch.float16, bits) == math.inf
    largest = torch.finfo(torch.bfloat16).max
    assert draw(largest * (1 + 2.0**-10), torch.bfloat16, bits) == largest
    assert draw(torch.finfo(torch.float32).max, torch.bfloat16, bits) == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", EXTREME_BITS)
def test_infinities_and_nan_pass_through(dtype, bits):
    assert draw(math.inf, dtype, bits) == math.inf
    assert draw(-math.inf, dtype, bits) == -math.inf
    # Every NaN stays one, also those whose set bits all lie where the dtype has none.
    nans = patterns(0x7FC00000, 0x7F800001, 0xFF800001, 0xFFFFFFFF, 0x7FFFFFFF)
    assert round_stochastic(nans, dtype, bits=torch.full((5,), bits)).isnan().all()


def test_nearest_rounds_ties_to_even():
    # Steps of 2**-7: 0.5, 1.5 and 2.5 steps above 1.
    values = 1 + tensor(0.5, 1.5, 2.5) * 2.0**-7
    steps = (round_nearest(values, torch.bfloat16).double() - 1) / 2.0**-7
    assert steps.tolist() == [0, 2, 2]


def test_float32_is_returned_as_it_is():
    values = patterns(0x80000000, 1, 0x3F800001, 0x7FC12345)
    for rounded in (
        round_nearest(values, torch.float32),
        round_stochastic(values, torch.float32, bits=torch.full((4,), 2**32 - 1)),
    ):
        assert torch.equal(as_bits(rounded), as_bits(values))


def test_other_dtypes_are_refused():
    with pytest.raises(SkillVectorError, match=r"bfloat16 or float32, got torch\.float64"):
        round_stochastic(tensor(1.0), torch.float64, bits=torch.tensor([0]))


@pytest.mark.parametrize("dtype", DTYPES)
@given(cuts=st.lists(st.integers(0, 500), max_size=8), seed=st.integers(0, 1000))
def test_chunks_round_to_the_bytes_of_the_whole(dtype, cuts, seed):
    # Any pattern: normal, subnormal, NaN and infinite.
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(2**31), 2**31, (500,), generator=generator).to(torch.int32)
    values, bits = values.view(torch.float32), uniform_bits(seed=0, name="w", start=0, count=500)
    edges = sorted({0, 500, *cuts})
    pieces = [slice(*edge) for edge in pairwise(edges)]
    stochastic = [round_stochastic(values[piece], dtype, bits=bits[piece]) for piece in pieces]
    nearest = [round_nearest(values[piece], dtype) for piece in pieces]
    whole = round_stochastic(values, dtype, bits=bits)
    assert torch.equal(as_bits(torch.cat(stochastic)), as_bits(whole))
    assert torch.equal(as_bits(torch.cat(nearest)), as_bits(round_nearest(values, dtype)))
