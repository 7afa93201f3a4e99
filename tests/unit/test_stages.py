"""A stage runs once, and a run directory belongs to one configuration."""

import json

import pytest
import yaml

from past_ray.config.experiment import ExperimentConfig
from past_ray.errors import ConfigError
from past_ray.pipelines.provenance import open_run
from past_ray.pipelines.stages import RunDirectory


def test_a_finished_stage_is_not_run_again(tmp_path):
    calls = []

    def work():
        calls.append(1)
        return {"value": 3}

    assert RunDirectory(tmp_path).run("a", work) == {"value": 3}
    assert RunDirectory(tmp_path).run("a", work) == {"value": 3}
    assert len(calls) == 1


def test_a_failed_stage_leaves_no_record_and_runs_again(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run.run("a", lambda: {"value": 1 // 0})
    assert run.finished("a") is None
    assert run.run("a", lambda: {"value": 1}) == {"value": 1}


def test_stage_seconds_come_in_the_order_of_finishing(tmp_path):
    run = RunDirectory(tmp_path)
    for name in ("zebra", "apple"):
        run.run(name, dict)
    assert list(run.stage_seconds()) == ["zebra", "apple"]


def config(tmp_path, **changes):
    return ExperimentConfig(run_dir=tmp_path / "run", **changes)


def test_config_versions_seed_and_commit_are_written_first(tmp_path):
    open_run(config(tmp_path, seed=7))
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["rl"]["group_size"] == 8
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["seed"] == 7
    assert {"ray", "torch", "transformers"} <= set(provenance["versions"])
    assert "git_commit" in provenance


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path):
    open_run(config(tmp_path))
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1.*delete that folder to start over"):
        open_run(config(tmp_path, seed=1))


def test_the_same_run_may_continue_on_other_processes(tmp_path):
    open_run(config(tmp_path))
    open_run(config(tmp_path, runtime={"num_rollout_workers": 2}))


def test_a_folder_with_foreign_files_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"has files but no config\.yaml"):
        open_run(config(tmp_path))
