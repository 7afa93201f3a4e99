import json
import logging
import re
from itertools import pairwise

import pytest
import torch

from past_ray.errors import SkillVectorError
from past_ray.skill import extract, inject, load_manifest
from past_ray.skill.checkpoint import hash_weights, load_weights, save_checkpoint
from past_ray.skill.lineage import LEAST_BASE_COSINE, sketch
from past_ray.skill.weights import open_weights
from tests.skill_folders import (
    SHAPES,
    assert_same_bits,
    make_checkpoint,
    names,
    nudged,
    random_tensors,
    write_json,
)


@pytest.fixture
def base(tmp_path):
    return make_checkpoint(tmp_path / "base", random_tensors(0))


@pytest.fixture
def skill(base, tmp_path):
    """A vector whose manifest records the hash of its base."""
    sft = nudged(load_weights(base), 1)
    make_checkpoint(tmp_path / "sft", sft)
    make_checkpoint(tmp_path / "rl", nudged(sft, 2))
    extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill", base=base)
    return tmp_path / "skill"


@pytest.fixture
def skill_without_base(skill, tmp_path):
    extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "without")
    return tmp_path / "without"


@pytest.fixture
def relative(base, tmp_path):
    return make_checkpoint(tmp_path / "relative", nudged(load_weights(base), 3, by=0.1))


@pytest.fixture
def stranger(tmp_path):
    return make_checkpoint(tmp_path / "stranger", random_tensors(9))


def lineage_of(folder):
    return json.loads((folder / "past_ray.json").read_text())


def refusal(target, skill, out):
    with pytest.raises(SkillVectorError) as caught:
        inject(target, skill, out)
    assert not out.exists()
    message = str(caught.value)
    assert f"target {target} must be fine-tuned from the base of the vector's parents" in message
    assert "or allow another one with --allow-other-base (allow_other_base=True)" in message
    return message


def test_a_target_that_records_the_same_base_is_accepted_whatever_its_weights(
    base, skill, stranger, tmp_path
):
    write_json(stranger / "past_ray.json", {"base_hash": hash_weights(base)})
    inject(stranger, skill, tmp_path / "adapted")
    assert lineage_of(tmp_path / "adapted")["base_hash"] == hash_weights(base)


def test_a_target_that_records_another_base_is_refused_whatever_its_weights(
    base, skill, relative, tmp_path
):
    write_json(relative / "past_ray.json", {"base_hash": "f" * 64})
    message = refusal(relative, skill, tmp_path / "adapted")
    assert f"({hash_weights(base)}), but it records the base {'f' * 64}." in message


def test_without_a_record_the_weights_of_a_relative_are_accepted(relative, skill, tmp_path):
    inject(relative, skill, tmp_path / "adapted")
    assert lineage_of(tmp_path / "adapted")["base_hash"] == load_manifest(skill).base_hash


@pytest.mark.parametrize("vector", ["skill", "skill_without_base"])
def test_without_a_record_the_weights_of_a_stranger_are_refused(
    request, vector, stranger, tmp_path
):
    message = refusal(stranger, request.getfixturevalue(vector), tmp_path / "adapted")
    found = re.search(r"cosine of (-?0\.\d\d) to the vector's SFT parent \(at least 0\.5", message)
    assert found
    assert abs(float(found[1])) < 0.3


def test_a_record_of_the_target_alone_does_not_decide(
    skill_without_base, relative, stranger, tmp_path
):
    for target in (relative, stranger):
        write_json(target / "past_ray.json", {"base_hash": "f" * 64})
    inject(relative, skill_without_base, tmp_path / "adapted")
    refusal(stranger, skill_without_base, tmp_path / "strange")


