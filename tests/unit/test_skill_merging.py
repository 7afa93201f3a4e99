import math
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from past_ray.errors import SkillVectorError
from past_ray.skill.merging import (
    count_high_bits,
    count_low_bits,
    drop_and_rescale,
    find_high_bits,
    find_threshold,
    linear,
    num_kept,
    ties,
)
from past_ray.skill.noise import uniform_bits

ENTRIES = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL_ENTRIES = st.floats(-4, 4, width=32)
WEIGHTS = st.floats(0.125, 8)

# Entry by entry: all agree; two masses that cancel; one left after trimming; zero everywhere; one
# large against two small; one sign against the other, with a trimmed entry on the losing side.
A = (3.0, -2.0, 1.0, 0.0, -2.0, 4.0)
B = (1.5, 2.0, -4.0, 0.0, -3.0, -0.25)
C = (2.0, 0.5, 1.5, 0.0, 6.0, -3.0)
THRESHOLDS = (2.0, 1.5, 2.0)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def as_bits(values):
    return values.contiguous().view(torch.int32)


def threshold_of(chunks, density):
    """The two passes as a streaming caller makes them."""
    rank = num_kept(density, num_entries=sum(len(chunk) for chunk in chunks))
    high, rank = find_high_bits(sum(count_high_bits(chunk) for chunk in chunks), rank=rank)
    counts = sum(count_low_bits(chunk, high=high) for chunk in chunks)
    return find_threshold(counts, high=high, rank=rank)


def pieces(length, cuts):
    edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
    return [slice(*edge) for edge in pairwise(edges)]


def test_linear_is_the_weighted_sum():
    merged = linear([tensor(*A), tensor(*B), tensor(*C)], weights=[1.0, 2.0, -0.5])
    # A + 2 B - C / 2, entry by entry.
    assert merged.tolist() == [5.0, 1.75, -7.75, 0.0, -11.0, 5.0]


@given(values=st.lists(ENTRIES, min_size=1, max_size=40))
def test_one_vector_of_weight_one_comes_back_bit_for_bit(values):
    assert torch.equal(as_bits(linear([tensor(*values)], weights=[1.0])), as_bits(tensor(*values)))


def test_linear_rounds_products_before_it_adds_them():
    # (1 + 2**-12)**2 = 1 + 2**-11 + 2**-24 rounds to 1 + 2**-11 in float32 (a tie, to even).
    # A fused multiply-add would leave 2**-24 behind.
    n, root = 37, 1 + 2.0**-12
    chunks = [torch.full((n,), -(1 + 2.0**-11)), torch.full((n,), root)]
    assert linear(chunks, weights=[1.0, root]).tolist() == [0.0] * n


def test_linear_does_not_change_its_arguments():
    a, b = tensor(*A), tensor(*B)
    linear([a, b], weights=[1.0, 1.0])
    ties([a, b], weights=[2.0, 1.0], thresholds=[2.0, 2.0])
    assert (a.tolist(), b.tolist()) == (list(A), list(B))


def test_ties_of_three_vectors_worked_out_by_hand():
    chunks = [tensor(*A), tensor(*B), tensor(*C)]
    # Trimmed:   A  3 -2  0  0 -2  4      Masses:  6.5  0  -4  0  1  1
    #            B 1.5 2 -4  0 -3  0      Elected: +    0  -   0  +  +
    #            C  2  0  0  0  6 -3      Means of those that agree: (3 + 1.5 + 2) / 3, ...
    merged = ties(chunks, weights=[1.0] * 3, thresholds=THRESHOLDS)
    assert merged.tolist() == [tensor(6.5 / 3).item(), 0.0, -4.0, 0.0, 6.0, 4.0]


def test_ties_weights_count_in_the_election_and_in_the_mean():
    # 1 * 3 and 3 * 2 agree: (3 + 6) / (1 + 3). 1 * 5 loses against 3 * -2, which stays -2.
    merged = ties([tensor(3.0, 5.0), tensor(2.0, -2.0)], weights=[1.0, 3.0], thresholds=[0.0, 0.0])
    assert merged.tolist() == [2.25, -2.0]


def test_ties_trims_by_the_magnitude_before_weighting_and_keeps_what_equals_the_threshold():
    merged = ties([tensor(1.0, -2.0, 1.999)], weights=[8.0], thresholds=[2.0])
    assert merged.tolist() == [0.0, -2.0, 0.0]


