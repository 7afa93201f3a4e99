"""Impossible experiments are refused while the configuration is read."""

from pathlib import Path

import pytest

from past_ray.config.experiment import ExperimentConfig
from past_ray.config.loading import load_config
from past_ray.errors import ConfigError

DEMO = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"


def test_a_dotted_override_wins_over_the_file():
    assert load_config(ExperimentConfig, DEMO, ["rl.group_size=16"]).rl.group_size == 16


def test_a_mistyped_key_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"rl\.group_sise.*Did you mean rl\.group_size\?"):
        load_config(ExperimentConfig, DEMO, ["rl.group_sise=16"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.num_steps=7", r"must be even"),
        ("sft.batch_size=3", r"sft\.batch_size must be a multiple of runtime\.num_sft_workers"),
        ("task.kind=squad", r"task"),
        ("arms=[base, in_context]", r"arm in_context needs task\.kind squad or tables"),
        ("rl.lora={dropout: 0.1}", r"lora\.dropout must be 0 in RL"),
        ("rl.max_new_tokens=4000", r"rl\.max_new_tokens must be below"),
        ("model={kind: checkpoint, path: /m}", r"task\.kind world needs model\.kind scratch"),
    ],
)
def test_contradictions_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ExperimentConfig, DEMO, [override])


def test_two_rounds_share_the_steps_of_one():
    config = load_config(ExperimentConfig, DEMO, [])
    assert config.num_rounds == 2
    assert 2 * config.steps_per_round == config.rl.num_steps