def test_another_base_may_be_allowed_and_is_warned_about(stranger, skill, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        inject(stranger, skill, tmp_path / "adapted", allow_other_base=True)
    assert "must be fine-tuned from the base" in caplog.text
    assert "Injecting all the same" in caplog.text
    vector = {n: a - b for (n, a), b in zip(*parents_of(tmp_path), strict=True)}
    weights = load_weights(stranger)
    expected = {name: weights[name] + vector[name] for name in weights}
    assert_same_bits(load_weights(tmp_path / "adapted"), expected)


def parents_of(folder):
    return load_weights(folder / "rl").items(), load_weights(folder / "sft").values()


def test_a_model_of_another_base_does_not_become_a_relative_by_an_injection(
    stranger, skill, tmp_path
):
    inject(stranger, skill, tmp_path / "adapted", scale=0.1, allow_other_base=True)
    refusal(tmp_path / "adapted", skill, tmp_path / "again")


def test_a_model_that_records_another_base_still_does_after_an_injection(relative, skill, tmp_path):
    write_json(relative / "past_ray.json", {"base_hash": "f" * 64})
    inject(relative, skill, tmp_path / "adapted", allow_other_base=True)
    assert lineage_of(tmp_path / "adapted")["base_hash"] == "f" * 64
    refusal(tmp_path / "adapted", skill, tmp_path / "again")


def test_a_matrix_of_zeros_does_not_make_a_model_a_stranger_to_itself(tmp_path):
    shapes = {f"model.layers.{n}.mlp.up_proj.weight": (6, 6) for n in range(3)}
    sft = random_tensors(0, shapes)
    for name in list(shapes)[:2]:
        sft[name].zero_()  # As projections that start at zero are before their training.
    make_checkpoint(tmp_path / "sft", sft)
    make_checkpoint(tmp_path / "rl", nudged(sft, 1))
    extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    inject(tmp_path / "sft", tmp_path / "skill", tmp_path / "adapted")
    assert_same_bits(load_weights(tmp_path / "adapted"), load_weights(tmp_path / "rl"))


def test_vectors_and_norms_are_no_evidence(tmp_path):
    # Norms are all about 1 in every model; here they are all that agrees.
    tensors, others = random_tensors(0), random_tensors(9)
    for weights in (tensors, others):
        weights["model.norm.weight"] = torch.ones(6)
    make_checkpoint(tmp_path / "sft", tensors)
    make_checkpoint(tmp_path / "rl", nudged(tensors, 1))
    make_checkpoint(tmp_path / "other", others)
    manifest = extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    assert set(manifest.base_sketch) == {n for n, shape in SHAPES.items() if len(shape) == 2}
    refusal(tmp_path / "other", tmp_path / "skill", tmp_path / "adapted")


def test_a_sketch_has_the_middle_weights_of_matrices(tmp_path):
    tensors = {"w": torch.arange(36.0).view(6, 6), "x": torch.tensor([[7.0], [8.0]])}
    make_checkpoint(tmp_path / "model", tensors | {"y": torch.ones(6)})
    found = sketch(open_weights(tmp_path / "model"))
    assert found == {"w": tuple(float(n) for n in range(10, 26)), "x": (7.0, 8.0)}


@pytest.mark.parametrize("num_matrices", [63, 64, 65, 127, 128, 192, 1000])
def test_sketched_matrices_are_spread_over_the_whole_model(tmp_path, num_matrices):
    tensors = {f"w{n:04d}": torch.ones(1, 1) for n in range(num_matrices)}
    make_checkpoint(tmp_path / "model", tensors)
    chosen = [int(name[1:]) for name in sketch(open_weights(tmp_path / "model"))]
    assert min(num_matrices, 32) <= len(chosen) <= 64
    gaps = {after - before for before, after in pairwise([*chosen, num_matrices])}
    assert max(gaps) <= 2 * num_matrices / len(chosen)


def test_every_matrix_counts_the_same_however_large_its_weights(tmp_path):
    shapes = {f"w{n}": (6, 6) for n in range(4)}
    sft, target = random_tensors(0, shapes), random_tensors(9, shapes)
    target["w0"] = sft["w0"].clone()  # One of four agrees: a mean cosine near 0.25.
    for weights in (sft, target):
        weights["w0"] *= 1e6
    make_checkpoint(tmp_path / "sft", sft)
    make_checkpoint(tmp_path / "rl", nudged(sft, 1))
    make_checkpoint(tmp_path / "target", target)
    extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    refusal(tmp_path / "target", tmp_path / "skill", tmp_path / "adapted")
    assert LEAST_BASE_COSINE == 0.5


def test_a_refused_target_leaves_nothing_behind(stranger, skill, tmp_path):
    before = names(tmp_path)
    refusal(stranger, skill, tmp_path / "adapted")
    assert names(tmp_path) == before


def test_the_base_is_no_stranger_though_it_records_what_it_grew_from_itself(tmp_path):
    shapes = {"model.layers.0.mlp.up_proj.weight": (8, 8)}
    scratch = make_checkpoint(tmp_path / "scratch", random_tensors(0, shapes))
    tensors = random_tensors(1, shapes)
    save_checkpoint(
        tmp_path / "base", tensors, like=scratch, lineage={"base_hash": hash_weights(scratch)}
    )
    make_checkpoint(tmp_path / "sft", nudged(tensors, 2))
    make_checkpoint(tmp_path / "rl", nudged(tensors, 3))
    extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill", base=tmp_path / "base")
    inject(tmp_path / "base", tmp_path / "skill", tmp_path / "pre-injected")
    assert (tmp_path / "pre-injected" / "past_ray.json").exists()
