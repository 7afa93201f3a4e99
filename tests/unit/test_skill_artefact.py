import json
import logging
from datetime import datetime

import pytest
import torch
from safetensors.torch import load_file, save_file

from past_ray.errors import SkillVectorError, StorageError
from past_ray.skill.artefact import (
    extract_to_folder,
    inject_to_folder,
    load_manifest,
    load_skill,
)
from past_ray.skill.checkpoint import hash_tensors, hash_weights, load_weights, save_checkpoint
from tests.tiny_model import make_tiny_model


@pytest.fixture
def base(tmp_path):
    return make_tiny_model(tmp_path / "base")


@pytest.fixture
def sft(base, tmp_path):
    return nudged(base, tmp_path / "sft", 1.125)


@pytest.fixture
def rl(sft, tmp_path):
    return nudged(sft, tmp_path / "rl", 1.25)


@pytest.fixture
def skill(rl, sft, tmp_path):
    extract(rl, sft, tmp_path / "skill")
    return tmp_path / "skill"


def nudged(folder, out, factor):
    """Save the model in ``folder`` with every weight times ``factor``."""
    weights = {name: weight * factor for name, weight in load_weights(folder).items()}
    save_checkpoint(out, weights, like=folder)
    return out


def extract(rl, sft, out, *, refinement_round=1, **options):
    return extract_to_folder(
        rl, sft, out, task="world", refinement_round=refinement_round, seed=7, **options
    )


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_injecting_into_its_own_parent_gives_the_rl_checkpoint(rl, sft, skill, tmp_path):
    inject_to_folder(sft, skill, tmp_path / "adapted", scale=1.0)
    assert hash_weights(tmp_path / "adapted") == hash_weights(rl)


def test_scale_zero_gives_the_target(base, skill, tmp_path):
    inject_to_folder(base, skill, tmp_path / "adapted", scale=0.0)
    assert hash_weights(tmp_path / "adapted") == hash_weights(base)


def test_the_vector_on_disk_is_rl_minus_sft_in_float32(rl, sft, skill):
    vector, _ = load_skill(skill)
    after, before = load_weights(rl), load_weights(sft)
    assert_same(vector, {name: after[name] - before[name] for name in after})


def test_the_manifest_tells_where_the_vector_comes_from(base, rl, sft, tmp_path):
    manifest = extract(rl, sft, tmp_path / "skill", base_folder=base)
    vector, loaded = load_skill(tmp_path / "skill")
    assert loaded == manifest
    assert manifest.rl_hash == hash_weights(rl)
    assert manifest.sft_hash == hash_weights(sft)
    assert manifest.base_hash == hash_weights(base)
    assert manifest.vector_hash == hash_tensors(vector)
    assert (manifest.task, manifest.refinement_round, manifest.seed) == ("world", 1, 7)
    assert (manifest.dtype, manifest.rl_dtype) == ("float32", "float32")
    assert manifest.fingerprint.model_type == "qwen2"
    assert datetime.fromisoformat(manifest.created).utcoffset() is not None
    norm = manifest.norms["model.norm.weight"]  # 64 ones, times 1.125, times 0.25
    assert norm == 8 * 1.125 * 0.25
    assert manifest.vector_hash in (tmp_path / "skill" / "README.md").read_text()


def test_the_adapted_folder_is_a_model_with_its_lineage(base, skill, tmp_path):
    inject_to_folder(base, skill, tmp_path / "adapted", scale=0.5)
    lineage = json.loads((tmp_path / "adapted" / "past_ray.json").read_text())
    assert lineage["target_hash"] == hash_weights(base)
    assert lineage["skill_hash"] == load_manifest(skill).vector_hash
    assert lineage["scale"] == 0.5
    copied = {entry.name for entry in base.iterdir()}
    assert {entry.name for entry in (tmp_path / "adapted").iterdir()} == copied | {"past_ray.json"}


def test_a_bfloat16_target_stays_bfloat16(base, skill, tmp_path):
    half = {name: weight.bfloat16() for name, weight in load_weights(base).items()}
    save_checkpoint(tmp_path / "half", half, like=base)
    inject_to_folder(tmp_path / "half", skill, tmp_path / "adapted", scale=1.0)
    vector, _ = load_skill(skill)
    expected = {name: (half[name].float() + vector[name]).bfloat16() for name in half}
    assert_same(load_weights(tmp_path / "adapted"), expected)


def test_a_tied_model_goes_through_with_one_embedding(tmp_path):
    sft = make_tiny_model(tmp_path / "sft", tie_word_embeddings=True)
    rl = nudged(sft, tmp_path / "rl", 1.5)
    extract(rl, sft, tmp_path / "skill")
    assert "lm_head.weight" not in load_skill(tmp_path / "skill")[0]
    inject_to_folder(sft, tmp_path / "skill", tmp_path / "adapted", scale=1.0)
    assert hash_weights(tmp_path / "adapted") == hash_weights(rl)


