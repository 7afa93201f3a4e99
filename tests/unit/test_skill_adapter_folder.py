"""Folders of adapters, as PEFT writes, reads and merges them."""

import json
import math
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from past_ray.errors import SkillVectorError, StorageError
from past_ray.locations import open_folder
from past_ray.skill.adapter import concatenate, lora_delta
from past_ray.skill.adapter_folder import is_adapter, read_adapter, write_adapter
from tests.peft_adapters import (
    ALL_LINEAR,
    base_fixture,  # noqa: F401
    load,
    logits,
    make_peft_adapter,
)
from tests.skill_models import distance

FORMS = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "rslora": {"target_modules": ["o_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "target_modules": ALL_LINEAR,
        "r": 8,
        "lora_alpha": 4,
        # The first pattern that fits wins, a pattern must start at a dot, and both may be regexes.
        "rank_pattern": {
            "layers.0.self_attn.q_proj": 3,
            "q_proj": 5,
            "v_pro": 9,
            "k_proj|o_proj": 6,
            r"model\.layers\.1\..*(up|gate)_proj": 2,
        },
        "alpha_pattern": {"mlp.up_proj": 16, r"layers\.\d+\.mlp\.down_proj": 1, "roj": 99},
    },
    "patterns with rslora": {
        "target_modules": ALL_LINEAR,
        "r": 8,
        "lora_alpha": 4,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 7},
    },
    "one layer": {"target_modules": r".*\.1\.(self_attn\.k|mlp\.down)_proj", "r": 16},
    "head": {"target_modules": ["lm_head", "down_proj"], "r": 2},
}


@pytest.fixture
def saved(base, tmp_path):
    make_peft_adapter(base, tmp_path / "saved", seed=1, **FORMS["plain"])
    return tmp_path / "saved"


def read(folder):
    return read_adapter(open_folder(str(folder)))


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(edit(tensors), folder / "adapter_model.safetensors")


def key(factor="A", module="layers.0.self_attn.q_proj"):
    return f"base_model.model.model.{module}.lora_{factor}.weight"


# What PEFT means by an adapter


@pytest.mark.parametrize("form", FORMS)
def test_a_delta_is_what_pefts_merge_adds(form, base, tmp_path):
    expected = make_peft_adapter(base, tmp_path, seed=3, **FORMS[form])
    adapter = read(tmp_path)
    assert list(adapter.modules) == sorted(expected)
    for name, module in adapter.modules.items():
        assert module.shape == expected[name].shape
        assert expected[name].abs().max() > 0.01
        assert (lora_delta(module) - expected[name]).abs().max() < 1e-6


def test_patterns_give_each_module_its_own_rank_and_scaling(base, tmp_path):
    make_peft_adapter(base, tmp_path, seed=3, **FORMS["patterns"])
    modules = read(tmp_path).modules
    found = {
        name.removeprefix("model.layers."): (module.rank, module.scaling)
        for name, module in modules.items()
    }
    assert found["0.self_attn.q_proj.weight"] == (3, 4 / 3)
    assert found["1.self_attn.q_proj.weight"] == (5, 4 / 5)
    assert found["1.self_attn.v_proj.weight"] == (8, 4 / 8)
    assert found["1.self_attn.o_proj.weight"] == (6, 4 / 6)
    assert found["0.mlp.up_proj.weight"] == (8, 16 / 8)
    assert found["1.mlp.up_proj.weight"] == (2, 16 / 2)
    assert found["1.mlp.down_proj.weight"] == (8, 1 / 8)


