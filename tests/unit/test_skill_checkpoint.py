import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from past_ray.errors import SkillVectorError, StorageError
from past_ray.skill import StreamSettings, blocks
from past_ray.skill.checkpoint import (
    COMPANION_FILES,
    hash_stored,
    hash_tensors,
    hash_weights,
    load_weights,
    main_dtype,
    save_checkpoint,
    write_companions,
)
from past_ray.skill.weights import open_weights
from tests.skill_folders import make_checkpoint, names, random_tensors
from tests.tiny_model import make_tiny_model

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"

ENDLESS_SAVER = """
import sys
from pathlib import Path
import torch
from past_ray.skill.checkpoint import save_checkpoint
folder, like = Path(sys.argv[1]), Path(sys.argv[2])
for number in range(1_000_000):
    save_checkpoint(
        folder, {name: torch.full((500, 500), float(number)) for name in "abcd"}, like=like
    )
    print(number, flush=True)
"""


@pytest.fixture
def model(tmp_path):
    return make_tiny_model(tmp_path / "model")


@pytest.fixture
def tied_model(tmp_path):
    return make_tiny_model(tmp_path / "tied", tie_word_embeddings=True)


def shard(folder, num_shards):
    """Store the weights of ``folder`` in several files with an index."""
    weights = load_weights(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(num_shards):
        name = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(weights.items())[number::num_shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_loaded_names_and_values_are_those_of_transformers(model):
    weights = load_weights(model)
    assert_same(weights, AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict())
    assert list(weights) == sorted(weights)


def test_shards_load_like_one_file_and_have_the_same_hash(model):
    weights, digest = load_weights(model), hash_weights(model)
    shard(model, 3)
    assert_same(load_weights(model), weights)
    assert hash_weights(model) == digest == hash_tensors(weights)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {**weights, "w": weights["w"] + 1},
        lambda weights: {"renamed": weights["w"]},
        lambda weights: {"w": weights["w"].reshape(3, 2)},
        lambda weights: {"w": weights["w"].to(torch.int32)},
        lambda weights: {**weights, "more": weights["w"]},
    ],
)
def test_value_name_shape_dtype_and_number_of_tensors_change_the_hash(change):
    weights = {"w": torch.zeros(2, 3)}
    assert hash_tensors(change(weights)) != hash_tensors(weights)


@pytest.mark.parametrize(("workers", "chunk_blocks"), [(1, 1), (1, 100), (4, 1), (3, 2)])
def test_hash_does_not_depend_on_how_the_weights_are_read(
    tmp_path, monkeypatch, workers, chunk_blocks
):
    monkeypatch.setattr(blocks, "BLOCK", 8)
    tensors = random_tensors(0) | {"scalar": torch.ones(()), "empty": torch.ones(3, 0)}
    weights = open_weights(make_checkpoint(tmp_path / "model", tensors, shard_bytes=200))
    settings = StreamSettings(workers=workers, chunk_blocks=chunk_blocks)
    assert hash_stored(weights, settings=settings) == hash_tensors(tensors)


def test_the_last_entry_of_a_large_tensor_counts():
    tensor = torch.zeros(2, blocks.BLOCK + 1)
    before = hash_tensors({"w": tensor})
    tensor[-1, -1] = -0.0
    assert hash_tensors({"w": tensor}) != before


