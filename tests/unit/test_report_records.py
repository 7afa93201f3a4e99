"""The report holds what optional stages recorded, and no key for a stage that did not run."""

import pytest

from past_ray.config.experiment import ExperimentConfig
from past_ray.pipelines.data import prepare_tables
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.progress import ProgressDisplay
from past_ray.pipelines.summary import summarise

OPTIONAL = {"scale_choice", "forgetting", "diagnostics", "texts_source", "texts_target", "paper"}


def record(lab, stage, result):
    lab.run.run(stage, lambda: result)


def evaluation(lab, accuracy):
    questions = lab.domain("target").questions["question_id"].to_pylist()
    return {
        "accuracy": accuracy,
        "ci95": [accuracy - 0.1, accuracy + 0.1],
        "answer_tokens": 2.0,
        "judge_failures": 1,
        "answers": dict.fromkeys(questions, "?"),
        "correct": dict.fromkeys(questions, accuracy),
    }


@pytest.fixture
def lab(tmp_path):
    """A finished run of the smallest kind: the base model and an RL stage."""
    config = ExperimentConfig(run_dir=tmp_path, arms=("base",), evaluation={"scales": ()})
    lab = Laboratory(config, ProgressDisplay())
    prepare_tables(config.task, lab.run, num_rounds=1, seed=0)
    record(lab, "eval_base", evaluation(lab, 0.25))
    record(lab, "geometry", {})
    record(lab, "rl_source_1", {"metrics": [{"logprob_gap": 1e-6, "sync_seconds": 0.5}]})
    return lab


def test_stages_that_did_not_run_leave_no_key(lab):
    assert summarise(lab).keys() & OPTIONAL == set()


def test_optional_stages_appear_as_they_were_recorded(lab):
    choice = {"scale": 0.5, "accuracy": 0.4, "best_scale": 1.0, "reason": "because"}
    texts = {"texts": 3, "empty": 1, "truncated": 0}
    record(lab, "scale_choice", choice)
    record(lab, "texts_target", texts)
    record(lab, "diagnostics", {"warnings": []})
    report = summarise(lab)
    assert report["scale_choice"] == choice
    assert report["texts_target"] == texts
    assert report["diagnostics"] == {"warnings": []}
    assert "texts_source" not in report


def test_forgetting_has_the_in_context_answers_of_the_same_model(lab):
    figures = {"perplexity": 20.0, "next_token_accuracy": 0.5}
    record(lab, "forgetting", {"before": figures, "after": figures | {"perplexity": 21.0}})
    for label, accuracy in {"before": 0.5, "after": 0.25}.items():
        record(lab, f"eval_held_out_{label}", evaluation(lab, accuracy))
    found = summarise(lab)["forgetting"]
    assert found["before"] == figures | {"in_context": {"accuracy": 0.5, "ci95": [0.4, 0.6]}}
    assert (found["after"]["perplexity"], found["after"]["in_context"]["accuracy"]) == (21.0, 0.25)


def test_judge_failures_of_an_arm_reach_the_report_and_single_questions_do_not(lab):
    arm = summarise(lab)["arms"]["base"]
    assert arm["judge_failures"] == 1
    assert arm.keys().isdisjoint({"answers", "correct"})
