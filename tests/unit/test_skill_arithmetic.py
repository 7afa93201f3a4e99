import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from past_ray.errors import SkillVectorError
from past_ray.skill.arithmetic import (
    correct,
    difference,
    extract_skill_vector,
    find_corrections,
    inject_skill_vector,
)
from tests.skill_folders import bits

LARGEST = 2.0**126
"""Sums and differences of two numbers up to it are finite."""

ANY_WEIGHT = st.floats(min_value=-LARGEST, max_value=LARGEST, width=32)
NEAR_ZERO = st.floats(min_value=-(2.0**-140), max_value=2.0**-140, width=32)


@st.composite
def parents(draw):
    """Pairs of weights: unrelated, close, of opposite signs, around the smallest numbers."""
    sft = draw(ANY_WEIGHT | NEAR_ZERO)
    factor = draw(st.floats(min_value=-4, max_value=4, width=32))
    related = torch.tensor(sft).mul(factor).clamp(-LARGEST, LARGEST).item()
    return draw(st.sampled_from([sft, -sft, related, 0.0, -0.0]) | ANY_WEIGHT | NEAR_ZERO), sft


def state(*values, dtype=torch.float32):
    return {"w": torch.tensor(values, dtype=dtype)}


def round_trip(rl, sft):
    """Add the vector of two parents, with its corrections, to the SFT parent."""
    vector = difference(rl, sft)
    corrections = find_corrections(rl, sft, vector, sft + vector)
    adapted = inject_skill_vector(
        target={"w": sft},
        skill_vector={"w": vector},
        scale=1.0,
        corrections=None if corrections is None else {"w": corrections},
    )
    return adapted["w"]


def test_skill_vector_is_rl_minus_sft():
    vector = extract_skill_vector(rl=state(1.5, -2.0), sft=state(1.0, 1.0))
    assert vector["w"].tolist() == [0.5, -3.0]


def test_injection_adds_the_scaled_vector():
    adapted = inject_skill_vector(target=state(1.0, 2.0), skill_vector=state(4.0, -8.0), scale=0.25)
    assert adapted["w"].tolist() == [2.0, 0.0]


def test_difference_of_bfloat16_parents_is_not_rounded_to_bfloat16():
    rl, sft = state(1.0, dtype=torch.bfloat16), state(2.0**-9, dtype=torch.bfloat16)
    vector = extract_skill_vector(rl=rl, sft=sft)
    assert vector["w"].dtype == torch.float32
    assert vector["w"].item() == 1 - 2.0**-9


@given(pairs=st.lists(parents(), min_size=1, max_size=50))
@example(pairs=[(1e-8, 1.0), (1 + 2.0**-23, -1.5), (2.0**-149, -(2.0**-126))])
@example(pairs=[(0.0, -0.0), (-0.0, 0.0), (-0.0, -0.0), (-0.0, 1.0), (-0.0, -1.0), (0.0, 2.0)])
def test_vector_and_corrections_give_the_rl_weights_back_bit_for_bit(pairs):
    rl, sft = torch.tensor(pairs, dtype=torch.float32).T.contiguous()
    assert torch.equal(bits(round_trip(rl, sft)), bits(rl))


@given(pairs=st.lists(st.tuples(ANY_WEIGHT, st.floats(0.5, 2)), min_size=1, max_size=20))
def test_within_a_factor_of_two_the_difference_is_exact_and_needs_no_correction(pairs):
    sft = torch.tensor([weight for weight, _ in pairs])
    rl = sft * torch.tensor([ratio for _, ratio in pairs])
    # In float64, because half of the smallest float32 is zero in float32.
    after, before = rl.double().abs(), sft.double().abs()
    within = (after >= before / 2) & (after <= 2 * before)
    rl, sft = rl[within], sft[within]
    vector = difference(rl, sft)
    assert vector.double().tolist() == (rl.double() - sft.double()).tolist()
    assert find_corrections(rl, sft, vector, sft + vector) is None


def test_a_correction_is_what_the_difference_lost_and_where():
    # 1 + 2**-23 + 1.5 needs 25 bits; the nearest float32 with an even last bit is 2.5.
    rl, sft = torch.tensor([3.0, 1 + 2.0**-23]), torch.tensor([2.0, -1.5])
    vector = difference(rl, sft)
    found = find_corrections(rl, sft, vector, sft + vector)
    assert found is not None
    assert vector.tolist() == [1.0, 2.5]
    assert (found[0].tolist(), found[1].tolist()) == ([1], [2.0**-23])


@pytest.mark.parametrize(
    ("scale", "target", "expected"),
    [(1.0, -2.5, 2.0**-23), (0.5, -1.25, 2.0**-24), (-1.0, 2.5, -(2.0**-23))],
)
def test_corrections_are_scaled_with_the_vector(scale, target, expected):
    # The vector's 2.5 cancels against the first target: its correction is all that is left.
    targets, vector = torch.tensor([target, 7.0]), torch.tensor([2.5, 1.0])
    total = targets + vector * scale
    correct(total, targets, vector, scale, (torch.tensor([0]), torch.tensor([2.0**-23])))
    assert total.tolist() == [expected, 7.0 + scale]


