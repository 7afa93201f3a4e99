"""Vectors that were damaged or tampered with."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from past_ray.errors import StorageError
from past_ray.skill import extract, inject, load_manifest, load_skill, sweep, verify
from past_ray.skill.blocks import BLOCK
from tests.skill_folders import (
    INDEX,
    WEIGHTS,
    edit_json,
    flip_byte,
    make_checkpoint,
    names,
    random_tensors,
    write_json,
)
from tests.skill_refusals import (
    NORM,
    folder_fixture,  # noqa: F401
    refusal,
    refused,
)


def test_an_empty_vector_is_refused(folder):
    edit_json(folder / "skill" / "skill.json", tensors={})
    save_file({}, folder / "skill" / WEIGHTS)
    (folder / "skill" / INDEX).unlink()
    message = refused(folder, "target")
    assert f"{folder / 'skill'} must hold at least one parameter, found none." in message
    assert message.endswith("Select less strictly, or extract it again.")


@pytest.mark.parametrize("position", [-1, -500, -1200])
def test_one_flipped_bit_of_a_vector_is_found_before_there_is_a_result(folder, position):
    flip_byte(folder / "skill" / WEIGHTS, position)
    messages = [
        refused(folder, "target"),
        refusal(load_skill, folder / "skill"),
        refusal(verify, folder / "skill"),
    ]
    for message in messages:
        assert f"{folder / 'skill'} must hold the numbers that its skill.json" in message
        assert "1 tensors differ (first: " in message
        assert message.endswith("changed or damaged: copy or extract it again.")


def test_damaged_tensors_of_a_vector_are_counted_and_the_first_five_named(folder):
    vector = load_file(folder / "skill" / WEIGHTS)
    damaged = sorted(vector)[:6]
    for name in damaged:
        vector[name] += 1
    save_file(vector, folder / "skill" / WEIGHTS)
    assert f"6 tensors differ (first: {', '.join(damaged[:5])})" in refused(folder, "target")


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_flipped_bit_in_a_large_tensor_is_found_when_verifying(folder, block):
    sft = {"w": torch.randn(3, BLOCK, generator=torch.Generator().manual_seed(0))}
    make_checkpoint(folder / "sft", sft)
    make_checkpoint(folder / "rl", {"w": sft["w"] * 1.25})
    extract(folder / "rl", folder / "sft", folder / "skill")
    flip_byte(folder / "skill" / WEIGHTS, -1 - 4 * BLOCK * (2 - block))
    before = names(folder)
    arguments = (folder / "sft", folder / "skill")
    message = refusal(inject, *arguments, folder / "out", verify=True)
    assert "1 tensors differ (first: w)" in message
    message = refusal(sweep, *arguments, {1.0: folder / "out"}, verify=True)
    assert "1 tensors differ (first: w)" in message
    assert "1 tensors differ (first: w)" in refusal(verify, folder / "skill")
    assert names(folder) == before


def make_corrected_skill(folder):
    make_checkpoint(folder / "rl", random_tensors(8))
    extract(folder / "rl", folder / "sft", folder / "skill")
    return folder / "skill" / "corrections.safetensors"


@pytest.mark.parametrize("position", [-1, -100])
def test_tampered_corrections_are_found(folder, position):
    flip_byte(make_corrected_skill(folder), position)
    for message in (
        refused(folder, "target", error=StorageError),
        refusal(load_skill, folder / "skill", error=StorageError),
        refusal(verify, folder / "skill", error=StorageError),
    ):
        assert re.search(r"the corrections of \S+ must be those that were saved", message)
        assert str(folder / "skill") in message
        assert message.endswith("changed or damaged: copy or extract it again.")


def test_missing_and_truncated_corrections_are_found(folder):
    file = make_corrected_skill(folder)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert f"{file} must be a complete safetensors file" in refused(
        folder, "target", error=StorageError
    )
    file.unlink()
    assert str(file) in refused(folder, "target", error=StorageError)


def test_a_manifest_whose_corrections_were_removed_is_refused(folder):
    make_corrected_skill(folder).unlink()
    manifest = json.loads((folder / "skill" / "skill.json").read_text())
    for record in manifest["tensors"].values():
        record |= {"num_corrections": 0, "corrections_digest": None}
    write_json(folder / "skill" / "skill.json", manifest)
    assert "vector_hash" in refused(folder, "target")


@pytest.mark.parametrize("version", [1, 3, None, "2"])
def test_another_format_version_names_the_version_that_wrote_it(folder, version):
    manifest = json.loads((folder / "skill" / "skill.json").read_text())
    manifest |= {"format_version": version, "past_ray_version": "9.9.9"}
    write_json(folder / "skill" / "skill.json", manifest)
    for message in (refused(folder, "target"), refusal(load_manifest, folder / "skill")):
        assert f"{folder / 'skill'} must have format_version 2, got {version}." in message
        assert "Read it with the past_ray that wrote it, version 9.9.9, or extract" in message


def test_a_vector_whose_tensors_are_not_those_of_its_manifest_is_refused(folder):
    vector = load_file(folder / "skill" / WEIGHTS)
    vector["renamed"] = vector.pop(NORM)
    save_file(vector, folder / "skill" / WEIGHTS)
    (folder / "skill" / INDEX).unlink()
    message = refused(folder, "target")
    assert "and its skill.json must have the same parameters" in message
    assert f"(first: [{NORM}])" in message
