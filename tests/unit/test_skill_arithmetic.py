import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from past_ray.errors import SkillVectorError
from past_ray.skill.arithmetic import extract_skill_vector, inject_skill_vector

HALF_ULP = 2.0**-24
WEIGHTS = st.floats(min_value=-4, max_value=4, width=32, allow_subnormal=False)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).tolist()


def state(*values, dtype=torch.float32):
    return {"w": torch.tensor(values, dtype=dtype)}


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


@given(pairs=st.lists(st.tuples(WEIGHTS, st.floats(0.5, 2)), min_size=1, max_size=20))
def test_vector_on_its_own_parent_is_the_rl_checkpoint_bit_for_bit_within_a_factor_of_two(pairs):
    sft = torch.tensor([weight for weight, _ in pairs])
    rl = sft * torch.tensor([ratio for _, ratio in pairs])
    exact = (rl.abs() >= sft.abs() / 2) & (rl.abs() <= 2 * sft.abs())
    vector = extract_skill_vector(rl={"w": rl}, sft={"w": sft})
    back = inject_skill_vector(target={"w": sft}, skill_vector=vector, scale=1.0)
    assert bits(back["w"][exact] + 0.0) == bits(rl[exact] + 0.0)


@given(pairs=st.lists(st.tuples(WEIGHTS, WEIGHTS), min_size=1, max_size=20))
def test_vector_on_its_own_parent_errs_by_at_most_two_roundings(pairs):
    sft = torch.tensor([first for first, _ in pairs])
    rl = torch.tensor([second for _, second in pairs])
    vector = extract_skill_vector(rl={"w": rl}, sft={"w": sft})
    back = inject_skill_vector(target={"w": sft}, skill_vector=vector, scale=1.0)
    difference = (rl.double() - sft.double()).abs()
    allowed = HALF_ULP * (difference + rl.double().abs()) * (1 + 2 * HALF_ULP) + 1e-45
    assert ((back["w"].double() - rl.double()).abs() <= allowed).all()


def test_a_weight_that_shrank_below_the_rounding_of_its_parent_is_lost():
    vector = extract_skill_vector(rl=state(1e-8), sft=state(1.0))
    back = inject_skill_vector(target=state(1.0), skill_vector=vector, scale=1.0)
    assert back["w"].item() == 0.0


def test_vector_on_a_bfloat16_parent_is_the_rl_checkpoint_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    sft = {"w": torch.randn(10_000, generator=generator).bfloat16()}
    rl = {"w": torch.randn(10_000, generator=generator).bfloat16()}
    vector = extract_skill_vector(rl=rl, sft=sft)
    back = inject_skill_vector(target=sft, skill_vector=vector, scale=1.0)
    close = rl["w"].float().abs() * 2**15 >= sft["w"].float().abs()
    assert close.sum() > 9_990
    assert bits(back["w"][close]) == bits(rl["w"][close])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, -0.0])
def test_scale_zero_is_bitwise_the_target(dtype, scale):
    target = state(1.1, -0.0, 0.0, 3e-5, dtype=dtype)
    vector = state(1.0, 1.0, -1.0, math.inf)
    adapted = inject_skill_vector(target=target, skill_vector=vector, scale=scale)
    assert adapted["w"].dtype == dtype
    assert bits(adapted["w"]) == bits(target["w"])


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 1.5, -2.0])
def test_injection_is_linear_in_scale(scale):
    target, vector = state(8.0, -4.0, 0.0), state(0.5, 2.0, -16.0)
    once = inject_skill_vector(target=target, skill_vector=vector, scale=1.0)["w"] - target["w"]
    many = inject_skill_vector(target=target, skill_vector=vector, scale=scale)["w"] - target["w"]
    assert many.tolist() == (scale * once).tolist()


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


def test_a_float64_target_keeps_its_precision():
    target = state(1.0 + 2.0**-40, dtype=torch.float64)
    adapted = inject_skill_vector(target=target, skill_vector=state(1.0), scale=1.0)
    assert adapted["w"].item() == 2.0 + 2.0**-40


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_inputs_are_neither_changed_nor_shared(scale):
    target, vector = state(1.0), state(2.0)
    adapted = inject_skill_vector(target=target, skill_vector=vector, scale=scale)
    adapted["w"].fill_(9.0)
    difference = extract_skill_vector(rl=target, sft=vector)
    difference["w"].fill_(9.0)
    assert target["w"].item() == 1.0
    assert vector["w"].item() == 2.0


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


def test_quantised_weights_are_refused():
    with pytest.raises(SkillVectorError, match="before quantisation"):
        extract_skill_vector(rl=state(1, dtype=torch.int8), sft=state(1, dtype=torch.int8))


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(SkillVectorError, match="finite"):
        inject_skill_vector(target=state(1.0), skill_vector=state(1.0), scale=scale)
