"""Models whose files or numbers are damaged, and scales that are no numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from past_ray.config.skill import ScaleConfig
from past_ray.errors import StorageError
from past_ray.skill import Rounding, extract, inject, verify
from past_ray.skill.checkpoint import load_weights
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
    ROLES,
    change,
    folder_fixture,  # noqa: F401
    refusal,
    refused,
)


def first_shard(folder):
    return min(folder.glob("model-*.safetensors"))


# Files


@pytest.mark.parametrize("role", [*ROLES, "base"])
def test_a_truncated_file_is_named(folder, role):
    file = first_shard(folder / role)
    file.write_bytes(file.read_bytes()[:-1])
    message = refused(folder, role, error=StorageError)
    assert f"{file} must be a complete safetensors file, but its header describes" in message
    assert message.endswith("Copy or train it again.")


@pytest.mark.parametrize("role", ROLES)
def test_a_corrupt_header_is_named(folder, role):
    file = first_shard(folder / role)
    flip_byte(file, 0)
    flip_byte(file, 8)
    assert f"{file} must be a complete safetensors file, but" in refused(
        folder, role, error=StorageError
    )


@pytest.mark.parametrize("role", ROLES)
def test_missing_shards_are_counted_and_the_first_five_named(folder, role):
    files = sorted(folder.joinpath(role).glob("model-*.safetensors"))[:6]
    for file in files:
        file.unlink()
    message = refused(folder, role, error=StorageError)
    assert f"{folder / role} must hold every file of its index; 6 are missing (first: " in message
    assert ", ".join(file.name for file in files[:5]) + ")" in message
    assert message.endswith("Download or copy the checkpoint again.")


@pytest.mark.parametrize("role", ROLES)
def test_an_index_that_lists_what_no_file_has_is_refused(folder, role):
    index = json.loads((folder / role / INDEX).read_text())
    file = first_shard(folder / role).name
    index["weight_map"] |= {f"extra{number}": file for number in range(6)}
    write_json(folder / role / INDEX, index)
    message = refused(folder, role, error=StorageError)
    assert "6 tensors are not where it says (first: extra0, extra1, extra2, extra3, extra4)" in (
        message
    )
    assert "0 are stored but not listed" in message
    assert message.endswith("Save the checkpoint again.")


@pytest.mark.parametrize("role", ROLES)
def test_a_file_that_holds_what_the_index_does_not_list_is_refused(folder, role):
    index = json.loads((folder / role / INDEX).read_text())
    (folder / role / "model-00001-of-00001.safetensors").unlink(missing_ok=True)
    file = first_shard(folder / role)
    extra = {f"extra{number}": torch.ones(1) for number in range(6)}
    save_file(load_file(file) | extra, file)
    message = refused(folder, role, error=StorageError)
    assert f"{folder / role / INDEX} must agree with its files; 0 tensors are not" in message
    assert "6 are stored but not listed (first: extra0, extra1, extra2, extra3, extra4)" in message
    assert index["weight_map"]


def test_an_index_that_names_the_wrong_file_is_refused(folder):
    index = json.loads((folder / "rl" / INDEX).read_text())
    files = list(index["weight_map"].values())
    moved, file = next(e for e in sorted(index["weight_map"].items()) if files.count(e[1]) > 1)
    index["weight_map"][moved] = next(other for other in files if other != file)
    write_json(folder / "rl" / INDEX, index)
    message = refused(folder, "rl", error=StorageError)
    assert f"1 tensors are not where it says (first: {moved})" in message
    assert f"1 are stored but not listed (first: {moved})" in message


@pytest.mark.parametrize("role", ROLES)
def test_a_single_file_beside_an_index_without_it_is_refused(folder, role):
    save_file(random_tensors(5), folder / role / WEIGHTS)
    message = refused(folder, role, error=StorageError)
    assert f"must hold one checkpoint, found {WEIGHTS} beside an {INDEX}" in message
    assert message.endswith("Remove the one that is out of date.")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/b", "..", ".", "", "../base/model.safetensors", 3, None, ["a"]]
)
def test_an_index_that_leaves_its_folder_is_refused(folder, role, name):
    index = json.loads((folder / role / INDEX).read_text())
    index["weight_map"][NORM] = name
    write_json(folder / role / INDEX, index)
    message = refused(folder, role, error=StorageError)
    assert f"{folder / role / INDEX} must name files beside it, found {name}." in message
    assert "Do not use a checkpoint whose index points elsewhere" in message


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_map_is_refused(folder, weight_map):
    write_json(folder / "rl" / INDEX, {"metadata": {}, "weight_map": weight_map})
    message = refused(folder, "rl", error=StorageError)
    assert "must have a weight_map from tensor to file, found none" in message


@pytest.mark.parametrize("file", [INDEX, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_json_that_is_none_is_named(folder, file, text):
    (folder / "rl" / file).write_text(text)
    assert f"{folder / 'rl' / file} must hold a JSON object, got" in refused(
        folder, "rl", error=StorageError
    )


def test_folders_that_are_missing_or_hold_no_model_are_named(folder):
    (folder / "empty").mkdir()
    for name in ("absent", "empty"):
        for arguments in ((name, "sft"), ("rl", name)):
            paths = [folder / argument for argument in arguments]
            message = refusal(extract, *paths, folder / "out", error=StorageError)
            assert str(folder / name / "config.json") in message
    (folder / "sft" / INDEX).unlink()
    message = refused(folder, "sft", error=StorageError)
    assert f"{folder / 'sft'} must hold {WEIGHTS} or {INDEX}, found neither." in message
    assert message.endswith("Save the model as safetensors (save_pretrained does).")


# Numbers


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_refused_with_whose_they_are_and_where(folder, role, value):
    change(folder, role, model__norm__weight=torch.tensor([1.0, value, 2.0, value, 3.0, 4.0]))
    message = refused(folder, role)
    assert message.startswith(f"{role} must be finite, found 2 NaN or infinite entries in {NORM}.")
    assert message.endswith("Training diverged (lower the learning rate), or the file is damaged.")


def test_infinity_in_both_parents_at_once_is_refused(folder):
    for role in ("rl", "sft"):
        change(folder, role, model__norm__weight=torch.full((6,), torch.inf))
    assert "rl must be finite" in refused(folder, "rl")


def test_nan_in_a_vector_is_refused(folder):
    vector = load_file(folder / "skill" / WEIGHTS)
    vector[NORM][0] = torch.nan
    save_file(vector, folder / "skill" / WEIGHTS)
    assert "vector must be finite, found 1 NaN" in refused(folder, "target")
    assert "vector must be finite, found 1 NaN" in refusal(verify, folder / "skill")


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_what_float16_cannot_hold_is_refused_at_any_scale(folder, scale):
    change(folder, "target", model__norm__weight=torch.tensor([1.0, 65504.0, 7e4, 0, 0, 0]))
    before = names(folder)
    message = refusal(
        inject,
        folder / "target",
        folder / "skill",
        folder / "out",
        scale=scale,
        rounding=Rounding(dtype="float16"),
    )
    assert f"adapted model must be finite, found 1 NaN or infinite entries in {NORM}" in message
    assert names(folder) == before


def test_nan_in_a_target_is_refused_at_scale_zero_too(folder):
    change(folder, "target", model__norm__weight=torch.full((6,), torch.nan))
    message = refusal(inject, folder / "target", folder / "skill", folder / "out", scale=0.0)
    assert f"target must be finite, found 6 NaN or infinite entries in {NORM}" in message


def test_a_difference_beyond_float32_is_not_blamed_on_training(folder):
    change(folder, "rl", model__norm__weight=torch.full((6,), 3e38))
    change(folder, "sft", model__norm__weight=torch.full((6,), -3e38))
    message = refused(folder, "rl")
    assert f"difference must be finite, found 6 NaN or infinite entries in {NORM}" in message
    assert "Training diverged" not in message


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int64, "I64"),
        (torch.float64, "F64"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
    ],
)
def test_other_dtypes_are_refused_with_the_first_five(folder, role, dtype, told):
    weights = load_weights(folder / role)
    changed = sorted(weights)[:6]
    for name in changed:
        weights[name] = weights[name].to(dtype)
    make_checkpoint(folder / role, weights)
    message = refused(folder, role)
    offenders = ", ".join(f"{name} {told}" for name in changed[:5])
    assert f"{role} {folder / role} must hold floating point numbers in F32, BF16, F16;" in message
    assert f"6 tensors do not (first: [{offenders}, ...])" in message
    assert message.endswith(
        "Use the checkpoint from before quantisation, or convert float64 to float32."
    )


@pytest.mark.parametrize("role", ROLES)
def test_a_quantised_model_is_refused(folder, role):
    edit_json(folder / role / "config.json", quantization_config={"quant_method": "awq"})
    message = refused(folder, role)
    assert f"{folder / role} must not be quantised, found quantization_config awq" in message
    assert message.endswith("Use the checkpoint from before quantisation.")


def test_parents_without_tensors_are_refused(folder):
    for role in ("rl", "sft"):
        make_checkpoint(folder / role, {})
    assert "must hold at least one tensor, found none" in refused(folder, "rl")


@pytest.mark.parametrize(
    "scale",
    [float("nan"), float("inf"), 1e39, ScaleConfig(scale=1e30, modules={"norm": 1e30})],
    ids=["nan", "inf", "1e39", "product"],
)
def test_a_scale_that_float32_cannot_hold_is_refused(folder, scale):
    message = refusal(inject, folder / "target", folder / "skill", folder / "out", scale=scale)
    assert message.startswith("scale must be a finite number of float32, got ")
    assert isinstance(scale, float) or f" of {NORM}." in message
    assert "out" not in names(folder)
