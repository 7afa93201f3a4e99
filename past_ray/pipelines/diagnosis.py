"""The stage that looks for a model which injection broke, with no label of the target."""

import logging
from collections.abc import Mapping
from dataclasses import asdict

from past_ray.envs.chat import chat_codec
from past_ray.pipelines.answering import Knowledge, complete_with_adapters
from past_ray.pipelines.data import TARGET, Domain
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.selection import MAX_WINDOW, score_documents
from past_ray.pipelines.stages import Stage, StageResult
from past_ray.rl.types import RolloutGroup, SamplingParams
from past_ray.runtime.rollout_worker import GroupTask, RolloutPlan
from past_ray.skill.checkpoint import load_weights
from past_ray.tasks.diagnostics import diagnose, diagnostic_figures

DIAGNOSTICS = "diagnostics"
"""Name of the stage."""

NO_PERPLEXITY = "not measured: every passage has an adapter of its own, there is no single model"

logger = logging.getLogger(__name__)

Samples = dict[str, list[str]]
"""Sampled answers by question id."""


def diagnose_target(lab: Laboratory, *, before: Knowledge, after: Knowledge) -> Stage:
    """Warnings if ``after``, the injected model, degenerates against ``before``, the model alone.

    Both sample the same number of answers to every target question with the same seeds; both read
    the target's documents.
    """

    def work() -> StageResult:
        samples = {"before": _samples(lab, before), "after": _samples(lab, after)}
        questions = [question for question in samples["before"] if question in samples["after"]]
        perplexities = _perplexities(lab, {"before": before, "after": after})
        figures = {
            label: diagnostic_figures(
                [of_model[question] for question in questions], perplexity=perplexities.get(label)
            )
            for label, of_model in samples.items()
        }
        warnings = diagnose(before=figures["before"], after=figures["after"])
        for warning in warnings:
            logger.warning("the injected model may be broken: %s", warning.message)
        return {
            **{label: asdict(figure) for label, figure in figures.items()},
            "warnings": [asdict(warning) for warning in warnings],
            "num_questions": len(questions),
            "num_samples": lab.config.evaluation.num_diagnostic_samples,
            **({} if perplexities else {"perplexity_note": NO_PERPLEXITY}),
        }

    return Stage(name=DIAGNOSTICS, work=work)


def finished_samples(groups: list[RolloutGroup]) -> Samples:
    """Answers of the questions for which no generation failed: a lost one is not an empty one."""
    return {
        group.question_id: [rollout.answer for rollout in group.rollouts]
        for group in groups
        if all(rollout.turns for rollout in group.rollouts)
    }


def _samples(lab: Laboratory, knowledge: Knowledge) -> Samples:
    evaluation = lab.config.evaluation
    sampling = SamplingParams(temperature=1.0, max_new_tokens=evaluation.max_new_tokens)
    domain = lab.domain(TARGET, texts=None)
    if knowledge.adapters is None:
        return finished_samples(_groups(lab, knowledge.model, domain, sampling))
    num_samples = evaluation.num_diagnostic_samples
    completions = complete_with_adapters(
        lab,
        load_weights(lab.model(knowledge.model)),
        domain,
        knowledge.adapters,
        sampling=sampling,
        num_samples=num_samples,
    )
    decode = chat_codec(lab.tokenizer()).decode
    texts = [decode(completion.token_ids) for completion in completions]
    return {
        example.question_id: texts[index * num_samples : (index + 1) * num_samples]
        for index, example in enumerate(domain.examples())
    }


def _groups(
    lab: Laboratory, model: str, domain: Domain, sampling: SamplingParams
) -> list[RolloutGroup]:
    """Sample from the generators; that the environments judge too does not matter here."""
    session = lab.session()

    async def collect() -> list[RolloutGroup]:
        weights = load_weights(lab.model(model))
        await session.load_generators(weights, policy_version=lab.next_version())
        return await session.collect(
            [
                GroupTask(group_id=f"{DIAGNOSTICS}/{example.question_id}", example=example)
                for example in domain.examples()
            ],
            RolloutPlan(
                group_size=lab.config.evaluation.num_diagnostic_samples,
                sampling=sampling,
                seed=lab.config.seed,
                env_timeout_s=lab.config.rl.reward_timeout_s,
            ),
        )

    return lab.run_async(collect())


def _perplexities(lab: Laboratory, models: Mapping[str, Knowledge]) -> dict[str, float]:
    """Of the target's documents, by label; empty for adapters."""
    if any(knowledge.adapters is not None for knowledge in models.values()):
        logger.info("perplexity of the target's documents: %s", NO_PERPLEXITY)
        return {}
    names = {label: knowledge.model for label, knowledge in models.items()}
    # The generator's limit lies within the model's context, which a small model has little of.
    max_length = min(MAX_WINDOW, lab.config.runtime.generator.max_model_len)
    scored = score_documents(lab, names, domain=TARGET, max_length=max_length)
    return {label: figure.perplexity for label, figure in scored.items()}
