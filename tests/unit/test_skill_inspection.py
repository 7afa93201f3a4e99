import json
import math

import pytest
import torch

from past_ray.cli.skill_tables import inspection_json, print_inspection
from past_ray.errors import SkillVectorError
from past_ray.skill import StreamSettings, combine, extract, inspect, load_skill, select
from past_ray.skill.checkpoint import load_weights
from tests.skill_folders import flip_byte, make_checkpoint, random_tensors
from tests.skill_models import (
    D1,
    Q0,
    Q1,
    SHAPES,
    SMALL,
    WIDE,
    make_adapter,
    make_model,
    make_skill,
    make_skill_of,
)


@pytest.fixture(scope="module")
def skill(tmp_path_factory):
    """Updates of about half a bfloat16 step of a weight near 1: many entries are rounded away."""
    folder = tmp_path_factory.mktemp("inspected") / "skill"
    make_skill(folder, seed=1, by=0.002)
    return folder


@pytest.fixture
def target(tmp_path):
    return make_model(tmp_path / "target", seed=7)


def squares(vector, wanted):
    return math.fsum(float(vector[n].double().square().sum()) for n in vector if wanted(n))


def joined(tensors):
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)])


def rounding_cost(moved, wanted):
    """Share of entries that changed, cosine, and noise over signal, on whole float64 vectors."""
    share = torch.count_nonzero(moved).item() / moved.numel()
    cosine = (torch.dot(moved, wanted) / (moved.norm() * wanted.norm())).item()
    return share, cosine, ((moved - wanted).norm() / wanted.norm()).item()


def found_cost(cost):
    return cost.share_changed, cost.cosine, cost.noise_to_signal


def strict_json(found):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(json.dumps(inspection_json(found)), parse_constant=refuse)


# Norms


@pytest.mark.parametrize("rows", ["by_layer", "by_module"])
def test_squared_norms_shares_and_entries_add_up_to_the_whole(rows, skill):
    found = inspect(skill)
    parts = getattr(found, rows)
    assert math.fsum(row.norm**2 for row in parts) == pytest.approx(found.manifest.norm**2)
    assert math.fsum(row.share for row in parts) == pytest.approx(1)
    assert sum(row.num_entries for row in parts) == sum(math.prod(s) for s in SHAPES.values())


def test_norms_are_those_of_the_tensors_of_each_part(skill):
    vector, found = load_skill(skill).vector, inspect(skill)
    expected = {
        "layer 0": squares(vector, lambda name: ".layers.0." in name),
        "layer 1": squares(vector, lambda name: ".layers.1." in name),
        "outside layers": squares(vector, lambda name: ".layers." not in name),
    }
    assert [row.part for row in found.by_layer] == list(expected)
    total = sum(expected.values())
    for row in found.by_layer:
        assert row.norm == pytest.approx(math.sqrt(expected[row.part]), rel=1e-12)
        assert row.share == pytest.approx(expected[row.part] / total, rel=1e-12)


def test_modules_take_weight_and_bias_of_all_layers_together_largest_first(skill):
    vector, found = load_skill(skill).vector, inspect(skill)
    modules = {row.part: row for row in found.by_module}
    q_proj = squares(vector, lambda name: ".q_proj." in name)
    assert modules["q_proj"].norm == pytest.approx(math.sqrt(q_proj), rel=1e-12)
    assert modules["q_proj"].num_entries == 2 * 24 * 16 + 24
    assert modules.keys() == {"down_proj", "q_proj", "embed_tokens", "norm", "input_layernorm"}
    norms = [row.norm for row in found.by_module]
    assert norms == sorted(norms, reverse=True)


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (4, 4) for layer in (0, 2, 10, 11)}
    make_skill(tmp_path / "skill", seed=1, shapes=shapes)
    rows = [row.part for row in inspect(tmp_path / "skill").by_layer]
    assert rows == ["layer 0", "layer 2", "layer 10", "layer 11"]


# What bfloat16 parents would have cost