def test_tying_on_one_side_only_is_refused(sft, tmp_path):
    tied = make_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(SkillVectorError, match="tied_embeddings is True and False"):
        extract(tied, sft, tmp_path / "skill")
    assert not (tmp_path / "skill").exists()


def test_other_names_are_refused(rl, sft, tmp_path):
    weights = load_weights(rl)
    weights["model.adapter.weight"] = weights.pop("model.norm.weight")
    save_checkpoint(rl, weights, like=rl)
    with pytest.raises(
        SkillVectorError, match=r"1 only in rl \(first: \[model\.adapter\.weight\]\)"
    ):
        extract(rl, sft, tmp_path / "skill")


def test_other_shapes_are_refused(rl, sft, tmp_path):
    weights = load_weights(rl)
    weights["model.norm.weight"] = torch.ones(32)
    save_checkpoint(rl, weights, like=rl)
    with pytest.raises(SkillVectorError, match=r"model\.norm\.weight \(32,\) and \(64,\)"):
        extract(rl, sft, tmp_path / "skill")


def test_a_target_with_another_tokenizer_is_refused(base, skill, tmp_path):
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zebra"] = 400
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SkillVectorError, match="tokenizer is"):
        inject_to_folder(base, skill, tmp_path / "adapted", scale=1.0)
    assert not (tmp_path / "adapted").exists()


def test_a_base_of_another_size_is_refused(base, rl, sft, tmp_path):
    edit_json(base / "config.json", hidden_size=128)
    with pytest.raises(SkillVectorError, match="hidden_size is 128 and 64"):
        extract(rl, sft, tmp_path / "skill", base_folder=base)


def test_a_changed_vector_is_refused(skill):
    vector = load_file(skill / "model.safetensors")
    vector["model.norm.weight"][0] += 1e-6
    save_file(vector, skill / "model.safetensors")
    with pytest.raises(SkillVectorError, match="changed or damaged"):
        load_skill(skill)


def test_a_cut_off_vector_is_refused(skill):
    content = (skill / "model.safetensors").read_bytes()
    (skill / "model.safetensors").write_bytes(content[:1000])
    with pytest.raises(SkillVectorError, match="readable"):
        load_skill(skill)


def test_a_model_folder_is_no_skill_folder_and_the_other_way_round(base, skill, tmp_path):
    with pytest.raises(SkillVectorError, match=r"skill folder with a skill\.json"):
        inject_to_folder(base, base, tmp_path / "adapted", scale=1.0)
    with pytest.raises(StorageError, match="must be a Hugging Face model folder"):
        inject_to_folder(skill, skill, tmp_path / "adapted", scale=1.0)


def test_a_newer_format_names_the_version_that_wrote_it(skill):
    edit_json(skill / "skill.json", format_version=2, past_ray_version="9.9.9")
    with pytest.raises(SkillVectorError, match=r"format_version 1, got 2.*9\.9\.9"):
        load_skill(skill)


def test_an_unknown_key_in_the_manifest_is_refused(skill):
    edit_json(skill / "skill.json", refinment_round=3)
    with pytest.raises(SkillVectorError, match="refinment_round"):
        load_manifest(skill)


def test_a_later_round_records_its_parent(rl, sft, skill, tmp_path):
    manifest = extract(rl, sft, tmp_path / "second", refinement_round=2, parent=skill)
    assert manifest.parent_hash == load_manifest(skill).vector_hash


def test_a_parent_that_is_not_earlier_is_refused(rl, sft, skill, tmp_path):
    with pytest.raises(SkillVectorError, match=r"got round 1 in .* for round 1"):
        extract(rl, sft, tmp_path / "second", parent=skill)


def test_a_diverged_checkpoint_is_refused(rl, sft, tmp_path):
    weights = load_weights(rl)
    weights["model.norm.weight"][3] = torch.nan
    save_checkpoint(rl, weights, like=rl)
    with pytest.raises(SkillVectorError, match=r"1 tensors are not \(first: \['model\.norm"):
        extract(rl, sft, tmp_path / "skill")


def test_equal_parents_and_rounded_parents_are_warned_about(sft, tmp_path, caplog):
    half = {name: weight.bfloat16() for name, weight in load_weights(sft).items()}
    save_checkpoint(tmp_path / "half", half, like=sft)
    with caplog.at_level(logging.WARNING):
        extract(tmp_path / "half", tmp_path / "half", tmp_path / "skill")
    assert "zero vector" in caplog.text
    assert "Save parents in float32" in caplog.text


def test_a_failed_extraction_keeps_the_previous_skill(rl, sft, skill, tmp_path):
    before = load_manifest(skill)
    (rl / "model.safetensors").unlink()
    with pytest.raises(StorageError):
        extract(rl, sft, skill)
    assert load_skill(skill)[1] == before
