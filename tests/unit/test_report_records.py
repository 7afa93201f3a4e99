"""The report holds what optional stages recorded, and no key for a stage that did not run."""

import pytest

from past_ray.config.experiment import ExperimentConfig
from past_ray.pipelines.data import prepare_tables
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.progress import ProgressDisplay
from past_ray.pipelines.summary import summarise

OPTIONAL = ("scale_choice", "forgetting", "diagnostics", "texts_source", "texts_target")


@pytest.fixture
def lab(tmp_path):
    """A finished run of the smallest kind: the base model alone."""
    lab = Laboratory(
        ExperimentConfig(run_dir=tmp_path, arms=("base",), evaluation={"scales": ()}),
        ProgressDisplay(),
    )
    prepare_tables(lab.config.task, lab.run, num_rounds=1, seed=0)
    record(lab, "eval_base", evaluation(0.25))
    record(lab, "geometry", {})
    record(lab, "rl_source_1", {"metrics": [{"logprob_gap": 1e-6, "sync_seconds": 0.5}]})
    return lab


def record(lab, stage, result):
    lab.run.run(stage, lambda: result)


def evaluation(accuracy):
    questions = lab_questions
    return {
        "accuracy": accuracy,
        "ci95": [accuracy - 0.1, accuracy + 0.1],
        "answer_tokens": 2.0,
        "judge_failures": 1,
        "answers": questions,
        "correct": questions,
    }


class AnyQuestion(dict):
    """An answer to every question."""

    def __missing__(self, key):
        return "?"