def test_pefts_linear_combination_is_not_the_sum_of_two_adapters(base, tmp_path):
    one = make_peft_adapter(base, tmp_path / "one", seed=1, **FORMS["plain"])
    two = make_peft_adapter(base, tmp_path / "two", seed=2, **FORMS["plain"])
    model = peft.PeftModel.from_pretrained(load(base), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    merged, before = model.merge_and_unload().state_dict(), load(base).state_dict()
    ours = concatenate([(1.0, read(tmp_path / name)) for name in ("one", "two")])
    for name in one:
        expected = one[name] + two[name]
        assert distance(merged[name] - before[name], expected) > 0.5
        assert distance(lora_delta(ours.modules[name]), expected) < 1e-6


# Folders


@pytest.mark.parametrize(("first", "second"), [("patterns", "rslora"), ("plain", "one layer")])
def test_a_written_sum_loads_in_peft_without_a_warning_and_gives_the_merged_logits(
    first, second, base, tmp_path
):
    one = make_peft_adapter(base, tmp_path / "one", seed=1, **FORMS[first])
    two = make_peft_adapter(base, tmp_path / "two", seed=2, **FORMS[second])
    adapters = [read(tmp_path / name) for name in ("one", "two")]
    summed = concatenate([(1.0, adapters[0]), (-0.5, adapters[1])])
    write_adapter(tmp_path / "sum", summed, base_model="some/base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.PeftModel.from_pretrained(load(base), tmp_path / "sum")
        loaded = model.load_adapter(tmp_path / "sum", adapter_name="again")
    assert loaded.missing_keys == loaded.unexpected_keys == []
    wrapped = {name for name, _ in model.named_parameters() if "lora_A.again" in name}
    assert len(wrapped) == len(summed.modules)
    merged = load(base).double()
    with torch.no_grad():
        for name, weight in merged.named_parameters():
            weight += one.get(name, 0) - 0.5 * two.get(name, 0)
    with_adapter, expected = logits(model.double()), logits(merged)
    assert (expected - logits(load(base))).abs().max() > 1
    assert (with_adapter - expected).abs().max() < 1e-5


def test_a_written_adapter_is_one_of_rank_and_alpha_that_vllm_takes(saved, tmp_path):
    adapter = read(saved)
    write_adapter(tmp_path / "out", adapter, base_model=None)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert config["base_model_name_or_path"] is None
    assert config["target_modules"][0] == "model.layers.0.self_attn.q_proj"
    assert len(config["target_modules"]) == 4
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors[key("A")].shape == (8, 64)
    assert tensors[key("B")].shape == (64, 8)


def test_a_written_adapter_reads_back_bit_for_bit(saved, tmp_path):
    summed = concatenate([(3.0, read(saved))])
    write_adapter(tmp_path / "out", summed, base_model=None)
    back = read(tmp_path / "out")
    assert list(back.modules) == list(summed.modules)
    for name, module in summed.modules.items():
        assert torch.equal(back.modules[name].a, module.a)
        assert torch.equal(back.modules[name].b, module.b)
        assert back.modules[name].scaling == 1.0


def test_a_folder_is_an_adapter_if_it_has_an_adapter_config(base, saved):
    assert is_adapter(open_folder(str(saved)))
    assert not is_adapter(open_folder(str(base)))


def test_keys_with_the_adapters_name_are_read(saved):
    expected = read(saved)
    edit_tensors(
        saved,
        lambda tensors: {k.replace(".weight", ".default.weight"): tensors[k] for k in tensors},
    )
    found = read(saved)
    assert list(found.modules) == list(expected.modules)
    assert found.config == json.loads((saved / "adapter_config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_dtypes_are_read_as_float32(dtype, saved):
    edit_tensors(saved, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    stored = load_file(saved / "adapter_model.safetensors")
    module = read(saved).modules["model.layers.0.self_attn.q_proj.weight"]
    assert module.a.dtype == module.b.dtype == torch.float32
    assert torch.equal(module.a, stored[key("A")].float())


def test_an_alpha_of_zero_changes_nothing(saved):
    edit_config(saved, lora_alpha=0)
    modules = read(saved).modules
    assert not any(lora_delta(module).any() for module in modules.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"peft_type": None}, "peft_type=None"),
        ({"bias": "all"}, "bias='all'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\]"),
        ({"target_parameters": ["experts.up"]}, "target_parameters="),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens="),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"bias": "all", "use_dora": True}, "bias='all', use_dora=True"),
    ],
    ids=str,
)
def test_what_is_no_plain_lora_is_refused(changes, message, saved):
    edit_config(saved, **changes)
    with pytest.raises(SkillVectorError, match=f"plain LoRA adapter, found .*{message}.*Merge it"):
        read(saved)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.weight",
        "model.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight",
    ],
)
def test_a_tensor_that_is_no_factor_of_its_own_module_is_refused(name, saved):
    edit_tensors(saved, lambda tensors: {**tensors, name: torch.zeros(4, 64)})
    with pytest.raises(SkillVectorError, match="per module and nothing else, found 1 that break"):
        read(saved)


