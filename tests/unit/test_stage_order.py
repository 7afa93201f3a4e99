"""Which stages a configuration asks for, and in which order."""

from pathlib import Path

import pytest

from past_ray.config.experiment import ExperimentConfig
from past_ray.config.loading import load_config
from past_ray.errors import ConfigError
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.past import all_stages
from past_ray.pipelines.progress import ProgressDisplay

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
SQUAD = CONFIGS / "cpu" / "squad-n1.yaml"


def names(tmp_path, config, *overrides):
    loaded = load_config(ExperimentConfig, config, [f"run_dir={tmp_path}", *overrides])
    with Laboratory(loaded, ProgressDisplay()) as lab:
        return [stage.name for stage in all_stages(lab)]


@pytest.mark.parametrize("config", ["demo.yaml", "demo-squad.yaml", "cpu/squad-n1.yaml"])
def test_no_two_stages_share_a_name(tmp_path, config):
    found = names(tmp_path, CONFIGS / config)
    assert len(set(found)) == len(found)


def test_texts_are_written_before_anything_learns_from_them(tmp_path):
    found = names(tmp_path, SQUAD)
    assert found.index("texts_source") < found.index("sft_source_1")
    assert found.index("texts_target") < found.index("sft_target")


def test_the_scale_is_chosen_before_anything_is_injected_into_the_target(tmp_path):
    validation = "task.validation={path: squad/source_round1.json, start: 50, count: 8}"
    found = names(tmp_path, SQUAD, "skill_scale=null", validation)
    chosen = found.index("scale_choice")
    assert found.index("sft_validation") < found.index("eval_validation_1") < chosen
    assert chosen < found.index("adapted") < found.index("eval_past")


def test_forgetting_is_measured_where_there_is_held_out_text(tmp_path):
    held_out = "task.held_out={preset: seal_target_200, start: 150, count: 10}"
    assert "forgetting" not in names(tmp_path, SQUAD)
    assert names(tmp_path, SQUAD, held_out)[-4:-1] == [
        "eval_held_out_before",
        "eval_held_out_after",
        "forgetting",
    ]


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("cpu/squad-n1.yaml", "skill_scale=null", r"skill_scale null needs task\.validation"),
        ("cpu/squad-n1.yaml", "evaluation.dose_steps=[3]", r"dose_steps must be empty"),
        ("demo.yaml", "single_passage={}", r"single_passage .* need another task\.kind"),
        ("demo.yaml", "arms=[base, passage_only]", r"passage_only need another task\.kind"),
    ],
)
def test_what_a_regime_cannot_do_is_refused(tmp_path, config, override, message):
    with pytest.raises(ConfigError, match=message):
        names(tmp_path, CONFIGS / config, override)