def test_the_cost_of_bfloat16_parents_is_what_subtracting_them_gives(skill):
    rl, sft = (load_weights(skill.with_suffix(suffix)) for suffix in (".rl", ".sft"))
    moved = joined({n: rl[n].bfloat16().double() - sft[n].bfloat16().double() for n in rl})
    wanted = joined({name: rl[name].double() - sft[name].double() for name in rl})
    found = inspect(skill).parents_in_bf16
    assert 0.2 < found.share_changed < 0.8
    assert found.dtype == "bfloat16"
    assert found_cost(found) == pytest.approx(rounding_cost(moved, wanted), rel=1e-6)


def test_the_share_of_changed_entries_is_that_of_each_part(skill):
    rl, sft = (load_weights(skill.with_suffix(suffix)) for suffix in (".rl", ".sft"))
    changed = {name: rl[name].bfloat16() != sft[name].bfloat16() for name in rl}
    for row, part in zip(inspect(skill).by_layer[:2], (".layers.0.", ".layers.1."), strict=True):
        mine = torch.cat([mask.reshape(-1) for name, mask in changed.items() if part in name])
        assert row.share_bf16_changed == mine.double().mean().item()


def test_parents_that_bfloat16_holds_lose_nothing(tmp_path):
    sft = {name: w.bfloat16().float() for name, w in random_tensors(0, SMALL).items()}
    make_skill_of(tmp_path / "skill", rl={n: w * 2 for n, w in sft.items()}, sft=sft)
    found = inspect(tmp_path / "skill").parents_in_bf16
    assert found_cost(found) == pytest.approx((1.0, 1.0, 0.0), abs=1e-7)


def test_updates_below_every_bfloat16_step_leave_nothing(tmp_path):
    sft = {name: torch.ones(shape) for name, shape in SMALL.items()}
    make_skill_of(tmp_path / "skill", rl={n: w + 2**-12 for n, w in sft.items()}, sft=sft)
    found = inspect(tmp_path / "skill")
    assert found.parents_in_bf16.share_changed == 0
    assert found.parents_in_bf16.noise_to_signal == 1
    assert math.isnan(found.parents_in_bf16.cosine)
    assert strict_json(found)["parents_in_bf16"]["cosine"] is None
    assert {row.share_bf16_changed for row in found.by_layer} == {0}


# What a target leaves of it


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_the_cost_in_a_target_is_what_rounding_the_sum_gives(scale, skill, target):
    before, vector = load_weights(target), load_skill(skill).vector
    moved = joined(
        {
            n: (before[n] + vector[n] * scale).bfloat16().double() - before[n].bfloat16().double()
            for n in vector
        }
    )
    wanted = joined({name: tensor * scale for name, tensor in vector.items()})
    found = inspect(skill, target=target, scale=scale).in_target
    assert 0.05 < found.share_changed < 0.9
    assert found.dtype == "bfloat16"
    assert found_cost(found) == pytest.approx(rounding_cost(moved, wanted), rel=1e-9)


def test_a_float16_target_is_measured_in_float16(skill, target, tmp_path):
    half = {name: tensor.half() for name, tensor in load_weights(target).items()}
    make_checkpoint(tmp_path / "half", half)
    vector = load_skill(skill).vector
    moved = joined({n: (half[n].float() + vector[n]).half().double() - half[n] for n in vector})
    found = inspect(skill, target=tmp_path / "half").in_target
    assert found.dtype == "float16"
    assert found_cost(found) == pytest.approx(rounding_cost(moved, joined(vector)), rel=1e-9)


def test_a_part_is_measured_on_its_own_entries(skill, target, tmp_path):
    select(skill, tmp_path / "part", layers="1")
    before, vector = load_weights(target), load_skill(tmp_path / "part").vector
    assert vector.keys() == {Q1, D1}
    moved = joined(
        {
            n: (before[n] + vector[n]).bfloat16().double() - before[n].bfloat16().double()
            for n in vector
        }
    )
    found = inspect(tmp_path / "part", target=target).in_target
    assert found_cost(found) == pytest.approx(rounding_cost(moved, joined(vector)), rel=1e-9)


