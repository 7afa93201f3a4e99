import json
import math
import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from past_ray.errors import SkillVectorError, StorageError
from past_ray.locations import open_folder
from past_ray.skill.adapter import (
    Adapter,
    LoraModule,
    concatenate,
    lora_delta,
    truncated_svd,
    vllm_rank,
)
from past_ray.skill.adapter_folder import is_adapter, read_adapter, write_adapter
from tests.tiny_model import make_tiny_model

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def saved(base, tmp_path):
    make_peft_adapter(base, tmp_path / "saved", seed=1, **FORMS["plain"])
    return tmp_path / "saved"


def load(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def read(folder):
    return read_adapter(open_folder(str(folder)))


def make_peft_adapter(base, folder, *, seed, **settings):
    """Save an adapter with random factors; returns what PEFT's own merge adds to each weight."""
    with warnings.catch_warnings():
        # PEFT warns of patterns that match nothing, and that an adapted head was not saved.
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder, save_embedding_layers=False)
        merged, before = model.merge_and_unload().state_dict(), load(base).state_dict()
    changes = {name: merged[name].double() - before[name].double() for name in before}
    return {name: change for name, change in changes.items() if change.any()}


def random_module(*, shape=(48, 32), rank=4, scaling=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LoraModule(
        a=torch.randn(rank, shape[1], generator=generator),
        b=torch.randn(shape[0], rank, generator=generator),
        scaling=scaling,
    )


def adapter_of(**modules):
    return Adapter(modules=modules, config={})


def dense(module):
    return module.scaling * module.b.double() @ module.a.double()


def distance(found, expected):
    """Relative, in the Frobenius norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def logits(model):
    ids = torch.tensor([[3, 6, 7, 8, 9, 20, 21, 1, 4]])
    with torch.no_grad():
        return model(ids).logits


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


# lora_delta


@given(
    num_rows=st.integers(1, 700),
    num_columns=st.integers(1, 40),
    rank=st.integers(0, 20),
    start=st.integers(-750, 750) | st.none(),
    stop=st.integers(-750, 750) | st.none(),
)
def test_any_rows_have_the_bits_of_the_whole(num_rows, num_columns, rank, start, stop):
    module = random_module(shape=(num_rows, num_columns), rank=rank, scaling=1 / 3)
    rows = lora_delta(module, rows=slice(start, stop))
    whole = lora_delta(module)[start:stop]
    assert rows.shape == whole.shape
    assert torch.equal(rows.view(torch.int32), whole.view(torch.int32))


@pytest.mark.parametrize("chunk", [1, 37, 255, 256, 257, 1000])
def test_chunks_of_a_wide_weight_add_up_to_its_bits(chunk):
    module = random_module(shape=(1001, 777), rank=33)
    parts = [lora_delta(module, rows=slice(at, at + chunk)) for at in range(0, 1001, chunk)]
    assert torch.equal(torch.cat(parts), lora_delta(module))


def test_a_delta_does_not_depend_on_where_its_factors_lie_in_memory():
    module = random_module(shape=(300, 65), rank=5)
    shifted = {}
    for name, factor in (("a", module.a), ("b", module.b)):
        room = torch.empty(factor.numel() + 1)
        shifted[name] = room[1:].view(factor.shape).copy_(factor)
    strided = LoraModule(a=module.a.T.contiguous().T, b=shifted["b"], scaling=module.scaling)
    moved = LoraModule(**shifted, scaling=module.scaling)
    assert torch.equal(lora_delta(moved), lora_delta(module))
    assert torch.equal(lora_delta(strided), lora_delta(module))


def test_a_delta_is_scaling_times_b_times_a():
    module = LoraModule(
        a=torch.tensor([[1.0, 2.0, 3.0]]), b=torch.tensor([[10.0], [-1.0]]), scaling=0.5
    )
    assert module.shape == (2, 3)
    assert lora_delta(module).tolist() == [[5.0, 10.0, 15.0], [-0.5, -1.0, -1.5]]
    assert lora_delta(module, rows=slice(1, 2)).tolist() == [[-0.5, -1.0, -1.5]]


def test_half_precision_factors_are_multiplied_out_in_float32():
    module = random_module(rank=16)
    half = LoraModule(a=module.a.bfloat16(), b=module.b.bfloat16(), scaling=0.5)
    assert lora_delta(half).dtype == torch.float32
    assert distance(lora_delta(half), dense(half)) < 1e-6


# concatenate


@given(
    weights=st.lists(st.floats(-3, 3), min_size=1, max_size=4).filter(
        lambda w: max(map(abs, w)) > 0.1
    ),
    ranks=st.lists(st.integers(1, 12), min_size=4, max_size=4),
)
def test_a_concatenation_is_the_weighted_sum_of_dense_deltas(weights, ranks):
    modules = [
        random_module(rank=rank, scaling=0.3 * (seed + 1), seed=seed)
        for seed, (_, rank) in enumerate(zip(weights, ranks, strict=False))
    ]
    parts = list(zip(weights, (adapter_of(w=module) for module in modules), strict=True))
    found = concatenate(parts).modules["w"]
    expected = sum(weight * dense(module) for weight, module in zip(weights, modules, strict=True))
    scale = sum(abs(w) * dense(m).norm() for w, m in zip(weights, modules, strict=True))
    assert (dense(found) - expected).norm() < 1e-7 * scale
    assert (lora_delta(found) - expected).norm() < 1e-6 * scale


def test_a_difference_of_adapters_has_a_negative_weight():
    one, two = random_module(seed=1), random_module(seed=2)
    found = concatenate([(1.0, adapter_of(w=one)), (-1.0, adapter_of(w=two))])
    assert distance(lora_delta(found.modules["w"]), dense(one) - dense(two)) < 1e-6


def test_modules_that_only_some_adapters_have_are_kept_at_the_common_rank():
    one = adapter_of(b=random_module(rank=5, seed=1), c=random_module(shape=(7, 9), rank=1, seed=2))
    two = adapter_of(b=random_module(rank=4, seed=3), a=random_module(rank=3, seed=4))
    found = concatenate([(2.0, one), (0.5, two)])
    assert list(found.modules) == ["a", "b", "c"]
    # The largest sum of ranks is 5 + 4, and vLLM's next is 16.
    assert {(module.rank, module.scaling) for module in found.modules.values()} == {(16, 1.0)}
    assert distance(lora_delta(found.modules["a"]), 0.5 * dense(two.modules["a"])) < 1e-6
    assert distance(lora_delta(found.modules["c"]), 2.0 * dense(one.modules["c"])) < 1e-6
    assert not found.modules["c"].a[1:].any()
    assert not found.modules["c"].b[:, 1:].any()
    assert found.config == {}


def test_a_concatenation_of_one_concatenation_is_itself_bit_for_bit():
    once = concatenate([(0.7, adapter_of(w=random_module(rank=3)))])
    twice = concatenate([(1.0, once)])
    assert torch.equal(twice.modules["w"].a, once.modules["w"].a)
    assert torch.equal(twice.modules["w"].b, once.modules["w"].b)


def test_other_shapes_of_a_weight_are_refused_naming_the_first_five():
    one = adapter_of(**{name: random_module(shape=(48, 32)) for name in "abcdefg"})
    two = adapter_of(**{name: random_module(shape=(48, 33)) for name in "bcdefg"})
    with pytest.raises(SkillVectorError) as caught:
        concatenate([(1.0, one), (1.0, two)])
    assert "found 6 with several (first: b (48, 32) and (48, 33), c" in str(caught.value)
    assert "f (48, 32)" in str(caught.value)
    assert "g (48, 32)" not in str(caught.value)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(SkillVectorError, match="weights must be finite"):
        concatenate([(weight, adapter_of(w=random_module()))])


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(SkillVectorError, match="at least one weight, got 1 adapters"):
        concatenate([(1.0, adapter_of())])


def test_ranks_are_rounded_up_to_one_that_vllm_serves():
    expected = {0: 1, 1: 1, 2: 8, 8: 8, 9: 16, 24: 32, 65: 128, 257: 320, 321: 512, 512: 512}
    assert {rank: vllm_rank(rank) for rank in expected} == expected


def test_a_rank_that_vllm_cannot_serve_is_refused_with_the_ways_out():
    with pytest.raises(SkillVectorError, match=r"at most 512.*got 520.*lower rank, or merge"):
        concatenate([(1.0, adapter_of(w=random_module(rank=260)))] * 2)


# truncated_svd


def spectrum_matrix(num_rows, num_columns, exponent):
    """A matrix with the singular values 1, 2**-exponent, 3**-exponent, ..."""
    generator = torch.Generator().manual_seed(5)
    size = min(num_rows, num_columns)
    left = torch.linalg.qr(torch.randn(num_rows, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(num_columns, size, generator=generator)).Q
    return (left * torch.arange(1, size + 1).pow(-exponent)) @ right.T


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (800, 1000), (1000, 800)], ids=str)
def test_the_energy_is_that_of_an_exact_svd(shape, exponent):
    values = torch.arange(1, min(shape) + 1).double().pow(-2 * exponent)
    matrix = spectrum_matrix(*shape, exponent)
    for rank in (1, 16):
        module, energy = truncated_svd(matrix, rank=rank)
        assert module.rank == rank
        assert energy == pytest.approx((values[:rank].sum() / values.sum()).item(), abs=1e-3)
        kept = (dense(module).norm() / matrix.double().norm()).square().item()
        assert energy == pytest.approx(kept, abs=1e-5)


@pytest.mark.parametrize("shape", [(40, 90), (1000, 800)], ids=str)
def test_white_noise_too_is_approximated_as_well_as_possible(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    values = torch.linalg.svdvals(matrix.double()).square()
    _, energy = truncated_svd(matrix, rank=16)
    assert energy == pytest.approx((values[:16].sum() / values.sum()).item(), abs=1e-3)


@pytest.mark.parametrize("shape", [(40, 90), (800, 1000), (1000, 800)], ids=str)
def test_a_matrix_of_the_rank_comes_back_whole(shape):
    original = random_module(shape=shape, rank=7)
    module, energy = truncated_svd(lora_delta(original), rank=7)
    assert energy == pytest.approx(1.0, abs=1e-9)
    assert distance(lora_delta(module), dense(original)) < 1e-5
    assert module.scaling == 1.0
    # Both factors carry the square root of each singular value.
    assert torch.allclose(module.a.norm(dim=1), module.b.norm(dim=0), rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 9), (800, 801)], ids=str)
def test_a_zero_matrix_keeps_all_of_nothing(shape):
    module, energy = truncated_svd(torch.zeros(shape), rank=2)
    assert energy == 1.0
    assert torch.equal(lora_delta(module), torch.zeros(shape))


def test_a_rank_above_the_smaller_side_is_cut_to_it():
    matrix = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    module, energy = truncated_svd(matrix, rank=64)
    assert module.rank == 5
    assert energy == pytest.approx(1.0, abs=1e-9)
    assert distance(lora_delta(module), matrix) < 1e-6


def test_the_randomised_svd_repeats_itself_and_leaves_the_global_generator_alone():
    matrix = spectrum_matrix(800, 800, 0.3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, _ = truncated_svd(matrix, rank=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two, _ = truncated_svd(matrix, rank=4)
    assert torch.equal(one.a, two.a)
    assert torch.equal(one.b, two.b)


def test_a_bfloat16_matrix_is_approximated_in_float32():
    module, energy = truncated_svd(lora_delta(random_module(rank=2)).bfloat16(), rank=2)
    assert module.a.dtype == module.b.dtype == torch.float32
    assert energy > 0.9999


def test_what_cannot_be_approximated_is_refused():
    with pytest.raises(SkillVectorError, match="at least 1, got 0"):
        truncated_svd(torch.ones(2, 2), rank=0)
    with pytest.raises(SkillVectorError, match="must be finite"):
        truncated_svd(torch.tensor([[1.0, math.nan]]), rank=1)


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
