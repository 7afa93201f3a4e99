import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from past_ray.config.skill import ScaleConfig
from past_ray.errors import SkillVectorError, StorageError
from past_ray.locations import open_folder
from past_ray.skill import Rounding, extract, inject, load_manifest, load_skill, sweep, verify
from past_ray.skill.blocks import BLOCK
from past_ray.skill.checkpoint import load_weights
from tests.skill_folders import (
    INDEX,
    WEIGHTS,
    contents,
    edit_json,
    flip_byte,
    make_checkpoint,
    names,
    nudged,
    random_tensors,
    write_json,
)

NORM = "model.norm.weight"
ROLES = ("rl", "sft", "target")


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """Folders that fit together: rl, sft and target, the parents' vector, and a base."""
    weights = random_tensors(0)
    make_checkpoint(tmp_path / "base", weights, shard_bytes=300)
    make_checkpoint(tmp_path / "sft", nudged(weights, 1), shard_bytes=300)
    make_checkpoint(tmp_path / "rl", nudged(weights, 2), shard_bytes=300)
    make_checkpoint(tmp_path / "target", nudged(weights, 3), shard_bytes=300)
    extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    return tmp_path


def use(folder, role):
    """Run the operation that reads the model called ``role``."""
    if role == "target":
        inject(folder / "target", folder / "skill", folder / "out")
    else:
        extract(folder / "rl", folder / "sft", folder / "out", base=folder / "base")


def refusal(run, *arguments, error=SkillVectorError, **options):
    """Return the message with which ``run`` refuses its arguments; nothing may be written."""
    with pytest.raises(error) as caught:
        run(*arguments, **options)
    return str(caught.value)


def refused(folder, role, *, error=SkillVectorError):
    before = names(folder)
    message = refusal(use, folder, role, error=error)
    assert names(folder) == before
    assert message.endswith(".")
    return message


def change(folder, role, **tensors):
    """Replace weights of a model; dots in names are written as double underscores."""
    weights = load_weights(folder / role)
    weights |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    make_checkpoint(folder / role, weights)


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


# The vector


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


# What does not fit together


FINGERPRINTS = {
    "architecture": (
        lambda role: edit_json(role / "config.json", model_type="llama"),
        "model_type is {} and {}",
    ),
    "size": (
        lambda role: edit_json(role / "config.json", num_hidden_layers=9),
        "num_hidden_layers is {} and {}",
    ),
    "tying": (
        lambda role: edit_json(role / "config.json", tie_word_embeddings=True),
        "tied_embeddings is {} and {}",
    ),
    "vocabulary": (
        lambda role: edit_json(role / "tokenizer.json", model={"vocab": {"anna": 1, "ben": 0}}),
        "tokenizer is {} and {}",
    ),
    "added token": (
        lambda role: edit_json(
            role / "tokenizer.json", added_tokens=[{"content": "<new>", "id": 2}]
        ),
        "tokenizer is {} and {}",
    ),
    "chat template": (
        lambda role: (role / "chat_template.jinja").write_text("{{ other }}"),
        "chat_template is {} and {}",
    ),
}


@pytest.mark.parametrize("role", ["rl", "target", "base"])
@pytest.mark.parametrize("kind", FINGERPRINTS)
def test_models_that_mean_something_else_are_refused_with_both_values(folder, role, kind):
    edit, told = FINGERPRINTS[kind]
    edit(folder / role)
    message = refused(folder, role)
    other = {"rl": folder / "sft", "target": folder / "skill", "base": folder / "sft"}[role]
    assert f"{folder / role} and " in message
    assert str(other) in message
    assert "must come from the same base model and tokenizer, but" in message
    assert re.search(told.format(r"(\S+)", r"(\S+)"), message)
    assert message.endswith("Train both from one base with one recipe.")


@pytest.mark.parametrize("role", ["rl", "target"])
def test_missing_parameters_are_counted_and_the_first_five_named(folder, role):
    weights = load_weights(folder / role)
    dropped = sorted(weights)[:6]
    make_checkpoint(folder / role, {n: w for n, w in weights.items() if n not in dropped})
    message = refused(folder, role)
    assert f"[{', '.join(dropped[:5])}, ...]" in message
    if role == "rl":
        assert "rl and sft must have the same parameters; 0 only in rl (first: [])" in message
        assert "6 only in sft (first: [" in message
    else:
        assert f"target {folder / 'target'} must have every parameter of skill" in message
        assert "which has 8; 6 are absent (first: [" in message