def test_an_adapter_is_measured_as_its_dense_form(target, tmp_path):
    make_adapter(tmp_path / "adapter", Q0, WIDE, seed=3)
    extract(tmp_path / "adapter", target, tmp_path / "lora")
    before, vector = load_weights(target), load_skill(tmp_path / "lora").vector
    moved = joined(
        {
            n: (before[n] + vector[n]).bfloat16().double() - before[n].bfloat16().double()
            for n in vector
        }
    )
    found = inspect(tmp_path / "lora", target=target)
    assert found.parents_in_bf16 is None
    expected = rounding_cost(moved, joined(vector))
    assert found_cost(found.in_target) == pytest.approx(expected, rel=1e-9)


def test_scale_zero_changes_nothing_and_is_still_json(skill, target):
    found = inspect(skill, target=target, scale=0.0)
    assert found.in_target.share_changed == 0
    assert strict_json(found)["in_target"] == {
        "dtype": "bfloat16",
        "share_changed": 0.0,
        "cosine": None,
        "noise_to_signal": None,
    }


def test_workers_and_chunks_do_not_change_a_number(skill, target):
    found = [
        inspect(skill, target=target, settings=StreamSettings(workers=w, chunk_blocks=c))
        for w, c in [(1, 1), (2, 3), (4, 5)]
    ]
    assert found[0] == found[1] == found[2]


# Output


def test_json_holds_manifest_norms_and_costs(skill, target):
    values = strict_json(inspect(skill, target=target))
    assert values["manifest"]["vector_hash"] == load_skill(skill).manifest.vector_hash
    assert values["manifest"]["tensors"][Q0]["shape"] == [24, 16]
    assert values["by_layer"][0]["part"] == "layer 0"
    assert values["by_layer"][0].keys() == {
        "part",
        "norm",
        "share",
        "num_entries",
        "share_bf16_changed",
    }
    assert values["parents_in_bf16"]["dtype"] == values["in_target"]["dtype"] == "bfloat16"


def test_a_zero_vector_is_shown_without_a_division_by_zero(tmp_path, capsys):
    weights = random_tensors(0, SMALL)
    make_skill_of(tmp_path / "skill", rl=weights, sft=weights)
    found = inspect(tmp_path / "skill", target=tmp_path / "skill.sft")
    assert [row.share for row in found.by_layer] == [0.0, 0.0, 0.0]
    assert strict_json(found)["in_target"]["cosine"] is None
    print_inspection(found)
    assert "Skill vector: unnamed" in capsys.readouterr().out


def test_a_hash_is_printed_whole_so_that_it_can_be_searched_and_copied(skill, capsys):
    print_inspection(inspect(skill))
    assert load_skill(skill).manifest.vector_hash in capsys.readouterr().out


def test_a_combination_has_norms_but_no_cost_of_its_parents(skill, tmp_path):
    combine([skill, skill], tmp_path / "sum")
    found = inspect(tmp_path / "sum")
    assert found.parents_in_bf16 is None
    assert {row.share_bf16_changed for row in found.by_layer} == {None}
    assert found.manifest.norm == pytest.approx(2 * load_skill(skill).manifest.norm)


# What is refused


def test_a_target_without_a_parameter_is_refused(skill, tmp_path):
    weights = random_tensors(0, {name: shape for name, shape in SHAPES.items() if name != Q0})
    make_checkpoint(tmp_path / "other", weights)
    with pytest.raises(SkillVectorError, match=Q0):
        inspect(skill, target=tmp_path / "other")


def test_a_model_is_no_skill(target):
    with pytest.raises(SkillVectorError, match=r"must be a skill folder with a skill\.json"):
        inspect(target)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_is_refused(scale, skill, target):
    with pytest.raises(SkillVectorError, match="scale must be a finite number"):
        inspect(skill, target=target, scale=scale)


def test_a_damaged_vector_is_not_measured(tmp_path, target):
    """``inject`` refuses it, so its cost must not be shown either."""
    make_skill(tmp_path / "skill", seed=1)
    flip_byte(tmp_path / "skill" / "model.safetensors", -1)
    with pytest.raises(SkillVectorError, match="tensors differ"):
        inspect(tmp_path / "skill", target=target)
