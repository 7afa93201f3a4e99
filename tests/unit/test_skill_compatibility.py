import json

import pytest
import torch

from past_ray.errors import SkillVectorError, StorageError
from past_ray.skill.compatibility import (
    check_compatible_checkpoints,
    check_float_tensors,
    check_has_parameters,
    check_same_parameters,
    fingerprint,
)
from past_ray.skill.safetensors_file import StoredTensor
from tests.tiny_model import make_tiny_model


@pytest.fixture
def left(tmp_path):
    return make_tiny_model(tmp_path / "left", seed=0)


@pytest.fixture
def right(tmp_path):
    return make_tiny_model(tmp_path / "right", seed=1)


def edit_json(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def refusal(left, right):
    with pytest.raises(SkillVectorError) as caught:
        check_compatible_checkpoints(left, right)
    return str(caught.value)


def test_models_that_differ_only_in_weights_are_compatible(left, right):
    check_compatible_checkpoints(left, right)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("hidden_size", 32, "hidden_size is 64 and 32"),
        ("num_hidden_layers", 3, "num_hidden_layers is 2 and 3"),
        ("num_key_value_heads", 2, "num_key_value_heads is 1 and 2"),
        ("vocab_size", 999, "and 999"),
        ("model_type", "llama", "model_type is qwen2 and llama"),
        ("architectures", ["OtherModel"], "architectures is"),
        ("tie_word_embeddings", True, "tied_embeddings is False and True"),
    ],
)
def test_another_config_is_refused_with_both_values(left, right, key, value, told):
    edit_json(right / "config.json", lambda config: config.update({key: value}))
    assert told in refusal(left, right)


def test_settings_that_do_not_change_what_weights_mean_are_ignored(left, right):
    edit_json(
        right / "config.json",
        lambda config: config.update(
            dtype="bfloat16", transformers_version="4.0.0", use_cache=False, head_dim=32
        ),
    )
    check_compatible_checkpoints(left, right)


def test_two_swapped_token_ids_are_refused(left, right):
    def swap(tokenizer):
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["anna"], vocabulary["ben"] = vocabulary["ben"], vocabulary["anna"]

    edit_json(right / "tokenizer.json", swap)
    assert "tokenizer is" in refusal(left, right)


def test_an_added_token_is_refused(left, right):
    token = {"id": 500, "content": "<new>", "special": True}
    edit_json(right / "tokenizer.json", lambda values: values["added_tokens"].append(token))
    assert "tokenizer is" in refusal(left, right)


def test_the_order_and_spacing_of_tokenizer_json_do_not_matter(left, right):
    def reverse(tokenizer):
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = dict(reversed(list(vocabulary.items())))

    edit_json(right / "tokenizer.json", reverse)
    check_compatible_checkpoints(left, right)


def test_a_missing_tokenizer_is_refused(left, right):
    (right / "tokenizer.json").unlink()
    assert "and none" in refusal(left, right)


def test_a_list_vocabulary_numbers_its_tokens(left, right):
    def as_list(tokenizer):
        vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda entry: entry[1])
        tokenizer["model"]["vocab"] = [[token, -1.0] for token, _ in vocabulary]

    edit_json(right / "tokenizer.json", as_list)
    check_compatible_checkpoints(left, right)


