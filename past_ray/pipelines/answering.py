"""The stage that answers questions with what one arm knows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from past_ray.config.judge import RuleJudgeConfig
from past_ray.envs.chat import chat_codec
from past_ray.envs.rollout import completion_seed
from past_ray.pipelines.data import TARGET, Domain, question_kind
from past_ray.pipelines.evaluation import (
    Answer,
    answer_questions,
    judged_answers,
    summarise_answers,
)
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.stages import Stage, StageResult
from past_ray.rl.types import Completion, SamplingParams
from past_ray.runtime.adapter_answers import AdapterRequest
from past_ray.skill import load_skill
from past_ray.skill.arithmetic import inject_skill_vector
from past_ray.skill.checkpoint import load_weights

CORRECT_VERDICT = 0.5
"""Between the scores of a model's two verdicts, 0 and 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What an arm answers with."""

    model: str
    """Weights of the engine."""

    adapters: str | None = None
    """Set of adapters, one per passage; None for the model alone."""


def evaluate(
    lab: Laboratory,
    name: str,
    knowledge: Knowledge,
    *,
    skill: str | None = None,
    scale: float | None = None,
    in_context: bool = False,
    domain: str = TARGET,
) -> Stage:
    """Answers of ``knowledge + scale * v`` to the held-out questions of ``domain``.

    Without a scale, that of the run.
    """

    def work() -> StageResult:
        weights: Mapping[str, Tensor] = load_weights(lab.model(knowledge.model))
        if skill is not None:
            loaded = load_skill(lab.run.skill(skill))
            weights = inject_skill_vector(
                target=weights,
                skill_vector=loaded.vector,
                scale=lab.skill_scale() if scale is None else scale,
                corrections=loaded.corrections,
            )
        tables = lab.domain(domain, texts=None)
        if knowledge.adapters is None:
            answers = _answers_of_model(lab, weights, tables, in_context=in_context)
        else:
            answers = _answers_of_adapters(lab, weights, tables, knowledge.adapters)
        result = summarise_answers(
            tables.examples(),
            answers,
            num_bootstrap=lab.config.evaluation.num_bootstrap,
            kind_of=lambda question_id: question_kind(lab.config.task, question_id),
            passage_of=None if lab.config.task.kind == "world" else tables.resampled_by,
        )
        lab.show_step(1, result)
        return result

    return Stage(name=name, work=work, num_steps=1)


def complete_with_adapters(
    lab: Laboratory,
    weights: Mapping[str, Tensor],
    domain: Domain,
    adapters: str,
    *,
    sampling: SamplingParams,
    num_samples: int = 1,
) -> list[Completion]:
    """Ask each question of its own passage's adapter: ``theta + scale * v`` below, B A on top.

    Args:
        lab: Its adapters' engines answer.
        weights: Below all adapters.
        domain: Whose questions are asked.
        adapters: Set of adapters.
        sampling: Of every answer; its seed is replaced.
        num_samples: Answers per question; those of one question follow each other.
    """
    examples, passage_of = domain.examples(), domain.passage_of
    requests = [
        AdapterRequest(
            request_id=f"{example.question_id}/{index}",
            prompt_ids=prompt,
            adapter=(lab.run.adapters(adapters) / passage_of[example.question_id]).resolve(),
        )
        for example, prompt in zip(examples, lab.prompt_ids(examples), strict=True)
        for index in range(num_samples)
    ]
    seeded = [
        replace(sampling, seed=completion_seed(lab.config.seed, request.request_id, 0))
        for request in requests
    ]
    answers = lab.answers()
    answers.load_base(weights, lab.next_version())
    return answers.answer(requests, seeded, _ignore)


def _answers_of_model(
    lab: Laboratory, weights: Mapping[str, Tensor], domain: Domain, *, in_context: bool
) -> list[Answer]:
    session = lab.session()
    judge = lab.config.judged_by

    async def answer() -> list[Answer]:
        await session.load_generators(weights, policy_version=lab.next_version())
        return await answer_questions(
            session,
            domain.examples(in_context=in_context),
            sampling=_greedy(lab),
            correct_at=judge.correct_at if isinstance(judge, RuleJudgeConfig) else CORRECT_VERDICT,
            grading_timeout_s=lab.config.rl.reward_timeout_s,
        )

    return lab.run_async(answer())


def _answers_of_adapters(
    lab: Laboratory, weights: Mapping[str, Tensor], domain: Domain, adapters: str
) -> list[Answer]:
    completions = complete_with_adapters(lab, weights, domain, adapters, sampling=_greedy(lab))
    decode = chat_codec(lab.tokenizer()).decode
    return judged_answers(domain.examples(), completions, decode=decode, judge=lab.judge())


def _greedy(lab: Laboratory) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=lab.config.evaluation.max_new_tokens)


def _ignore(*_: Any) -> None:  # noqa: ANN401
    pass
