import math

import pytest
import torch

from past_ray.errors import SkillVectorError
from past_ray.skill.geometry import PROJECTION_MODULES, cosine_table, mean_cosine, update
from tests.tiny_model import make_tiny_model

Q0 = "model.layers.0.self_attn.q_proj.weight"
K0 = "model.layers.0.self_attn.k_proj.weight"
Q10 = "model.layers.10.self_attn.q_proj.weight"


def matrices(**entries):
    return {name: torch.tensor(values) for name, values in entries.items()}


def test_update_is_after_minus_before():
    assert update({"a": torch.tensor([3.0])}, {"a": torch.tensor([1.0])})["a"].tolist() == [2.0]


def test_update_of_bfloat16_weights_is_float32():
    after, before = torch.tensor([1.0]).bfloat16(), torch.tensor([2.0**-9]).bfloat16()
    changed = update({"a": after}, {"a": before})["a"]
    assert (changed.dtype, changed.item()) == (torch.float32, 1 - 2.0**-9)


def test_cosine_uses_the_inner_product_of_matrices():
    # <A, B> = 1*3 + 2*0 + 0*1 + 2*3 = 9, |A| = 3, |B| = sqrt(19)
    [row] = cosine_table(
        {Q0: torch.tensor([[1.0, 2.0], [0.0, 2.0]])}, {Q0: torch.tensor([[3.0, 0.0], [1.0, 3.0]])}
    )
    assert (row.layer, row.module, row.norm_a) == (0, "q_proj", 3.0)
    assert row.norm_b == pytest.approx(math.sqrt(19), rel=1e-15)
    assert row.cosine == pytest.approx(9 / (3 * math.sqrt(19)), rel=1e-15)


def test_parallel_opposite_and_orthogonal_updates():
    a = {name: torch.tensor([[1.0, 0.0], [0.0, 2.0]]) for name in (Q0, K0, Q10)}
    b = {Q0: 3 * a[Q0], K0: -a[K0], Q10: torch.tensor([[0.0, 7.0], [5.0, 0.0]])}
    assert [row.cosine for row in cosine_table(a, b)] == pytest.approx([1.0, -1.0, 0.0])


def test_sums_that_float32_would_lose_are_kept():
    # <A, B> = 2**24 + 1 - 2**24 = 1; in float32 the 1 vanishes.
    a = {Q0: torch.tensor([[2.0**12, 1.0, 2.0**12]])}
    b = {Q0: torch.tensor([[2.0**12, 1.0, -(2.0**12)]])}
    [row] = cosine_table(a, b)
    assert row.cosine == pytest.approx(1 / (2.0**25 + 1), rel=1e-12)


def test_layers_are_ordered_by_number_with_the_rest_last():
    names = ("model.embed_tokens.weight", Q10, "model.layers.2.mlp.up_proj.weight", Q0)
    a = {name: torch.ones(2, 2) for name in names}
    rows = [(row.layer, row.module) for row in cosine_table(a, a)]
    assert rows == [(0, "q_proj"), (2, "up_proj"), (10, "q_proj"), (None, "embed_tokens")]


def test_every_weight_of_a_real_model_has_a_row(tmp_path):
    from past_ray.skill.checkpoint import load_weights

    weights = load_weights(make_tiny_model(tmp_path / "model"))
    rows = cosine_table(weights, weights)
    norms = ("input_layernorm", "post_attention_layernorm")
    expected = {(layer, name) for layer in (0, 1) for name in (*PROJECTION_MODULES, *norms)}
    expected |= {(None, "embed_tokens"), (None, "norm"), (None, "lm_head")}
    assert {(row.layer, row.module) for row in rows} == expected
    assert len(rows) == len(expected)
    assert mean_cosine(rows) == pytest.approx(1.0)


def test_mean_counts_every_projection_of_every_layer_the_same():
    a = {name: torch.eye(2) for name in (Q0, K0, Q10, "model.norm.weight")}
    b = {Q0: torch.eye(2), K0: -torch.eye(2), Q10: torch.eye(2), "model.norm.weight": -torch.eye(2)}
    assert mean_cosine(cosine_table(a, b)) == pytest.approx(1 / 3)
    assert mean_cosine(cosine_table(a, b), modules=["k_proj"]) == pytest.approx(-1.0)


def test_an_untouched_weight_has_no_direction_and_no_vote():
    a = {Q0: torch.eye(2), K0: torch.zeros(2, 2)}
    rows = cosine_table(a, {Q0: torch.eye(2), K0: torch.eye(2)})
    assert [math.isnan(row.cosine) for row in rows] == [False, True]
    assert mean_cosine(rows) == pytest.approx(1.0)
    assert math.isnan(mean_cosine(rows, modules=["k_proj"]))


def test_a_table_without_the_modules_asked_for_is_refused():
    a = {"model.norm.weight": torch.ones(2)}
    with pytest.raises(SkillVectorError, match=r"found only \['norm'\]"):
        mean_cosine(cosine_table(a, a))


def test_updates_of_different_models_are_refused():
    with pytest.raises(SkillVectorError, match="1 only in update_a"):
        cosine_table({Q0: torch.eye(2)}, {K0: torch.eye(2)})


def test_weights_that_float32_does_not_hold_are_refused():
    wide = {Q0: torch.eye(2, dtype=torch.float64)}
    with pytest.raises(SkillVectorError, match="before must hold floating point numbers in F32"):
        update({Q0: torch.eye(2)}, wide)
