import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from past_ray.errors import PastRayError, SkillVectorError, StorageError
from past_ray.skill import StreamSettings, combine, extract, select, verify
from past_ray.skill.manifest import load_manifest
from tests.skill_folders import edit_json, flip_byte, make_checkpoint, random_tensors, write_json
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
    unruly,
)

NUM_ENTRIES = sum(math.prod(shape) for shape in SHAPES.values())


@pytest.fixture
def skill(tmp_path):
    """A vector with corrections in every tensor."""
    sft = random_tensors(0, SHAPES)
    make_skill_of(tmp_path / "skill", rl=unruly(sft, seed=1), sft=sft)
    return tmp_path / "skill"


@pytest.fixture
def lora(tmp_path):
    """A vector in the LoRA form; its parents are ``lora.rl``, an adapter, and ``lora.sft``."""
    make_model(tmp_path / "lora.sft", seed=7)
    make_adapter(tmp_path / "lora.rl", Q0, WIDE, D1, seed=3)
    extract(tmp_path / "lora.rl", tmp_path / "lora.sft", tmp_path / "lora")
    return tmp_path / "lora"


def flip_in_tensor(file, name, *, entry):
    """Invert the lowest bit of one entry of a four-byte tensor in a safetensors file."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + size])[name]["data_offsets"]
    flip_byte(file, 8 + size + start + 4 * entry)


def edit_manifest(skill, **changes):
    """Set keys of the manifest."""
    write_json(skill / "skill.json", json.loads((skill / "skill.json").read_text()) | changes)


def edit_record(skill, name, **changes):
    """Set keys of one tensor's record in the manifest."""
    records = json.loads((skill / "skill.json").read_text())["tensors"]
    edit_manifest(skill, tensors=records | {name: records[name] | changes})


def other_digest(skill, name, key="digest"):
    """Return a digest that differs from the recorded one in its last digit."""
    digest = getattr(load_manifest(skill).tensors[name], key)
    return digest[:-1] + ("0" if digest[-1] != "0" else "1")


def message_of(skill, **options):
    with pytest.raises(PastRayError) as caught:
        verify(skill, **options)
    return str(caught.value)


# What is right


def test_a_vector_as_it_was_written_is_right(skill):
    found = verify(skill)
    assert found.vector_hash == load_manifest(skill).vector_hash
    assert (found.num_tensors, found.num_entries) == (len(SHAPES), NUM_ENTRIES)
    assert found.parents == ()


def test_an_adapter_as_it_was_written_is_right(lora):
    found = verify(lora)
    assert (found.num_tensors, found.num_entries) == (3, 24 * 16 + 1400 * 1001 + 16 * 32)


@pytest.mark.parametrize(("workers", "chunk_blocks"), [(1, 1), (2, 3), (4, 5)])
def test_workers_and_chunks_do_not_matter(workers, chunk_blocks, skill, lora):
    settings = StreamSettings(workers=workers, chunk_blocks=chunk_blocks)
    assert verify(skill, parents=True, settings=settings) == verify(skill, parents=True)
    assert verify(lora, parents=True, settings=settings) == verify(lora, parents=True)


def test_a_copy_elsewhere_is_right(skill, tmp_path):
    shutil.copytree(skill, tmp_path / "elsewhere" / "copy")
    assert verify(tmp_path / "elsewhere" / "copy") == verify(skill)


# What was changed


@pytest.mark.parametrize("entry", [0, 262_144, 1_401_399], ids=["first", "second block", "last"])
def test_one_bit_of_the_weights_is_found(entry, skill):
    flip_in_tensor(skill / "model.safetensors", WIDE, entry=entry)
    message = message_of(skill)
    assert f"1 tensors differ (first: {WIDE})" in message
    assert str(skill) in message


def test_several_damaged_tensors_are_named(skill):
    for name in (Q0, D1):
        flip_in_tensor(skill / "model.safetensors", name, entry=3)
    assert f"2 tensors differ (first: {Q0}, {D1})" in message_of(skill)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_one_bit_of_an_adapter_is_found(factor, lora):
    key = f"base_model.model.{D1.removesuffix('.weight')}.lora_{factor}.weight"
    flip_in_tensor(lora / "adapter_model.safetensors", key, entry=5)
    message = message_of(lora)
    assert f"1 tensors differ (first: {D1})" in message
    assert str(lora) in message


def test_another_scaling_of_an_adapter_is_found(lora):
    edit_json(lora / "adapter_config.json", lora_alpha=16)
    assert f"3 tensors differ (first: {WIDE}" in message_of(lora)


@pytest.mark.parametrize("part", ["entries", "values"])
def test_one_bit_of_the_corrections_is_found(part, skill):
    # An int64 entry is two four-byte ones.
    flip_in_tensor(skill / "corrections.safetensors", f"{Q1}.{part}", entry=0)
    message = message_of(skill)
    assert Q1 in message
    assert str(skill) in message


