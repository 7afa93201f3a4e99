"""LoRA factors: multiplied out, laid side by side, and found by an SVD."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from past_ray.errors import SkillVectorError
from past_ray.skill.adapter import (
    Adapter,
    LoraModule,
    concatenate,
    lora_delta,
    truncated_svd,
    vllm_rank,
)
from tests.skill_models import distance


def random_module(*, shape=(48, 32), rank=4, scaling=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LoraModule(
        a=torch.randn(rank, shape[1], generator=generator),
        b=torch.randn(shape[0], rank, generator=generator),
        scaling=scaling,
    )


def adapter_of(**modules):
    return Adapter(modules=modules, config={})


def dense(module):
    return module.scaling * module.b.double() @ module.a.double()


# lora_delta


@given(
    num_rows=st.integers(1, 700),
    num_columns=st.integers(1, 40),
    rank=st.integers(0, 20),
    start=st.integers(-750, 750) | st.none(),
    stop=st.integers(-750, 750) | st.none(),
)
def test_any_rows_have_the_bits_of_the_whole(num_rows, num_columns, rank, start, stop):
    module = random_module(shape=(num_rows, num_columns), rank=rank, scaling=1 / 3)
    rows = lora_delta(module, rows=slice(start, stop))
    whole = lora_delta(module)[start:stop]
    assert rows.shape == whole.shape
    assert torch.equal(rows.view(torch.int32), whole.view(torch.int32))


@pytest.mark.parametrize("chunk", [1, 37, 255, 256, 257, 1000])
def test_chunks_of_a_wide_weight_add_up_to_its_bits(chunk):
    module = random_module(shape=(1001, 777), rank=33)
    parts = [lora_delta(module, rows=slice(at, at + chunk)) for at in range(0, 1001, chunk)]
    assert torch.equal(torch.cat(parts), lora_delta(module))


def test_a_delta_does_not_depend_on_where_its_factors_lie_in_memory():
    module = random_module(shape=(300, 65), rank=5)
    shifted = {}
    for name, factor in (("a", module.a), ("b", module.b)):
        room = torch.empty(factor.numel() + 1)
        shifted[name] = room[1:].view(factor.shape).copy_(factor)
    strided = LoraModule(a=module.a.T.contiguous().T, b=shifted["b"], scaling=module.scaling)
    moved = LoraModule(**shifted, scaling=module.scaling)
    assert torch.equal(lora_delta(moved), lora_delta(module))
    assert torch.equal(lora_delta(strided), lora_delta(module))


def test_a_delta_is_scaling_times_b_times_a():
    module = LoraModule(
        a=torch.tensor([[1.0, 2.0, 3.0]]), b=torch.tensor([[10.0], [-1.0]]), scaling=0.5
    )
    assert module.shape == (2, 3)
    assert lora_delta(module).tolist() == [[5.0, 10.0, 15.0], [-0.5, -1.0, -1.5]]
    assert lora_delta(module, rows=slice(1, 2)).tolist() == [[-0.5, -1.0, -1.5]]


def test_half_precision_factors_are_multiplied_out_in_float32():
    module = random_module(rank=16)
    half = LoraModule(a=module.a.bfloat16(), b=module.b.bfloat16(), scaling=0.5)
    assert lora_delta(half).dtype == torch.float32
    assert distance(lora_delta(half), dense(half)) < 1e-6


# concatenate


@given(
    weights=st.lists(st.floats(-3, 3), min_size=1, max_size=4).filter(
        lambda w: max(map(abs, w)) > 0.1
    ),
    ranks=st.lists(st.integers(1, 12), min_size=4, max_size=4),
)
def test_a_concatenation_is_the_weighted_sum_of_dense_deltas(weights, ranks):
    modules = [
        random_module(rank=rank, scaling=0.3 * (seed + 1), seed=seed)
        for seed, (_, rank) in enumerate(zip(weights, ranks, strict=False))
    ]
    parts = list(zip(weights, (adapter_of(w=module) for module in modules), strict=True))
    found = concatenate(parts).modules["w"]
    expected = sum(weight * dense(module) for weight, module in zip(weights, modules, strict=True))
    scale = sum(abs(w) * dense(m).norm() for w, m in zip(weights, modules, strict=True))
    assert (dense(found) - expected).norm() < 1e-7 * scale
    assert (lora_delta(found) - expected).norm() < 1e-6 * scale


def test_a_difference_of_adapters_has_a_negative_weight():
    one, two = random_module(seed=1), random_module(seed=2)
    found = concatenate([(1.0, adapter_of(w=one)), (-1.0, adapter_of(w=two))])
    assert distance(lora_delta(found.modules["w"]), dense(one) - dense(two)) < 1e-6


def test_modules_that_only_some_adapters_have_are_kept_at_the_common_rank():
    one = adapter_of(b=random_module(rank=5, seed=1), c=random_module(shape=(7, 9), rank=1, seed=2))
    two = adapter_of(b=random_module(rank=4, seed=3), a=random_module(rank=3, seed=4))
    found = concatenate([(2.0, one), (0.5, two)])
    assert list(found.modules) == ["a", "b", "c"]
    # The largest sum of ranks is 5 + 4, and vLLM's next is 16.
    assert {(module.rank, module.scaling) for module in found.modules.values()} == {(16, 1.0)}
    assert distance(lora_delta(found.modules["a"]), 0.5 * dense(two.modules["a"])) < 1e-6
    assert distance(lora_delta(found.modules["c"]), 2.0 * dense(one.modules["c"])) < 1e-6
    assert not found.modules["c"].a[1:].any()
    assert not found.modules["c"].b[:, 1:].any()
    assert found.config == {}


def test_a_concatenation_of_one_concatenation_is_itself_bit_for_bit():
    once = concatenate([(0.7, adapter_of(w=random_module(rank=3)))])
    twice = concatenate([(1.0, once)])
    assert torch.equal(twice.modules["w"].a, once.modules["w"].a)
    assert torch.equal(twice.modules["w"].b, once.modules["w"].b)


def test_other_shapes_of_a_weight_are_refused_naming_the_first_five():
    one = adapter_of(**{name: random_module(shape=(48, 32)) for name in "abcdefg"})
    two = adapter_of(**{name: random_module(shape=(48, 33)) for name in "bcdefg"})
    with pytest.raises(SkillVectorError) as caught:
        concatenate([(1.0, one), (1.0, two)])
    assert "found 6 with several (first: b (48, 32) and (48, 33), c" in str(caught.value)
    assert "f (48, 32)" in str(caught.value)
    assert "g (48, 32)" not in str(caught.value)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(SkillVectorError, match="weights must be finite"):
        concatenate([(weight, adapter_of(w=random_module()))])


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(SkillVectorError, match="at least one weight, got 1 adapters"):
        concatenate([(1.0, adapter_of())])


def test_ranks_are_rounded_up_to_one_that_vllm_serves():
    expected = {0: 1, 1: 1, 2: 8, 8: 8, 9: 16, 24: 32, 65: 128, 257: 320, 321: 512, 512: 512}
    assert {rank: vllm_rank(rank) for rank in expected} == expected


def test_a_rank_that_vllm_cannot_serve_is_refused_with_the_ways_out():
    with pytest.raises(SkillVectorError, match=r"at most 512.*got 520.*lower rank, or merge"):
        concatenate([(1.0, adapter_of(w=random_module(rank=260)))] * 2)


# truncated_svd


def spectrum_matrix(num_rows, num_columns, exponent):
    """A matrix with the singular values 1, 2**-exponent, 3**-exponent, ..."""
    generator = torch.Generator().manual_seed(5)
    size = min(num_rows, num_columns)
    left = torch.linalg.qr(torch.randn(num_rows, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(num_columns, size, generator=generator)).Q
    return (left * torch.arange(1, size + 1).pow(-exponent)) @ right.T


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (800, 1000), (1000, 800)], ids=str)
def test_the_energy_is_that_of_an_exact_svd(shape, exponent):
    values = torch.arange(1, min(shape) + 1).double().pow(-2 * exponent)
    matrix = spectrum_matrix(*shape, exponent)
    for rank in (1, 16):
        module, energy = truncated_svd(matrix, rank=rank)
        assert module.rank == rank
        assert energy == pytest.approx((values[:rank].sum() / values.sum()).item(), abs=1e-3)
        kept = (dense(module).norm() / matrix.double().norm()).square().item()
        assert energy == pytest.approx(kept, abs=1e-5)


@pytest.mark.parametrize("shape", [(40, 90), (1000, 800)], ids=str)
def test_white_noise_too_is_approximated_as_well_as_possible(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    values = torch.linalg.svdvals(matrix.double()).square()
    _, energy = truncated_svd(matrix, rank=16)
    assert energy == pytest.approx((values[:16].sum() / values.sum()).item(), abs=1e-3)


@pytest.mark.parametrize("shape", [(40, 90), (800, 1000), (1000, 800)], ids=str)
def test_a_matrix_of_the_rank_comes_back_whole(shape):
    original = random_module(shape=shape, rank=7)
    module, energy = truncated_svd(lora_delta(original), rank=7)
    assert energy == pytest.approx(1.0, abs=1e-9)
    assert distance(lora_delta(module), dense(original)) < 1e-5
    assert module.scaling == 1.0
    # Both factors carry the square root of each singular value.
    assert torch.allclose(module.a.norm(dim=1), module.b.norm(dim=0), rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 9), (800, 801)], ids=str)
def test_a_zero_matrix_keeps_all_of_nothing(shape):
    module, energy = truncated_svd(torch.zeros(shape), rank=2)
    assert energy == 1.0
    assert torch.equal(lora_delta(module), torch.zeros(shape))


def test_a_rank_above_the_smaller_side_is_cut_to_it():
    matrix = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    module, energy = truncated_svd(matrix, rank=64)
    assert module.rank == 5
    assert energy == pytest.approx(1.0, abs=1e-9)
    assert distance(lora_delta(module), matrix) < 1e-6


def test_the_randomised_svd_repeats_itself_and_leaves_the_global_generator_alone():
    matrix = spectrum_matrix(800, 800, 0.3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, _ = truncated_svd(matrix, rank=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two, _ = truncated_svd(matrix, rank=4)
    assert torch.equal(one.a, two.a)
    assert torch.equal(one.b, two.b)


def test_a_bfloat16_matrix_is_approximated_in_float32():
    module, energy = truncated_svd(lora_delta(random_module(rank=2)).bfloat16(), rank=2)
    assert module.a.dtype == module.b.dtype == torch.float32
    assert energy > 0.9999


def test_what_cannot_be_approximated_is_refused():
    with pytest.raises(SkillVectorError, match="at least 1, got 0"):
        truncated_svd(torch.ones(2, 2), rank=0)
    with pytest.raises(SkillVectorError, match="must be finite"):
        truncated_svd(torch.tensor([[1.0, math.nan]]), rank=1)