@pytest.mark.parametrize("role", ["rl", "target"])
def test_other_shapes_are_counted_and_the_first_five_given(folder, role):
    weights = load_weights(folder / role)
    changed = sorted(weights)[:6]
    for name in changed:
        weights[name] = weights[name].repeat(2, *[1] * (weights[name].dim() - 1))
    make_checkpoint(folder / role, weights)
    message = refused(folder, role)
    for number, name in enumerate(changed):
        before = tuple(load_manifest(folder / "skill").shapes[name])
        shapes = f"{name} {tuple(weights[name].shape)} and {before}"
        assert (shapes in message) == (number < 5)
    assert re.search(r"6 (with|have) other shapes", message)


def test_parameters_of_the_target_that_the_vector_lacks_are_no_offence(folder):
    change(folder, "target", more=torch.ones(3))
    use(folder, "target")
    assert load_weights(folder / "out")["more"].tolist() == [1.0] * 3


# Where the result goes


@pytest.mark.parametrize("role", ["rl", "sft", "base"])
def test_a_vector_is_never_written_over_a_model_it_is_made_from(folder, role):
    before = contents(folder / role)
    message = refusal(extract, folder / "rl", folder / "sft", folder / role, base=folder / "base")
    assert str(folder / role) in message
    assert contents(folder / role) == before


def test_a_vector_is_never_written_over_the_previous_rounds(folder):
    before = contents(folder / "skill")
    with pytest.raises(SkillVectorError):
        extract(folder / "rl", folder / "sft", folder / "skill", parent=folder / "skill")
    assert contents(folder / "skill") == before


@pytest.mark.parametrize("role", ["target", "skill"])
@pytest.mark.parametrize("spelling", ["same", "dots", "link", "uri"])
def test_a_model_is_never_written_over_what_it_is_made_from(folder, role, spelling):
    (folder / "link").symlink_to(folder / role)
    out = {
        "same": folder / role,
        "dots": folder / "rl" / ".." / role,
        "link": folder / "link",
        "uri": f"file://{folder / role}",
    }[spelling]
    before = contents(folder / role)
    arguments = (folder / "target", folder / "skill")
    assert str(folder / role) in refusal(inject, *arguments, out)
    assert str(folder / role) in refusal(sweep, *arguments, {0.5: folder / "x", 1.0: out})
    assert contents(folder / role) == before
    assert "x" not in names(folder)


@pytest.mark.parametrize("operation", ["extract", "inject"])
def test_a_result_is_never_written_over_a_folder_that_holds_its_inputs(folder, operation):
    # A model itself, as a training run with its checkpoints is.
    write_json(folder / "config.json", {})
    before = names(folder)
    if operation == "extract":
        refusal(extract, folder / "rl", folder / "sft", folder)
    else:
        refusal(inject, folder / "target", folder / "skill", folder)
    assert names(folder) == before


def test_a_sweep_never_writes_two_results_to_one_folder(folder):
    outs = {0.5: folder / "out", 1.0: open_folder(folder / "out")}
    message = refusal(sweep, folder / "target", folder / "skill", outs)
    assert f"must be different folders, but writing {folder / 'out'} would replace" in message
    assert "out" not in names(folder)


@pytest.mark.parametrize("operation", ["extract", "inject"])
def test_a_folder_of_other_things_is_not_replaced(folder, operation):
    (folder / "other").mkdir()
    for number in range(6):
        (folder / "other" / f"{number}.txt").write_text("mine")
    before = contents(folder / "other")
    run, role = {"extract": (extract, "rl"), "inject": (inject, "target")}[operation]
    second = {"rl": "sft", "target": "skill"}[role]
    message = refusal(run, folder / role, folder / second, folder / "other")
    assert (
        f"{folder / 'other'} must be absent, empty, or nothing but a model or a vector" in message
    )
    assert "found 0.txt, 1.txt, 2.txt, 3.txt, 4.txt in it" in message
    assert contents(folder / "other") == before


def test_an_empty_folder_an_older_model_and_an_older_vector_are_replaced(folder):
    (folder / "out").mkdir()
    extract(folder / "rl", folder / "sft", folder / "out")
    assert contents(folder / "out") == contents(folder / "skill")
    inject(folder / "target", folder / "skill", folder / "out")
    assert "skill.json" not in names(folder / "out")
    extract(folder / "rl", folder / "sft", folder / "out")
    assert contents(folder / "out") == contents(folder / "skill")


@pytest.mark.parametrize("below", [".", "below"])
def test_a_file_where_the_result_should_go_is_kept(folder, below):
    (folder / "file").write_text("mine")
    out = folder / "file" / below
    for run, arguments in (
        (extract, (folder / "rl", folder / "sft")),
        (inject, (folder / "target", folder / "skill")),
    ):
        message = refusal(run, *arguments, out, error=StorageError)
        assert f"{folder / 'file'}" in message
    assert (folder / "file").read_text() == "mine"


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