def test_another_digest_in_the_manifest_is_found(skill):
    edit_record(skill, Q0, digest=other_digest(skill, Q0))
    assert "must have the recorded vector_hash" in message_of(skill)


def test_another_digest_of_corrections_in_the_manifest_is_found(skill):
    edit_record(skill, Q0, corrections_digest=other_digest(skill, Q0, "corrections_digest"))
    assert "must have the recorded vector_hash" in message_of(skill)


def test_another_vector_hash_in_the_manifest_is_found(skill):
    digest = load_manifest(skill).vector_hash
    edit_manifest(skill, vector_hash=digest[::-1])
    message = message_of(skill)
    assert f"{skill} must have the recorded vector_hash {digest[::-1]}, found {digest}" in message
    assert "checkpoint" not in message, "a skill folder is no checkpoint, and has no parents here"


def test_tensors_exchanged_together_with_their_digests_change_the_vector_hash(skill):
    """Data and digests agree tensor by tensor, but it is not the vector that was named."""
    tensors = load_file(skill / "model.safetensors")
    tensors[Q0], tensors[Q1] = tensors[Q1], tensors[Q0]
    save_file(tensors, skill / "model.safetensors", metadata={"format": "pt"})
    records = json.loads((skill / "skill.json").read_text())["tensors"]
    first, second = records[Q0]["digest"], records[Q1]["digest"]
    edit_record(skill, Q0, digest=second)
    edit_record(skill, Q1, digest=first)
    assert "must have the recorded vector_hash" in message_of(skill)


def test_corrections_that_the_manifest_denies_are_found(skill):
    """Injecting would silently leave them out."""
    for name in SHAPES:
        edit_record(skill, name, num_corrections=0)
    assert "corrections" in message_of(skill)


@pytest.mark.parametrize(
    ("key", "value"), [("norm", 123.0), ("num_unchanged", 7), ("num_corrections", 1)]
)
def test_numbers_of_the_manifest_that_the_weights_contradict_are_found(key, value, skill):
    edit_record(skill, Q0, **{key: value})
    message = message_of(skill)
    assert Q0 in message
    assert key in message


def test_a_norm_that_another_processor_would_round_otherwise_is_right(skill):
    """The order of a sum depends on the width of its vector instructions."""
    norm = load_manifest(skill).tensors[WIDE].norm
    edit_record(skill, WIDE, norm=math.nextafter(norm, math.inf))
    assert verify(skill).num_tensors == len(SHAPES)


# What is missing, cut off or not finite


def test_a_missing_file_of_corrections_is_found(skill):
    (skill / "corrections.safetensors").unlink()
    assert "corrections.safetensors" in message_of(skill)


def test_a_missing_tensor_is_named(skill):
    tensors = load_file(skill / "model.safetensors")
    del tensors[Q0]
    save_file(tensors, skill / "model.safetensors", metadata={"format": "pt"})
    assert Q0 in message_of(skill)


def test_a_tensor_of_another_shape_is_named(skill):
    tensors = load_file(skill / "model.safetensors")
    tensors[Q0] = tensors[Q0].T.contiguous()
    save_file(tensors, skill / "model.safetensors", metadata={"format": "pt"})
    assert f"{Q0} (16, 24) and (24, 16)" in message_of(skill)


@pytest.mark.parametrize("file", ["model.safetensors", "corrections.safetensors"])
def test_a_file_cut_off_is_found(file, skill):
    (skill / file).write_bytes((skill / file).read_bytes()[:-8])
    assert file in message_of(skill)


def test_nan_is_named_even_if_its_digest_is_recorded(skill):
    tensors = load_file(skill / "model.safetensors")
    tensors[Q0][0, 0] = math.nan
    save_file(tensors, skill / "model.safetensors", metadata={"format": "pt"})
    assert f"NaN or infinite entries in {Q0}" in message_of(skill)


def test_an_unreadable_manifest_is_one_readable_message(skill):
    edit_manifest(skill, surprise=1)
    message = message_of(skill)
    assert "surprise" in message
    assert "pydantic" not in message
    assert "\n" not in message


# Parents


def test_parents_where_they_were_agree(skill, lora):
    assert verify(skill, parents=True).parents == ("rl", "sft")
    assert verify(lora, parents=True).parents == ("rl", "sft")


@pytest.mark.parametrize("form", ["skill", "lora"])
def test_parents_that_were_moved_are_found_where_the_caller_says(form, request, tmp_path):
    folder = request.getfixturevalue(form)
    rl, sft = tmp_path / "moved rl", tmp_path / "moved sft"
    shutil.move(folder.with_suffix(".rl"), rl)
    shutil.move(folder.with_suffix(".sft"), sft)
    assert verify(folder, rl=rl, sft=sft).parents == ("rl", "sft")


