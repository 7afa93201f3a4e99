import math

import pytest
from pydantic import ValidationError

from past_ray.config.base import StrictConfig
from past_ray.config.loading import dump_config, load_config
from past_ray.config.skill import ScaleConfig, parse_layers
from past_ray.errors import ConfigError


class Run(StrictConfig):
    scale: ScaleConfig = ScaleConfig()


@pytest.fixture
def load(tmp_path):
    def load_text(text, *overrides, model=ScaleConfig):
        path = tmp_path / "scale.yaml"
        path.write_text(text)
        return load_config(model, path, overrides)

    return load_text


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("3", {3}),
        ("8-10", {8, 9, 10}),
        ("5-5", {5}),
        ("0,3,8-10", {0, 3, 8, 9, 10}),
        (" 0, 8 , 9-10 ", {0, 8, 9, 10}),
        ("3,1-4", {1, 2, 3, 4}),
    ],
)
def test_both_ends_of_a_range_belong_to_it(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1-2-3", "1,,2", "1.5", "8 - 9", "0-99999"])
def test_layers_of_another_form_are_refused(text):
    with pytest.raises(ConfigError, match=r"Write 8-20 or 0,3,8-20"):
        parse_layers(text)


def test_range_that_runs_backwards_is_refused():
    with pytest.raises(ConfigError, match="must not run backwards, got '20-8'"):
        parse_layers("1,20-8")


def test_default_is_the_papers_scale_of_one_everywhere():
    assert ScaleConfig() == ScaleConfig(scale=1.0, layers={}, modules={})


@pytest.mark.parametrize("number", [0, 0.5, -1])
def test_plain_number_is_the_scale_of_everything(load, number):
    assert ScaleConfig.model_validate(number) == ScaleConfig(scale=number)
    assert load(f"scale: {number}", model=Run).scale == ScaleConfig(scale=number)
    assert load("", f"scale={number}", model=Run).scale == ScaleConfig(scale=number)


@pytest.mark.parametrize("value", [True, "0.5", [0.5], None])
def test_what_is_neither_a_number_nor_a_section_is_refused(value):
    with pytest.raises(ValidationError):
        ScaleConfig.model_validate(value)


def test_file_gives_factors_by_layer_and_module(load):
    config = load("scale: 0.5\nlayers: {0-7: 0, '8,10-12': 1.5, 9: 2}\nmodules: {attn: 2}")
    assert config.scale == 0.5
    assert config.layers == {"0-7": 0.0, "8,10-12": 1.5, "9": 2.0}
    assert config.modules == {"attn": 2.0}


def test_override_sets_one_range(load):
    assert load("layers: {8-20: 0.5}", "layers.8-20=2").layers == {"8-20": 2.0}


def test_dumped_scales_load_back_equal(load):
    config = load("scale: 0.5\nlayers: {3: 0, 8-20: 1.5}\nmodules: {norm: 0}")
    assert load(dump_config(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer: {3: 1}", r"scale.yaml: layer is not a known key .* Did you mean layers\?"),
        ("layers: {8-20: much}", r"layers.8-20 must be a number, found 'much'"),
        ("layers: {first: 1}", r"layers: layers must be numbers and ranges .* got 'first'"),
        ("layers: {20-8: 1}", r"layers: a range of layers must not run backwards, got '20-8'"),
        ("scale: .inf", "scale must be a finite number, found inf"),
        ("scale: .nan", "scale must be a finite number, found nan"),
        ("layers: {3-4: .nan}", "layers.3-4 must be a finite number, found nan"),
        ("modules: {attn: .inf}", "modules.attn must be a finite number, found inf"),
        ("modules: [attn]", "modules must be a"),
    ],
)
def test_mistake_in_the_file_is_named_with_its_key(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


@pytest.mark.parametrize("second", ["20-30", "8", "0,9", "0-99"])
def test_layer_in_two_ranges_is_refused_with_both(load, second):
    with pytest.raises(ConfigError, match=rf"layer \d+ in '8-20' and in '{second}'"):
        load(f"layers: {{8-20: 1, '{second}': 2}}")


def test_adjacent_ranges_do_not_overlap():
    layers = {"0-7": 0.0, "8-20": 1.0, "21": 2.0}
    assert ScaleConfig(layers=layers).layers == layers


def test_scales_cannot_be_anything_but_finite():
    for value in (math.nan, math.inf):
        with pytest.raises(ValidationError):
            ScaleConfig(scale=value)
