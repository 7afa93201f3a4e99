"""Skill vectors injected into a target that is an adapter."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from past_ray.errors import SkillVectorError
from past_ray.locations import open_folder
from past_ray.skill import Rounding, extract, inject, load_manifest, sweep
from past_ray.skill.adapter import lora_delta
from past_ray.skill.adapter_folder import read_adapter
from past_ray.skill.artefact import adapter_hash
from past_ray.skill.checkpoint import hash_weights
from tests.peft_adapters import (
    FORMS,
    PER_LAYER,
    adapters_fixture,  # noqa: F401
    base_fixture,  # noqa: F401
    factor_of,
    factors_of,
    load,
    logits,
    logits_with,
    make_peft_adapter,
    skill_fixture,  # noqa: F401
    summed,
    target_fixture,  # noqa: F401
)
from tests.skill_folders import contents, make_checkpoint, random_tensors
from tests.skill_models import D1, Q0, WIDE, distance, is_absent, make_adapter, make_model
from tests.skill_models import make_skill as make_dense_skill


def delta_of(folder):
    return {name: lora_delta(module).double() for name, module in factors_of(folder).items()}


@pytest.mark.parametrize("target_form", FORMS)
@pytest.mark.parametrize("skill_form", ["rslora", "patterns"])
def test_peft_gives_the_base_and_both_deltas(target_form, skill_form, base, adapters, tmp_path):
    """rsLoRA, alpha_pattern and rank_pattern of either side are folded into the factors."""
    (target, of_target), (adapter, of_skill) = adapters[target_form], adapters[skill_form]
    extract(adapter, base, tmp_path / "skill")
    inject(target, tmp_path / "skill", tmp_path / "adapted", scale=-0.7)
    changes = summed(of_target, {name: -0.7 * change for name, change in of_skill.items()})
    found = logits(peft.PeftModel.from_pretrained(load(base), tmp_path / "adapted"))
    expected = logits_with(base, tmp_path, changes)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found - logits_with(base, tmp_path, of_target)).abs().max() > 0.01


def test_scales_by_layer_and_module_reach_the_factors(base, adapters, skill, tmp_path):
    target, of_target = adapters["plain"]
    inject(target, skill, tmp_path / "adapted", scale=PER_LAYER)
    found, of_skill = delta_of(tmp_path / "adapted"), adapters["patterns"][1]
    expected = summed(of_target, {n: factor_of(n) * change for n, change in of_skill.items()})
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert distance(found[name], change) < 1e-6


def test_ranks_are_laid_side_by_side_and_filled_up_to_one_that_vllm_serves(tmp_path):
    sft = make_model(tmp_path / "sft", seed=1)
    make_adapter(tmp_path / "target", Q0, D1, seed=2, rank=5, scaling=2.0)
    make_adapter(tmp_path / "adapter", Q0, WIDE, seed=3, rank=6, scaling=0.5)
    extract(tmp_path / "adapter", sft, tmp_path / "skill")
    inject(tmp_path / "target", tmp_path / "skill", tmp_path / "adapted", scale=3.0)
    # Written adapters have ranks that vLLM accepts, 8 each.
    target, skill, adapted = (factors_of(tmp_path / n) for n in ("target", "skill", "adapted"))
    assert (target[Q0].rank, skill[Q0].rank) == (8, 8)
    assert {name: module.rank for name, module in adapted.items()} == {Q0: 16, D1: 16, WIDE: 16}
    assert torch.equal(adapted[Q0].a, torch.cat([target[Q0].a, skill[Q0].a]))
    assert torch.equal(adapted[Q0].b, torch.cat([target[Q0].b, 3 * skill[Q0].b], dim=1))
    assert not adapted[D1].a[8:].any()


def test_scale_zero_gives_the_target_adapter(base, adapters, skill, tmp_path):
    target, of_target = adapters["rslora"]
    inject(target, skill, tmp_path / "adapted", scale=0.0)
    for name, change in delta_of(tmp_path / "adapted").items():
        expected = of_target.get(name)
        assert not change.any() if expected is None else distance(change, expected) < 1e-6


def test_a_sweep_gives_an_adapter_for_each_scale(adapters, skill, tmp_path):
    target = adapters["plain"][0]
    sweep(target, skill, {0.5: tmp_path / "half", 1.0: tmp_path / "one"})
    inject(target, skill, tmp_path / "alone", scale=0.5)
    assert contents(tmp_path / "half") == contents(tmp_path / "alone")
    half, one = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("half", "one"))
    assert half.keys() == one.keys()
    assert any(not torch.equal(half[key], one[key]) for key in half)


def test_the_adapted_adapter_says_what_it_is_made_of(adapters, skill, tmp_path):
    target = adapters["plain"][0]
    inject(target, skill, tmp_path / "adapted", scale=0.5)
    lineage = json.loads((tmp_path / "adapted" / "past_ray.json").read_text())
    config = json.loads((tmp_path / "adapted" / "adapter_config.json").read_text())
    original = json.loads((target / "adapter_config.json").read_text())
    assert lineage["skill_hash"] == load_manifest(skill).vector_hash
    assert lineage["scale"] == 0.5
    assert config["base_model_name_or_path"] == original["base_model_name_or_path"]


def test_the_adapted_adapter_records_the_target_adapter(adapters, skill, tmp_path):
    """A dense target is recorded by its hash; an adapter has one too."""
    target = adapters["plain"][0]
    inject(target, skill, tmp_path / "adapted")
    lineage = json.loads((tmp_path / "adapted" / "past_ray.json").read_text())
    assert lineage["target_hash"] == adapter_hash(read_adapter(open_folder(target)))


def test_a_dense_vector_for_an_adapter_is_refused_with_what_to_do(tmp_path):
    make_dense_skill(tmp_path / "dense", seed=1)
    make_adapter(tmp_path / "target", Q0, seed=2)
    with pytest.raises(SkillVectorError, match=r"Extract it with --rank, or merge the target's"):
        inject(tmp_path / "target", tmp_path / "dense", tmp_path / "adapted")
    assert is_absent(tmp_path / "adapted")


def test_an_adapter_of_a_model_of_another_size_is_refused(adapters, skill, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    make_adapter(tmp_path / "target", name, seed=2)
    with pytest.raises(SkillVectorError, match=r"q_proj\.weight \(24, 16\) and \(64, 64\)"):
        inject(tmp_path / "target", skill, tmp_path / "adapted")
    assert is_absent(tmp_path / "adapted")


@pytest.mark.parametrize("rounding", [Rounding(dtype="bfloat16"), Rounding(seed=3)], ids=str)
def test_rounding_that_an_adapter_does_not_get_is_refused(rounding, adapters, skill, tmp_path):
    """Adapters are written in float32; what was asked for must not be dropped silently."""
    with pytest.raises(SkillVectorError, match="adapter"):
        inject(adapters["plain"][0], skill, tmp_path / "adapted", rounding=rounding)


def test_an_adapter_that_records_another_base_is_refused(base, adapters, target, tmp_path):
    """As for a dense target; only where nothing is recorded have shapes to decide."""
    extract(adapters["patterns"][0], base, tmp_path / "skill", base=base)
    extract(adapters["plain"][0], target, tmp_path / "other", base=target)
    make_peft_adapter(base, tmp_path / "start", seed=9, **FORMS["plain"])
    inject(tmp_path / "start", tmp_path / "other", tmp_path / "target")
    lineage = json.loads((tmp_path / "target" / "past_ray.json").read_text())
    assert lineage["base_hash"] == hash_weights(target) != hash_weights(base)
    with pytest.raises(SkillVectorError, match="it records the base"):
        inject(tmp_path / "target", tmp_path / "skill", tmp_path / "adapted")


def test_a_sum_of_ranks_beyond_vllm_is_refused_with_what_to_do(tmp_path):
    shapes = {WIDE: (600, 600)}
    sft = make_checkpoint(tmp_path / "sft", random_tensors(0, shapes))
    make_adapter(tmp_path / "target", WIDE, seed=1, rank=320, shapes=shapes)
    make_adapter(tmp_path / "adapter", WIDE, seed=2, rank=256, shapes=shapes)
    extract(tmp_path / "adapter", sft, tmp_path / "skill")
    with pytest.raises(SkillVectorError, match=r"at most 512, .* got 576 .* merge it"):
        inject(tmp_path / "target", tmp_path / "skill", tmp_path / "adapted")
    assert is_absent(tmp_path / "adapted")
