import pytest
from safetensors import safe_open

from past_ray.config.skill import ScaleConfig
from past_ray.errors import ConfigError, SkillVectorError
from past_ray.skill.parameter_names import (
    ParameterPlace,
    check_scales_match,
    parse,
    scale_of,
    select_names,
)
from tests.tiny_model import make_tiny_model

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
Q3, Q3_BIAS = "model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.bias"
UP3, NORM3 = "model.layers.3.mlp.up_proj.weight", "model.layers.3.input_layernorm.weight"
Q12, UP12 = "model.layers.12.self_attn.q_proj.weight", "model.layers.12.mlp.up_proj.weight"
NAMES = [EMBED, Q3, Q3_BIAS, UP3, NORM3, Q12, UP12, NORM, HEAD]


@pytest.mark.parametrize(
    ("name", "layer", "module", "block"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "q_proj", "attn"),
        ("model.layers.3.self_attn.q_proj.bias", 3, "q_proj", "attn"),
        ("model.layers.3.mlp.gate_proj.weight", 3, "gate_proj", "mlp"),
        ("model.layers.17.input_layernorm.weight", 17, "input_layernorm", "norm"),
        ("model.layers.3.post_attention_layernorm.weight", 3, "post_attention_layernorm", "norm"),
        ("model.layers.3.self_attn.q_norm.weight", 3, "q_norm", "norm"),
        ("model.embed_tokens.weight", None, "embed_tokens", "embed"),
        ("lm_head.weight", None, "lm_head", "head"),
        ("model.norm.weight", None, "norm", "norm"),
        # Mixtures of experts: the expert's number is not a layer, the router is part of the MLP.
        ("model.layers.3.mlp.experts.5.up_proj.weight", 3, "up_proj", "mlp"),
        ("model.layers.3.mlp.experts.gate_up_proj", 3, "gate_up_proj", "mlp"),
        ("model.layers.3.mlp.gate.weight", 3, "gate", "mlp"),
        ("model.layers.3.mlp.shared_expert.down_proj.weight", 3, "down_proj", "mlp"),
        ("model.layers.3.block_sparse_moe.experts.0.w1.weight", 3, "w1", "mlp"),
        ("model.layers.3.self_attn.sinks", 3, "sinks", "attn"),
        # GPT-2, GPT-NeoX, Falcon and a model behind a prefix.
        ("transformer.h.3.attn.c_attn.weight", 3, "c_attn", "attn"),
        ("transformer.h.3.mlp.c_proj.bias", 3, "c_proj", "mlp"),
        ("transformer.h.3.ln_1.weight", 3, "ln_1", "norm"),
        ("h.3.ln_2.bias", 3, "ln_2", "norm"),
        ("transformer.ln_f.weight", None, "ln_f", "norm"),
        ("transformer.wte.weight", None, "wte", "embed"),
        ("gpt_neox.layers.3.attention.query_key_value.weight", 3, "query_key_value", "attn"),
        ("gpt_neox.embed_in.weight", None, "embed_in", "embed"),
        ("embed_out.weight", None, "embed_out", "head"),
        ("transformer.word_embeddings.weight", None, "word_embeddings", "embed"),
        ("transformer.h.3.self_attention.dense.weight", 3, "dense", "attn"),
        ("base.model.layers.0.self_attn.o_proj.weight", 0, "o_proj", "attn"),
        ("model.layers.3.mixer.in_proj.weight", 3, "in_proj", "other"),
        ("transformer.blocks.3.ffn.up_proj.weight", 3, "up_proj", "mlp"),
        ("weight", None, "weight", "other"),
    ],
)
def test_place_of_a_parameter(name, layer, module, block):
    assert parse(name) == ParameterPlace(layer=layer, module=module, block=block)


def test_no_parameter_of_a_real_model_is_other(tmp_path):
    with safe_open(make_tiny_model(tmp_path / "m") / "model.safetensors", "pt") as weights:
        places = [parse(name) for name in weights.keys()]  # noqa: SIM118, it is no mapping
    assert {place.layer for place in places} == {None, 0, 1}
    assert {place.block for place in places} == {"attn", "mlp", "norm", "embed", "head"}


