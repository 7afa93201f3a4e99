"""The stages that need no label of the target: the scale of v, and what injection forgets."""

from collections.abc import Mapping
from dataclasses import asdict

from past_ray.engine.perplexity import TokenNLL
from past_ray.pipelines.data import HELD_OUT, VALIDATION
from past_ray.pipelines.evaluation import BOOTSTRAP_SEED
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.stages import SCALE_CHOICE, Stage, StageResult
from past_ray.runtime.perplexity_task import token_nll_of_models
from past_ray.tasks.statistics import ScaleResult, choose_scale

MAX_WINDOW = 1024
"""Tokens that a model reads at once when perplexity is measured; later ones start anew."""

TOKENS_AT_ONCE = 2048
"""Padded tokens of one forward pass."""


def validation_stage(scale: float) -> str:
    """Name of the evaluation on the validation domain at one scale."""
    return f"eval_validation_{scale:g}"


def choose_skill_scale(lab: Laboratory) -> Stage:
    """The scale for all targets, from the evaluations on the validation domain."""

    def work() -> StageResult:
        results = [
            ScaleResult(scale=scale, correct=lab.result(validation_stage(scale))["correct"])
            for scale in lab.config.evaluation.scales
        ]
        choice = choose_scale(
            results,
            num_samples=lab.config.evaluation.num_bootstrap,
            seed=BOOTSTRAP_SEED,
            passage_of=lab.domain(VALIDATION, texts=None).resampled_by,
        )
        return asdict(choice)

    return Stage(name=SCALE_CHOICE, work=work)


def measure_forgetting(lab: Laboratory, *, models: dict[str, str]) -> Stage:
    """Perplexity and next-token accuracy of each model on text that no domain of the run has."""

    def work() -> StageResult:
        figures = score_documents(lab, models, domain=HELD_OUT, max_length=MAX_WINDOW)
        return {
            label: {
                "perplexity": figure.perplexity,
                "next_token_accuracy": figure.accuracy,
                "tokens_read": figure.num_read,
                "tokens_scored": figure.num_scored,
            }
            for label, figure in figures.items()
        }

    return Stage(name="forgetting", work=work)


def score_documents(
    lab: Laboratory, models: Mapping[str, str], *, domain: str, max_length: int
) -> dict[str, TokenNLL]:
    """How well each model predicts the documents of ``domain``; all engines end before."""
    lab.close_engines()
    runtime = lab.config.runtime
    return token_nll_of_models(
        {label: lab.model(name) for label, name in models.items()},
        lab.domain(domain, texts=None).documents["text"].to_pylist(),
        max_length=max_length,
        batch_tokens=TOKENS_AT_ONCE,
        resources={"CPU": runtime.cpus_per_sft_worker, "GPU": float(runtime.use_gpu)},
    )