def test_one_parent_that_was_moved_is_enough_to_name(skill, tmp_path):
    shutil.move(skill.with_suffix(".sft"), tmp_path / "moved")
    assert verify(skill, sft=tmp_path / "moved").parents == ("rl", "sft")


@pytest.mark.parametrize(("role", "option"), [("rl", "--rl"), ("sft", "--sft")])
def test_a_parent_that_is_not_there_is_asked_for(role, option, skill, tmp_path):
    """Saving a model as safetensors, which any other missing folder asks for, is no help here."""
    shutil.move(skill.with_suffix(f".{role}"), tmp_path / "moved")
    assert option in message_of(skill, parents=True)


@pytest.mark.parametrize("role", ["rl", "sft"])
def test_a_parent_with_one_changed_bit_is_refused(role, skill):
    folder = skill.with_suffix(f".{role}")
    flip_in_tensor(folder / "model.safetensors", Q0, entry=3)
    message = message_of(skill, parents=True)
    assert f"{role} {folder} must have the recorded {role}_hash" in message
    assert getattr(load_manifest(skill), f"{role}_hash") in message


@pytest.mark.parametrize("role", ["rl", "sft"])
def test_a_parent_of_an_adapter_with_one_changed_bit_is_refused(role, lora):
    folder = lora.with_suffix(f".{role}")
    file = "adapter_model.safetensors" if role == "rl" else "model.safetensors"
    flip_byte(folder / file, -4)
    assert f"{role} {folder} must have the recorded {role}_hash" in message_of(lora, parents=True)


def test_exchanged_parents_are_refused(skill):
    options = {"rl": skill.with_suffix(".sft"), "sft": skill.with_suffix(".rl")}
    assert "must have the recorded rl_hash" in message_of(skill, **options)


def test_a_parent_with_other_parameters_is_refused(skill, tmp_path):
    make_checkpoint(tmp_path / "other", random_tensors(0, SMALL))
    assert WIDE in message_of(skill, rl=tmp_path / "other")


def test_a_damaged_vector_is_refused_before_its_parents_are_read(skill):
    flip_in_tensor(skill / "model.safetensors", Q0, entry=3)
    shutil.rmtree(skill.with_suffix(".rl"))
    assert f"1 tensors differ (first: {Q0})" in message_of(skill, parents=True)


def test_a_vector_that_is_no_difference_of_its_parents_is_refused(skill, tmp_path):
    """All of its own hashes fit, and the parents are the recorded ones."""
    make_skill(tmp_path / "other", seed=5)
    shutil.copy(tmp_path / "other" / "model.safetensors", skill)
    others = json.loads((tmp_path / "other" / "skill.json").read_text())
    edit_manifest(skill, tensors=others["tensors"], vector_hash=others["vector_hash"])
    assert verify(skill).parents == ()
    assert f"{len(SHAPES)} tensors differ" in message_of(skill, parents=True)


def test_an_adapter_that_is_not_its_parent_is_refused(lora, tmp_path):
    """As for a dense vector: all of its own hashes fit, and the parents are the recorded ones."""
    make_adapter(tmp_path / "other.rl", Q0, WIDE, D1, seed=4)
    extract(tmp_path / "other.rl", tmp_path / "lora.sft", tmp_path / "other")
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", lora)
    others = json.loads((tmp_path / "other" / "skill.json").read_text())
    edit_manifest(lora, tensors=others["tensors"], vector_hash=others["vector_hash"])
    assert verify(lora).parents == ()
    message_of(lora, parents=True)


def test_parts_and_truncated_vectors_agree_with_their_parents(skill, lora, tmp_path):
    select(skill, tmp_path / "part", layers="1")
    select(lora, tmp_path / "lora part", modules=["q_proj"])
    parents = skill.with_suffix(".rl"), skill.with_suffix(".sft")
    extract(*parents, tmp_path / "low", rank=2)
    for name in ("part", "lora part", "low"):
        assert verify(tmp_path / name, parents=True).parents == ("rl", "sft")
    flip_in_tensor(parents[0] / "model.safetensors", WIDE, entry=3)
    for name in ("part", "low"):
        assert "recorded rl_hash" in message_of(tmp_path / name, parents=True)


def test_a_combination_has_no_parents_and_its_ingredients_are_advised(skill, tmp_path):
    combine([skill, skill], tmp_path / "sum")
    assert verify(tmp_path / "sum").parents == ()
    message = message_of(tmp_path / "sum", parents=True)
    assert "was made by 'combine linear'" in message
    assert "Verify its ingredients instead" in message
    options = {"rl": skill.with_suffix(".rl"), "sft": skill.with_suffix(".sft")}
    assert "Verify its ingredients instead" in message_of(tmp_path / "sum", **options)


def test_no_skill_folder_is_refused(tmp_path):
    with pytest.raises((SkillVectorError, StorageError), match="nowhere"):
        verify(tmp_path / "nowhere")
