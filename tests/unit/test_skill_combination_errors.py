"""Vectors and weights that cannot be combined."""

import json

import pytest
import torch

from past_ray.errors import SkillVectorError, StorageError
from past_ray.skill import MergeRule, combine, extract
from tests.skill_folders import contents, make_checkpoint, nudged, random_tensors
from tests.skill_ingredients import (
    one_fixture,  # noqa: F401
    two_fixture,  # noqa: F401
)
from tests.skill_models import Q1, SHAPES, SMALL, is_absent, make_model, make_skill_of


def corrupt(folder, name):
    """Change the last bit of the first entry of a stored vector's tensor."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    content[8 + size + json.loads(content[8 : 8 + size])[name]["data_offsets"][0]] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], []])
def test_another_number_of_weights_is_refused(weights, one, two, tmp_path):
    with pytest.raises(SkillVectorError, match=f"got {len(weights)} weights for 2 vectors"):
        combine([one, two], tmp_path / "x", weights=weights)
    assert is_absent(tmp_path / "x")


def test_no_vectors_are_refused(tmp_path):
    with pytest.raises(SkillVectorError, match="for 0 vectors"):
        combine([], tmp_path / "x")


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(weight, one, two, tmp_path):
    """It must not be blamed on the vectors: "training diverged" sends the reader the wrong way."""
    with pytest.raises(SkillVectorError, match="weights must be finite"):
        combine([one, two], tmp_path / "x", weights=[1, weight])
    assert is_absent(tmp_path / "x")


def test_another_architecture_is_refused(one, tmp_path):
    parents = [make_model(tmp_path / role, seed=5, model_type="other") for role in ("rl", "sft")]
    extract(*parents, tmp_path / "other")
    with pytest.raises(SkillVectorError, match="model_type is qwen2 and other"):
        combine([one, tmp_path / "other"], tmp_path / "x")
    assert is_absent(tmp_path / "x")


def test_another_shape_is_refused_by_name(one, tmp_path):
    weights = random_tensors(0, SHAPES) | {Q1: torch.ones(24, 17)}
    make_skill_of(tmp_path / "other", rl=weights, sft=weights)
    with pytest.raises(SkillVectorError, match=r"1\.self_attn\.q_proj\.weight \(24, 16\)"):
        combine([one, tmp_path / "other"], tmp_path / "x")


def with_base(tmp_path, name, *, seed):
    """Write a skill vector whose manifest names its base."""
    base = random_tensors(seed, SMALL)
    weights = {"rl": nudged(base, seed=11), "sft": nudged(base, seed=12), "base": base}
    rl, sft, origin = (make_checkpoint(tmp_path / f"{name} {x}", weights[x]) for x in weights)
    extract(rl, sft, tmp_path / name, base=origin)
    return tmp_path / name


def test_recorded_bases_that_differ_are_refused(tmp_path):
    a, b = with_base(tmp_path, "a", seed=1), with_base(tmp_path, "b", seed=2)
    with pytest.raises(SkillVectorError, match="vectors must come from one base, got 2"):
        combine([a, b], tmp_path / "x")
    assert is_absent(tmp_path / "x")
    combine([a, a], tmp_path / "same base")


def test_unrelated_weights_are_refused_though_no_base_was_recorded(tmp_path):
    """``inject`` finds this by the sketches, which both manifests hold; ``combine`` can as well."""
    for name, seed in (("a", 1), ("b", 2)):
        base = random_tensors(seed, SMALL)
        make_skill_of(tmp_path / name, rl=nudged(base, seed=11), sft=base)
    with pytest.raises(SkillVectorError, match="base"):
        combine([tmp_path / "a", tmp_path / "b"], tmp_path / "x")


@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_a_damaged_vector_is_refused_by_name(method, one, two, tmp_path):
    """The result's manifest says which vectors it was made of, so it must be made of those."""
    corrupt(two, Q1)
    with pytest.raises(SkillVectorError, match=Q1):
        combine([one, two], tmp_path / "x", rule=MergeRule(method=method))
    assert is_absent(tmp_path / "x")


def test_the_result_must_not_replace_a_vector_it_is_made_of(one, two):
    before = contents(one)
    with pytest.raises(SkillVectorError, match="different folders"):
        combine([one, two], one)
    assert contents(one) == before


def test_a_missing_vector_is_refused(one, tmp_path):
    with pytest.raises((SkillVectorError, StorageError), match="nowhere"):
        combine([one, tmp_path / "nowhere"], tmp_path / "x")