def test_without_a_choice_all_names_are_selected_in_their_order():
    assert select_names(NAMES, layers=None, modules=None) == NAMES


def test_layers_select_no_parameter_outside_of_layers():
    assert select_names(NAMES, layers="0-3", modules=None) == [Q3, Q3_BIAS, UP3, NORM3]
    assert select_names(NAMES, layers="3,12", modules=None) == NAMES[1:7]


def test_modules_are_named_by_module_or_block():
    assert select_names(NAMES, layers=None, modules=["q_proj"]) == [Q3, Q3_BIAS, Q12]
    assert select_names(NAMES, layers=None, modules=["head", "mlp"]) == [UP3, UP12, HEAD]
    assert select_names(NAMES, layers=None, modules=["norm"]) == [NORM3, NORM]


def test_layers_and_modules_must_both_hold():
    assert select_names(NAMES, layers="12", modules=["attn"]) == [Q12]


def test_range_without_a_layer_is_refused_with_the_layers_there_are():
    with pytest.raises(SkillVectorError, match=r"layers '13-20' .* which has 3 to 12\."):
        select_names(NAMES, layers="3,13-20", modules=None)
    with pytest.raises(SkillVectorError, match=r"layers '0' .* which has none\."):
        select_names([EMBED, NORM], layers="0", modules=None)


def test_malformed_layers_are_refused():
    with pytest.raises(ConfigError, match="Write 8-20"):
        select_names(NAMES, layers="3-", modules=None)


def test_unknown_module_is_refused_with_those_there_are():
    with pytest.raises(SkillVectorError, match=r"got \['qproj'\]; there are \['attn', 'embed',"):
        select_names(NAMES, layers=None, modules=["attn", "qproj"])


def test_message_lists_at_most_a_dozen_modules():
    names = [f"model.layers.0.mlp.proj{i:02}.weight" for i in range(20)]
    with pytest.raises(SkillVectorError, match=r"\['mlp', 'proj00', .*'proj10'\] and 9 more"):
        select_names(names, layers=None, modules=["q_proj"])


def test_module_that_the_selected_layers_lack_is_refused():
    # Else the head would be left out in silence.
    with pytest.raises(SkillVectorError, match=r"got \['head'\]"):
        select_names(NAMES, layers="3", modules=["attn", "head"])


def test_scale_is_the_product_of_all_factors_that_name_the_parameter():
    config = ScaleConfig(
        scale=0.5, layers={"0-7": 3.0, "8-20": 5.0}, modules={"attn": 7.0, "q_proj": 11.0}
    )
    assert scale_of(Q3, config) == 0.5 * 3 * 7 * 11
    assert scale_of(Q3_BIAS, config) == 0.5 * 3 * 7 * 11
    assert scale_of("model.layers.3.self_attn.k_proj.weight", config) == 0.5 * 3 * 7
    assert scale_of(UP12, config) == 0.5 * 5
    assert scale_of("model.layers.21.mlp.up_proj.weight", config) == 0.5
    assert scale_of(EMBED, config) == 0.5


def test_last_layer_of_a_range_has_its_factor_and_the_next_has_not():
    config = ScaleConfig(layers={"8-20": 0.0})
    scales = [scale_of(f"model.layers.{layer}.mlp.up_proj.weight", config) for layer in range(24)]
    assert scales == [1.0] * 8 + [0.0] * 13 + [1.0] * 3


def test_module_that_is_also_a_block_has_its_factor_once():
    # The last norm is the module "norm" of the block "norm".
    assert scale_of(NORM, ScaleConfig(modules={"norm": 3.0})) == 3.0


def test_scales_that_name_nothing_in_the_model_are_refused():
    check_scales_match(NAMES, ScaleConfig(layers={"0-12": 2.0}, modules={"mlp": 2.0, "norm": 0}))
    with pytest.raises(SkillVectorError, match=r"layers '13-20' .* which has 3 to 12"):
        check_scales_match(NAMES, ScaleConfig(layers={"0-12": 2.0, "13-20": 1.0}))
    with pytest.raises(SkillVectorError, match=r"got \['k_proj'\]"):
        check_scales_match(NAMES, ScaleConfig(modules={"attn": 2.0, "k_proj": 1.0}))