def test_another_chat_template_is_refused(left, right):
    (right / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat_template is" in refusal(left, right)


def test_a_chat_template_counts_the_same_in_the_tokenizer_config(left, right):
    template = (right / "chat_template.jinja").read_text()
    (right / "chat_template.jinja").unlink()
    edit_json(
        right / "tokenizer_config.json", lambda values: values.update(chat_template=template + "\n")
    )
    check_compatible_checkpoints(left, right)


def test_all_differences_are_told_at_once(left, right):
    edit_json(right / "config.json", lambda config: config.update(hidden_size=32))
    (right / "chat_template.jinja").unlink()
    message = refusal(left, right)
    assert str(left) in message
    assert str(right) in message
    assert "hidden_size is 64 and 32" in message
    assert "and none" in message


def test_sizes_that_a_config_leaves_out_are_derived(left):
    def leave_out(config):
        config.pop("head_dim", None)
        config.pop("num_key_value_heads")

    edit_json(left / "config.json", leave_out)
    sizes = fingerprint(left).sizes
    assert (sizes["head_dim"], sizes["num_key_value_heads"]) == (32, 2)


def test_a_folder_without_config_is_refused(left, tmp_path):
    with pytest.raises(StorageError, match=r"config\.json must be a file, found none"):
        check_compatible_checkpoints(left, tmp_path)


@pytest.mark.parametrize("file", ["vocab.json", "vocab.txt", "tokenizer.model"])
def test_a_tokenizer_of_another_form_is_compared_too(left, right, file):
    for folder in (left, right):
        (folder / "tokenizer.json").unlink()
        (folder / file).write_text('{"a": 0, "b": 1}')
    check_compatible_checkpoints(left, right)
    (right / file).write_text('{"a": 1, "b": 0}')
    assert "tokenizer is" in refusal(left, right)


def test_a_chat_template_of_the_processor_is_compared_too(left, right):
    for folder in (left, right):
        (folder / "chat_template.jinja").unlink()
        (folder / "chat_template.json").write_text('{"chat_template": "a"}')
    check_compatible_checkpoints(left, right)
    (right / "chat_template.json").write_text('{"chat_template": "b"}')
    assert "chat_template is" in refusal(left, right)


def test_a_quantised_model_has_no_fingerprint(left):
    edit_json(
        left / "config.json",
        lambda config: config.update(quantization_config={"quant_method": "gptq"}),
    )
    with pytest.raises(SkillVectorError, match=r"must not be quantised, found quant.* gptq in its"):
        fingerprint(left)


def shapes(*names, shape=(2,)):
    return dict.fromkeys(names, shape)


def test_same_parameters_are_names_and_shapes_in_any_order():
    check_same_parameters("a", shapes("x", "y"), "b", shapes("y", "x"))


def test_different_parameters_are_counted_and_the_first_five_of_each_kind_named():
    left = shapes(*"abcdef", "same") | shapes(*"uvwxyz", shape=(2, 3))
    right = shapes(*"ghijkl", "same") | shapes(*"uvwxyz", shape=(3, 2))
    with pytest.raises(SkillVectorError) as caught:
        check_same_parameters("one", left, "two", right)
    message = str(caught.value)
    assert "one and two must have the same parameters; " in message
    assert "6 only in one (first: [a, b, c, d, e, ...])" in message
    assert "6 only in two (first: [g, h, i, j, k, ...])" in message
    assert "6 with other shapes (first: [u (2, 3) and (3, 2), v " in message
    assert "y (2, 3) and (3, 2), ...])" in message


def test_a_model_may_have_more_parameters_than_a_vector_but_not_fewer():
    check_has_parameters("model", shapes("x", "y"), "vector", shapes("x"))
    with pytest.raises(SkillVectorError) as caught:
        check_has_parameters("model", shapes("x", "b"), "vector", shapes(*"abcdefg", shape=(3,)))
    message = str(caught.value)
    assert "model must have every parameter of vector, which has 7; 6 are absent" in message
    assert (
        "(first: [a, c, d, e, f, ...]), 1 have other shapes (first: [b (2,) and (3,)])" in message
    )


def test_a_vector_without_parameters_fits_nothing():
    with pytest.raises(SkillVectorError, match="vector, which has 0"):
        check_has_parameters("model", shapes("x"), "vector", {})


def test_float_tensors_in_memory_and_in_files_are_told_from_others():
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    check_float_tensors("model", {str(dtype): torch.ones(1, dtype=dtype) for dtype in allowed})
    stored = {name: StoredTensor(dtype=name, shape=(), offset=0) for name in ("F32", "BF16", "F16")}
    check_float_tensors("model", stored)
    others = {f"w{n}": StoredTensor(dtype="I8", shape=(), offset=0) for n in range(6)}
    with pytest.raises(
        SkillVectorError, match=r"6 tensors do not \(first: \[w0 I8, w1 I8, .*4 I8,"
    ):
        check_float_tensors("model", stored | others)