def test_equal_weights_give_the_zero_that_changes_no_number():
    same = torch.tensor([0.0, -0.0, 1.5])
    vector = difference(same, same)
    assert bits(vector).tolist() == bits(torch.tensor([-0.0, -0.0, -0.0])).tolist()
    assert bits(same + vector).tolist() == bits(same).tolist()


def test_vector_on_a_bfloat16_parent_is_the_rl_checkpoint_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    sft = torch.randn(10_000, generator=generator).bfloat16()
    rl = torch.randn(10_000, generator=generator).bfloat16()
    vector = extract_skill_vector(rl={"w": rl}, sft={"w": sft})
    back = inject_skill_vector(target={"w": sft}, skill_vector=vector, scale=1.0)["w"]
    close = rl.float().abs() * 2**15 >= sft.float().abs()
    assert close.sum() > 9_990
    assert torch.equal(bits(back[close]), bits(rl[close]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, -0.0])
def test_scale_zero_is_bitwise_the_target(dtype, scale):
    target = state(1.1, -0.0, 0.0, 3e-5, dtype=dtype)
    vector = state(1.0, 1.0, -1.0, math.inf)
    adapted = inject_skill_vector(target=target, skill_vector=vector, scale=scale)
    assert adapted["w"].dtype == dtype
    assert torch.equal(bits(adapted["w"]), bits(target["w"]))


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 1.5, -2.0])
def test_injection_is_linear_in_scale(scale):
    target, vector = state(8.0, -4.0, 0.0), state(0.5, 2.0, -16.0)
    once = inject_skill_vector(target=target, skill_vector=vector, scale=1.0)["w"] - target["w"]
    many = inject_skill_vector(target=target, skill_vector=vector, scale=scale)["w"] - target["w"]
    assert many.tolist() == (scale * once).tolist()


def test_product_and_sum_are_each_rounded_once():
    # (1 + 2**-12)**2 is 1 + 2**-11 + 2**-24; a fused operation would keep the 2**-24.
    vector, scale = state(1 + 2.0**-12), 1 + 2.0**-12
    adapted = inject_skill_vector(target=state(-1.0), skill_vector=vector, scale=scale)
    assert adapted["w"].item() == 2.0**-11


def test_a_bfloat16_target_is_rounded_once():
    # Just above the middle of 1 and its bfloat16 successor 1 + 2**-7. Rounding the vector to
    # bfloat16 first would give exactly the middle, which rounds to the even neighbour 1.
    adapted = inject_skill_vector(
        target=state(1.0, dtype=torch.bfloat16),
        skill_vector=state(2.0**-8 + 2.0**-20),
        scale=1.0,
    )
    assert adapted["w"].dtype == torch.bfloat16
    assert adapted["w"].item() == 1 + 2.0**-7


def test_a_parameter_that_the_vector_lacks_stays_as_it_is():
    target = {"w": torch.tensor([1.0]), "other": torch.tensor([-0.0], dtype=torch.float16)}
    adapted = inject_skill_vector(target=target, skill_vector=state(2.0), scale=1.0)
    assert adapted["w"].item() == 3.0
    assert torch.equal(bits(adapted["other"]), bits(target["other"]))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_inputs_are_neither_changed_nor_shared(scale):
    target, vector = state(1.0), state(2.0)
    corrections = {"w": (torch.tensor([0]), torch.tensor([0.5]))}
    adapted = inject_skill_vector(
        target=target, skill_vector=vector, scale=scale, corrections=corrections
    )
    adapted["w"].fill_(9.0)
    vector_of_both = extract_skill_vector(rl=target, sft=vector)
    vector_of_both["w"].fill_(9.0)
    assert target["w"].item() == 1.0
    assert vector["w"].item() == 2.0
    assert corrections["w"][1].item() == 0.5


def test_missing_names_are_refused_with_both_counts():
    rl = {"a": torch.zeros(1)}
    sft = {"a": torch.zeros(1), "b": torch.zeros(1), "lm_head.weight": torch.zeros(1)}
    with pytest.raises(SkillVectorError) as caught:
        extract_skill_vector(rl=rl, sft=sft)
    assert "0 only in rl (first: []), 2 only in sft (first: [b, lm_head.weight])" in str(
        caught.value
    )


def test_other_shapes_are_refused_even_where_they_would_broadcast():
    with pytest.raises(
        SkillVectorError, match=r"1 with other shapes \(first: \[w \(1,\) and \(3,\)"
    ):
        inject_skill_vector(target=state(1.0), skill_vector=state(1.0, 2.0, 3.0), scale=1.0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float64, torch.float8_e4m3fn])
def test_weights_that_float32_does_not_hold_are_refused(dtype):
    weights = {"w": torch.ones(1).to(dtype)}
    with pytest.raises(SkillVectorError, match="F32, BF16, F16; 1 tensors do not"):
        extract_skill_vector(rl=weights, sft=weights)
    with pytest.raises(SkillVectorError, match="before quantisation, or convert float64"):
        inject_skill_vector(target=weights, skill_vector=state(1.0), scale=1.0)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(SkillVectorError, match="finite"):
        inject_skill_vector(target=state(1.0), skill_vector=state(1.0), scale=scale)
