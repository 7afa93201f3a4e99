import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import model_validator

from past_ray.config.base import StrictConfig
from past_ray.config.loading import config_hash, dump_config, load_config
from past_ray.config.model import CheckpointModelConfig, ModelConfig, ScratchModelConfig
from past_ray.config.rl import RLConfig
from past_ray.config.task import TaskConfig, WorldTaskConfig
from past_ray.errors import ConfigError


class Run(StrictConfig):
    name: str = "demo"
    model: ModelConfig = ScratchModelConfig()
    tasks: tuple[TaskConfig, ...] = (WorldTaskConfig(),)
    rl: RLConfig = RLConfig()

    @model_validator(mode="after")
    def check_group(self) -> "Run":
        if self.rl.group_size == 13:
            raise ValueError("rl.group_size must not be 13, got 13. Use 12.")
        return self


@pytest.fixture
def load(tmp_path):
    def load_text(text, *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(Run, path, overrides)

    return load_text


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(load):
    config = load("rl: {group_size: 4, num_steps: 6}", "rl.group_size=16", "rl.learning_rate=1e-5")
    assert (config.rl.group_size, config.rl.num_steps) == (16, 6)
    assert config.rl.learning_rate == 1e-5
    assert config.rl.temperature == RLConfig().temperature


def test_empty_file_gives_the_defaults(load):
    assert load("") == Run()


def test_last_of_two_overrides_wins(load):
    assert load("", "rl.group_size=3", "rl.group_size=4").rl.group_size == 4


def test_override_reaches_into_a_section_that_is_null(load):
    assert load("rl: {lora: null}", "rl.lora.rank=8").rl.lora.rank == 8


def test_override_replaces_a_whole_section_with_another_variant(load):
    config = load(
        "model: {kind: scratch, hidden_size: 64}", "model={kind: checkpoint, path: /models/base}"
    )
    assert config.model == CheckpointModelConfig(path=Path("/models/base"))


def test_override_reaches_a_list_entry(load):
    config = load("tasks: [{kind: world}, {kind: world}]", "tasks[1].num_people=7")
    assert [task.num_people for task in config.tasks] == [60, 7]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("rl: {grup_size: 3}", [], r"run.yaml: rl.grup_size is not a known key \(found 3\)."
         r" Did you mean rl.group_size\?"),
        ("", ["rl.group_sise=3"], r"override 'rl.group_sise=3': rl.group_sise is not a known key"
         r" \(found 3\). Did you mean rl.group_size\?"),
        ("group_size: 3", [], r"group_size is not a known key .* Did you mean rl.group_size\?"),
        ("model: {kind: scratch, hiden_size: 3}", [],
         r"model.hiden_size is not a known key .* Did you mean model.hidden_size\?"),
        ("tasks: [{kind: world}, {kind: squad, num_peple: 3}]", [],
         r"tasks\[1\].num_peple is not a known key"),
        ("rl: {lora: {rnk: 3}}", [], r"rl.lora.rnk is not .* Did you mean rl.lora.rank\?"),
        ("zzz: 1", [], r"zzz is not a known key \(found 1\). Known here: name, model, tasks, rl."),
    ],
)  # fmt: skip
def test_mistyped_key_is_named_with_the_nearest_valid_one(load, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(text, *overrides)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("rl: {group_size: many}", [], r"run.yaml: rl.group_size must be an integer, found 'many'"),
        ("", ["rl.group_size=1"], r"override 'rl.group_size=1': rl.group_size must be greater than"
         r" or equal to 2, found 1"),
        ("rl: {precision: fp64}", [], r"rl.precision must be 'fp32' or 'bf16', found 'fp64'"),
        ("rl: {gradient_checkpointing: maybe}", [],
         r"rl.gradient_checkpointing must be true or false, found 'maybe'"),
        ("rl: 3", [], r"rl must be a section of 'key: value' lines, found 3"),
        ("tasks: [{kind: squad, sources: [seal_round_1, {path: 3}]}]", [],
         r"tasks\[0\].sources\[1\].path must be text \(quote it\), found 3"),
        ("tasks: [{kind: squad, target: seal_round_3}]", [],
         r"tasks\[0\].target.preset must be 'seal_round_1', .* found 'seal_round_3'"),
        ("model: {hidden_size: 64}", [], r"model.kind must be given, found nothing. Write one of"
         r" \['scratch', 'checkpoint', 'wheel', 'hub'\]"),
        ("model: {kind: scrach}", [],
         r"model.kind must be one of .* found 'scrach'. Did you mean 'scratch'\?"),
        ("model: {kind: checkpoint}", [], r"model.path must be given, found nothing"),
        ("", ["rl.group_size=13"],
         r"run.yaml with rl.group_size=13: rl.group_size must not be 13, got 13"),
        ("rl: {group_size: 13}", [], r"run.yaml: rl.group_size must not be 13, got 13"),
    ],
)  # fmt: skip
def test_wrong_value_is_named_with_its_key_and_what_must_hold(load, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(text, *overrides)


def test_all_wrong_keys_are_reported_together(load):
    with pytest.raises(ConfigError) as caught:
        load("rl: {grup_size: 3, num_steps: 0}\nnam: x")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3


@pytest.mark.parametrize(
    "override", ["rl.group_size", "=3", "rl..x=3", "rl.group_size =3", ".x=1", "rl.=2"]
)
def test_malformed_override_is_quoted_with_the_right_form(load, override):
    with pytest.raises(ConfigError, match="must have the form key=value"):
        load("", override)


def test_override_with_a_value_that_is_not_yaml_is_refused(load):
    with pytest.raises(ConfigError, match=r"override 'name=\{': the value must be YAML"):
        load("", "name={")


def test_override_of_a_list_entry_that_does_not_exist_is_refused(load):
    with pytest.raises(ConfigError, match=r"tasks\[3\].num_people cannot be set"):
        load("tasks: [{kind: world}]", "tasks[3].num_people=7")


@pytest.mark.parametrize("text", ["- a\n- b", "3"])
def test_file_without_keys_is_refused(load, text):
    with pytest.raises(ConfigError, match="must hold keys with values"):
        load(text)


def test_broken_yaml_and_repeated_keys_are_refused_with_the_line(load):
    with pytest.raises(ConfigError, match="must be valid YAML"):
        load("rl: [")
    with pytest.raises(ConfigError, match=r"(?s)duplicate key name.*line 2"):
        load("name: a\nname: b")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml must be a YAML file, found none there"):
        load_config(Run, tmp_path / "nowhere.yaml", [])


def test_unresolvable_interpolation_names_its_key(load):
    with pytest.raises(ConfigError, match="name cannot be resolved"):
        load("name: ${nothing}")


@settings(max_examples=60, deadline=None)
@given(
    name=st.text(alphabet=string.ascii_letters + string.digits + " .:#-'\"_+", max_size=12),
    learning_rate=st.floats(min_value=1e-9, max_value=1.0),
    group_size=st.integers(min_value=2, max_value=10**6),
)
def test_dumped_configuration_loads_back_equal(tmp_path_factory, name, learning_rate, group_size):
    config = Run(
        name=name,
        model=CheckpointModelConfig(path=Path("/models/base")),
        rl=RLConfig(learning_rate=learning_rate, group_size=group_size if group_size != 13 else 12),
    )
    path = tmp_path_factory.mktemp("dump") / "run.yaml"
    path.write_text(dump_config(config))
    assert load_config(Run, path, []) == config


def test_hash_depends_on_values_and_not_on_excluded_keys():
    config, other = Run(), Run(rl=RLConfig(group_size=4))
    assert config_hash(config) == config_hash(Run())
    assert config_hash(config) != config_hash(other)
    assert config_hash(config, exclude=["rl.group_size"]) == config_hash(
        other, exclude=["rl.group_size"]
    )
    with pytest.raises(KeyError):
        config_hash(config, exclude=["rl.grup_size"])


def test_loading_imports_no_framework():
    code = (
        "import sys, past_ray.config.loading;"
        "print(sorted({'torch', 'ray', 'vllm', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