def test_ties_zeros_do_not_dilute_the_mean():
    merged = ties([tensor(6.0), tensor(0.0), tensor(2.0)], weights=[1.0] * 3, thresholds=[0.0] * 3)
    assert merged.tolist() == [4.0]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_ties_small_vote_between_large_ones_that_cancel_decides_in_every_order(order):
    # The masses of 2**30 cancel; 1 remains and elects the positive side, in float32 it would not.
    entries = [tensor(2.0**30), tensor(1.0), tensor(-(2.0**30))]
    merged = ties([entries[i] for i in order], weights=[1.0] * 3, thresholds=[0.0] * 3)
    assert merged.item() == tensor((2.0**30 + 1) / 2).item()


@given(values=st.lists(ENTRIES, min_size=1, max_size=40), weight=WEIGHTS)
def test_ties_of_one_vector_kept_whole_is_the_vector(values, weight):
    merged = ties([tensor(*values)], weights=[weight], thresholds=[0.0])
    assert torch.equal(merged, tensor(*values))


@given(
    rows=st.lists(st.tuples(SMALL_ENTRIES, SMALL_ENTRIES, SMALL_ENTRIES), min_size=1, max_size=30),
    weights=st.tuples(WEIGHTS, WEIGHTS, WEIGHTS),
)
def test_ties_agrees_with_the_formula_entry_by_entry(rows, weights):
    chunks = [tensor(*column) for column in zip(*rows, strict=True)]
    merged = ties(chunks, weights=weights, thresholds=[1.0, 0.5, 0.0])
    for i, row in enumerate(rows):
        kept = [v if abs(v) >= t else 0.0 for v, t in zip(row, (1.0, 0.5, 0.0), strict=True)]
        mass = math.fsum(w * v for w, v in zip(weights, kept, strict=True))
        if 0 < abs(mass) < 1e-12:
            continue
        agreeing = [(w, v) for w, v in zip(weights, kept, strict=True) if v * mass > 0]
        total = math.fsum(w * v for w, v in agreeing)
        expected = total / math.fsum(w for w, _ in agreeing) if agreeing else 0.0
        assert merged[i].item() == pytest.approx(expected, rel=2.0**-23, abs=1e-45)


def test_ties_scaling_all_weights_changes_nothing():
    chunks = [tensor(*A), tensor(*B), tensor(*C)]
    once = ties(chunks, weights=[1.0, 2.0, 0.5], thresholds=THRESHOLDS)
    twice = ties(chunks, weights=[2.0, 4.0, 1.0], thresholds=THRESHOLDS)
    assert torch.equal(once, twice)


def test_ties_vector_of_weight_zero_has_no_say():
    chunks = [tensor(*A), tensor(*B)]
    merged = ties(chunks, weights=[1.0, 0.0], thresholds=[0.0, 0.0])
    assert merged.tolist() == list(A)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_ties_refuses_weights_that_make_no_mean(weight):
    with pytest.raises(SkillVectorError, match="finite and not negative"):
        ties([tensor(*A), tensor(*B)], weights=[1.0, weight], thresholds=[0.0, 0.0])


@given(
    cuts=st.lists(st.integers(0, 300), max_size=8),
    seed=st.integers(0, 1000),
    weights=st.tuples(WEIGHTS, WEIGHTS, WEIGHTS),
)
def test_chunks_merge_to_the_bytes_of_the_whole(cuts, seed, weights):
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(300, generator=generator) for _ in range(3)]
    # Zeros of both signs, subnormals and ties between vectors among them.
    vectors[0][::3], vectors[1][::5], vectors[2][::7] = -0.0, 1e-40, -vectors[0][::7]
    bits = uniform_bits(seed=0, name="w", start=0, count=300)

    def merge(piece):
        chunks = [vector[piece] for vector in vectors]
        dropped = [drop_and_rescale(chunk, drop_rate=0.3, bits=bits[piece]) for chunk in chunks]
        return torch.stack(
            [
                linear(chunks, weights=weights),
                linear(dropped, weights=weights),
                ties(chunks, weights=weights, thresholds=[0.5, 0.0, 0.1]),
            ]
        )

    merged = torch.cat([merge(piece) for piece in pieces(300, cuts)], dim=1)
    assert torch.equal(as_bits(merged), as_bits(merge(slice(None))))