def test_at_most_five_tensors_are_named(saved):
    edit_tensors(
        saved, lambda tensors: tensors | {f"extra.{index}": torch.zeros(1) for index in range(7)}
    )
    with pytest.raises(SkillVectorError, match=r"found 7 .*extra\.4\)"):
        read(saved)


def test_an_adapter_without_tensors_is_refused(saved):
    edit_tensors(saved, lambda tensors: {})
    with pytest.raises(SkillVectorError, match="no tensors"):
        read(saved)


def test_quantised_factors_are_refused(saved):
    edit_tensors(saved, lambda tensors: {k: v.to(torch.int8) for k, v in tensors.items()})
    with pytest.raises(SkillVectorError, match=r"floating point.*q_proj.lora_A.weight torch.int8"):
        read(saved)
    edit_tensors(saved, lambda tensors: {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()})
    with pytest.raises(SkillVectorError, match=r"floating point.*torch.float8_e4m3fn"):
        read(saved)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_that_are_not_finite_are_refused(value, saved):
    def spoil(tensors):
        tensors[key("B")][3, 1] = value
        return tensors

    edit_tensors(saved, spoil)
    with pytest.raises(SkillVectorError, match=r"finite numbers, found 1 .*q_proj\.lora_B\.weight"):
        read(saved)


def test_a_factor_without_the_other_is_refused(saved):
    edit_tensors(saved, lambda tensors: {k: v for k, v in tensors.items() if k != key("B")})
    with pytest.raises(SkillVectorError, match=r"layers\.0\.self_attn\.q_proj with only lora_A"):
        read(saved)


@pytest.mark.parametrize("changes", [{"r": 8}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_a_rank_other_than_the_configs_is_refused(changes, saved):
    edit_config(saved, **changes)
    with pytest.raises(SkillVectorError, match=r"q_proj A \(4, 64\) B \(64, 4\) for rank [28]"):
        read(saved)


@pytest.mark.parametrize(
    "changes",
    [{"r": 0}, {"r": None}, {"lora_alpha": "8"}, {"rank_pattern": {"q_proj": -1}}],
    ids=str,
)
def test_a_rank_below_one_or_a_missing_setting_is_refused(changes, saved):
    edit_config(saved, **changes)
    with pytest.raises(SkillVectorError, match="rank of at least 1 and an alpha"):
        read(saved)


def test_factors_that_are_no_matrices_are_refused(saved):
    edit_tensors(saved, lambda tensors: tensors | {key("A"): torch.zeros(4, 64, 1)})
    with pytest.raises(SkillVectorError, match=r"q_proj A \(4, 64, 1\)"):
        read(saved)


@pytest.mark.parametrize("num_bytes", [0, 5, 200, -1])
def test_a_cut_off_file_is_named(num_bytes, saved):
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(
        StorageError, match=r"adapter_model\.safetensors in .*saved must be a compl"
    ):
        read(saved)


def test_missing_and_unreadable_files_are_named(saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(StorageError, match=r"must hold adapter_model\.safetensors"):
        read(saved)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(StorageError, match=r"adapter_config\.json"):
        read(saved)