def test_hash_depends_on_values_not_on_memory_layout():
    matrix = torch.arange(6.0).reshape(2, 3)
    transposed = matrix.T.contiguous().T
    assert not transposed.is_contiguous()
    assert hash_tensors({"w": transposed}) == hash_tensors({"w": matrix})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_checkpoint_loads_in_transformers_with_its_dtype(model, tmp_path, dtype):
    weights = {name: weight.to(dtype) for name, weight in load_weights(model).items()}
    save_checkpoint(tmp_path / "copy", weights, like=model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype="auto")
    assert loaded.dtype == dtype
    assert_same(dict(loaded.state_dict()), weights)
    with safe_open(tmp_path / "copy" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_dtype_of_a_model_is_that_of_most_entries():
    few_large = {"a": torch.ones(100), "b": torch.ones(2).half(), "c": torch.ones(3).half()}
    assert main_dtype(few_large) == "float32"
    assert main_dtype({**few_large, "d": torch.ones(100).bfloat16()}) in ("float32", "bfloat16")
    assert main_dtype({**few_large, "d": torch.ones(101).bfloat16()}) == "bfloat16"


def test_an_older_spelling_of_dtype_does_not_survive_beside_the_new_one(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (model / "config.json").write_text(json.dumps(config))
    half = {name: weight.bfloat16() for name, weight in load_weights(model).items()}
    save_checkpoint(tmp_path / "copy", half, like=model)
    saved = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert saved["dtype"] == "bfloat16"
    assert "torch_dtype" not in saved


def test_tokenizer_and_chat_template_come_along(model, tmp_path):
    save_checkpoint(tmp_path / "copy", load_weights(model), like=model)
    before = AutoTokenizer.from_pretrained(model)
    after = AutoTokenizer.from_pretrained(tmp_path / "copy")
    text = "where is anna ?"
    assert after(text).input_ids == before(text).input_ids
    assert after.chat_template == before.chat_template
    assert (tmp_path / "copy" / "generation_config.json").exists()


def test_every_companion_file_comes_along_and_nothing_else(tmp_path):
    model = make_checkpoint(tmp_path / "model", random_tensors(0))
    for name in COMPANION_FILES:
        (model / name).write_text(f"content of {name}")
    (model / "optimizer.pt").write_text("large")
    (tmp_path / "copy").mkdir()
    write_companions(tmp_path / "copy", like=model, dtype="float32")
    assert set(names(tmp_path / "copy")) == {"config.json", *COMPANION_FILES}
    for name in COMPANION_FILES:
        assert (tmp_path / "copy" / name).read_text() == f"content of {name}"


def test_the_lineage_has_the_hash_of_the_weights(tied_model, tmp_path):
    weights = load_weights(tied_model)
    weights[HEAD] = weights[EMBEDDINGS].clone()
    save_checkpoint(tmp_path / "copy", weights, like=tied_model, lineage={"base_hash": "b"})
    lineage = json.loads((tmp_path / "copy" / "past_ray.json").read_text())
    assert lineage == {"base_hash": "b", "weights_hash": hash_weights(tmp_path / "copy")}
    save_checkpoint(tmp_path / "copy", weights, like=tied_model)
    assert not (tmp_path / "copy" / "past_ray.json").exists()


def test_a_folder_can_be_its_own_model_to_copy_from(model):
    doubled = {name: 2 * weight for name, weight in load_weights(model).items()}
    save_checkpoint(model, doubled, like=model)
    assert_same(load_weights(model), doubled)
    assert (model / "tokenizer.json").exists()


def test_views_and_transposed_weights_can_be_saved(model, tmp_path):
    weights = load_weights(model)
    flat = torch.cat([weight.reshape(-1) for weight in weights.values()])
    sizes = [weight.numel() for weight in weights.values()]
    views = {
        name: part.view(weights[name].shape)
        for name, part in zip(weights, flat.split(sizes), strict=True)
    }
    save_checkpoint(tmp_path / "copy", views, like=model)
    assert_same(load_weights(tmp_path / "copy"), weights)


def test_a_tied_head_is_stored_loaded_and_hashed_once(tied_model, tmp_path):
    live = AutoModelForCausalLM.from_pretrained(tied_model).state_dict()
    assert HEAD in live
    save_checkpoint(tmp_path / "copy", live, like=tied_model)
    with safe_open(tmp_path / "copy" / "model.safetensors", framework="pt") as file:
        assert HEAD not in file.keys()  # noqa: SIM118 - a safetensors file is no dict
    assert hash_weights(tmp_path / "copy") == hash_weights(tied_model)
    stored_twice = load_weights(tied_model)
    stored_twice[HEAD] = stored_twice[EMBEDDINGS].clone()
    save_file(stored_twice, tied_model / "model.safetensors")
    assert HEAD not in load_weights(tied_model)
    assert hash_weights(tied_model) == hash_weights(tmp_path / "copy")


def test_a_tied_head_with_other_values_is_refused(tied_model, tmp_path):
    weights = load_weights(tied_model)
    weights[HEAD] = weights[EMBEDDINGS] + 1
    with pytest.raises(SkillVectorError, match="must equal"):
        save_checkpoint(tmp_path / "copy", weights, like=tied_model)
    assert not (tmp_path / "copy").exists()
    save_file(weights, tied_model / "model.safetensors")
    with pytest.raises(SkillVectorError, match="must equal"):
        load_weights(tied_model)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(StorageError, match="found neither"):
        load_weights(tmp_path)


def test_a_cut_off_weight_file_is_refused(model):
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(StorageError, match="complete safetensors file"):
        load_weights(model)


def test_a_missing_shard_is_named(model):
    shard(model, 3)
    (model / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(StorageError, match="model-00002-of-00003"):
        load_weights(model)


def test_a_config_that_is_no_json_is_refused(model):
    (model / "config.json").write_text("{")
    with pytest.raises(StorageError, match=r"config\.json must hold a JSON object, got"):
        save_checkpoint(model, {"w": torch.zeros(1)}, like=model)


def test_kills_while_saving_always_leave_one_complete_version(model, tmp_path):
    folder = tmp_path / "checkpoint"
    for delay_s in (0.0, 0.004, 0.012):
        command = [sys.executable, "-c", ENDLESS_SAVER, str(folder), str(model)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as saver:
            assert saver.stdout is not None
            assert saver.stdout.readline() == "0\n"
            time.sleep(delay_s)
            saver.send_signal(signal.SIGKILL)
        values = {value for weight in load_weights(folder).values() for value in weight.unique()}
        assert len({float(value) for value in values}) == 1
        assert (folder / "tokenizer.json").exists()
    save_checkpoint(folder, load_weights(model), like=model)
    assert_same(load_weights(folder), load_weights(model))
    assert names(tmp_path) == ["checkpoint", "model"]