def test_drop_rate_is_the_share_of_random_bits_that_drop():
    # A quarter of 2**32 values drops, the rest is divided by 3/4.
    bits = torch.tensor([0, 2**30 - 1, 2**30, 2**32 - 1])
    dropped = drop_and_rescale(tensor(-3.0, -3.0, -3.0, 6.0), drop_rate=0.25, bits=bits)
    assert as_bits(dropped).tolist() == as_bits(tensor(0.0, 0.0, -4.0, 8.0)).tolist()


def test_drop_rate_zero_returns_the_entries_bit_for_bit():
    values = tensor(0.0, -0.0, 1e-45, -3.3, 3e38)
    kept = drop_and_rescale(values, drop_rate=0.0, bits=torch.zeros(5, dtype=torch.int64))
    assert torch.equal(as_bits(kept), as_bits(values))


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9])
def test_mean_over_many_drops_is_the_entry(drop_rate):
    n, value = 2**16, -0.75
    bits = uniform_bits(seed=0, name="w", start=0, count=n)
    dropped = drop_and_rescale(torch.full((n,), value), drop_rate=drop_rate, bits=bits)
    # Hoeffding over draws in an interval as wide as a kept entry.
    tolerance = abs(value) / (1 - drop_rate) * math.sqrt(math.log(2e9) / (2 * n))
    assert abs(dropped.double().mean().item() - value) < tolerance


def test_different_seeds_drop_different_entries():
    values = torch.ones(1000)
    first, second = (
        drop_and_rescale(
            values, drop_rate=0.5, bits=uniform_bits(seed=seed, name="w", start=0, count=1000)
        )
        for seed in (0, 1)
    )
    assert 400 < (first != second).sum() < 600


@pytest.mark.parametrize("drop_rate", [-0.1, 1.0, math.nan])
def test_impossible_drop_rates_are_refused(drop_rate):
    with pytest.raises(SkillVectorError, match=r"drop_rate must be in \[0, 1\)"):
        drop_and_rescale(tensor(1.0), drop_rate=drop_rate, bits=torch.tensor([0]))


def test_density_one_half_of_six_keeps_the_three_largest_magnitudes():
    assert threshold_of([tensor(0.5, -4.0, 3.0), tensor(-0.25, 0.0, -3.5)], 0.5) == 3.0


@given(
    values=st.lists(st.one_of(ENTRIES, st.sampled_from((0.0, -0.0, 1.5, -1.5))), min_size=1),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    density=st.floats(0.01, 1),
)
def test_threshold_is_the_kth_largest_magnitude_of_all_chunks(values, cuts, density):
    chunks = [tensor(*values)[piece] for piece in pieces(len(values), cuts)]
    k = num_kept(density, num_entries=len(values))
    expected = sorted(tensor(*values).abs().tolist(), reverse=True)[k - 1]
    assert threshold_of(chunks, density) == expected


def test_threshold_tells_neighbouring_float32_numbers_apart():
    # Equal in the high bits; only the second pass sees which is larger.
    values = torch.arange(0x3F800000, 0x3F800000 + 1000, dtype=torch.int32).view(torch.float32)
    assert threshold_of([values[:500], -values[500:]], 0.01) == values[990].item()


def test_entries_tied_at_the_threshold_are_all_kept():
    values = tensor(5.0, 2.0, -2.0, 2.0, 1.0)
    threshold = threshold_of([values], 0.4)
    assert threshold == 2.0
    assert (ties([values], weights=[1.0], thresholds=[threshold]) != 0).sum() == 4


def test_density_one_keeps_everything_and_its_threshold_is_the_smallest_magnitude():
    assert threshold_of([tensor(*A)], 1.0) == 0.0
    assert threshold_of([tensor(5.0, -1.0, 2.0)], 1.0) == 1.0


@pytest.mark.parametrize(
    ("density", "num_entries", "expected"),
    [(0.07, 100, 7), (0.29, 100, 29), (0.2, 10, 2), (1.0, 3, 3), (1e-9, 10, 1)],
)
def test_number_kept_is_the_nearest_to_the_density(density, num_entries, expected):
    # 0.07 * 100 is above 7 and 0.29 * 100 below 29 in floating point.
    assert num_kept(density, num_entries=num_entries) == expected


@pytest.mark.parametrize("density", [0.0, -0.5, 1.1, math.nan])
def test_impossible_densities_are_refused(density):
    with pytest.raises(SkillVectorError, match=r"density must be in \(0, 1\]"):
        num_kept(density, num_entries=10)


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_vector_that_is_not_finite_has_no_threshold(broken):
    with pytest.raises(SkillVectorError, match="must be finite, got 1 entries"):
        threshold_of([tensor(1.0, broken)], 0.5)
