"""A run beside the paper's numbers: the same rows, and what was measured otherwise."""

from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

from past_ray.config.experiment import ExperimentConfig
from past_ray.config.judge import EndpointJudgeConfig, ModelJudgeConfig, RuleJudgeConfig
from past_ray.config.model import CheckpointModelConfig, HubModelConfig, WheelModelConfig
from past_ray.pipelines.evaluation import BOOTSTRAP_SEED
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.paper_table import arm_figures, differences_from_paper, paper_table
from past_ray.pipelines.stages import StageResult
from past_ray.tasks.published import METHODS, Regime, Setup

MAX_PASSAGES_OF_N200 = 200
"""Targets up to this size stand beside the paper's n=200, larger ones beside n=2067."""


def compare_with_paper(
    lab: Laboratory, evaluations: Mapping[str, StageResult]
) -> dict[str, Any] | None:
    """Return title, rows, footnotes and differences; None for a task that the paper lacks."""
    config, target = lab.config, lab.domain("target", texts=None)
    regime = _regime(config, num_passages=len(target.documents))
    if regime is None:
        return None
    arms = {arm: result for arm, result in evaluations.items() if arm in METHODS}
    figures = arm_figures(
        {arm: result["correct"] for arm, result in arms.items()},
        mean_words={
            arm: fmean(len(answer.split()) for answer in result["answers"].values())
            for arm, result in arms.items()
        },
        num_bootstrap=config.evaluation.num_bootstrap,
        seed=BOOTSTRAP_SEED,
        passage_of=target.resampled_by,
    )
    ours = Setup(
        model=_model_name(config),
        judge=_judge_name(config),
        num_passages=len(target.documents),
        num_questions=len(target.questions),
        source_size=len(lab.domain("source_1", texts=None).documents),
    )
    differences = differences_from_paper(ours, regime=regime)
    table = paper_table(figures, regime=regime, differences=differences)
    return {
        "title": table.title,
        "rows": [asdict(row) for row in table.rows],
        "footnotes": list(table.footnotes),
        "differences": differences,
        "text": table.text,
    }


def _regime(config: ExperimentConfig, *, num_passages: int) -> Regime | None:
    if config.task.kind == "loogle":
        return "loogle"
    if config.task.kind != "squad":
        return None
    if config.single_passage is not None:
        return "single_passage"
    return "cpt_200" if num_passages <= MAX_PASSAGES_OF_N200 else "cpt_2067"


def _model_name(config: ExperimentConfig) -> str:
    match config.model:
        case CheckpointModelConfig():
            return config.model.path.name
        case HubModelConfig():
            return config.model.name
        case WheelModelConfig():
            return config.model.filename.partition(".")[0]
        case _:
            return "a scratch model"


def _judge_name(config: ExperimentConfig) -> str:
    judge = config.judged_by
    match judge:
        case RuleJudgeConfig():
            cap = f" over the first {judge.max_words} words" if judge.max_words else ""
            return f"{judge.rule} from {judge.correct_at:g}{cap}"
        case ModelJudgeConfig():
            return judge.path.name
        case EndpointJudgeConfig():
            return judge.model
