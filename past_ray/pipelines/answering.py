"""The stage that answers the held-out questions with one arm's weights."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from past_ray.pipelines.data import question_kind
from past_ray.pipelines.evaluation import answer_questions
from past_ray.pipelines.laboratory import Laboratory
from past_ray.pipelines.stages import Stage, StageResult
from past_ray.skill import load_skill
from past_ray.skill.arithmetic import inject_skill_vector
from past_ray.skill.checkpoint import load_weights
from past_ray.tasks.examples import QAExample


def evaluate(
    lab: Laboratory,
    name: str,
    *,
    model: str,
    skill: str | None = None,
    scale: float = 0.0,
    in_context: bool = False,
) -> Stage:
    """Answers of ``model + scale * v`` to the held-out questions."""

    def work() -> StageResult:
        weights = load_weights(lab.model(model))
        if skill is not None:
            loaded = load_skill(lab.run.skill(skill))
            weights = inject_skill_vector(
                target=weights,
                skill_vector=loaded.vector,
                scale=scale,
                corrections=loaded.corrections,
            )
        examples = lab.domain("target").examples(in_context=in_context)
        result = lab.run_async(_evaluate(lab, weights, examples))
        lab.show_step(1, result)
        return result

    return Stage(name=name, work=work, num_steps=1)


async def _evaluate(
    lab: Laboratory, weights: Mapping[str, Tensor], examples: Sequence[QAExample]
) -> StageResult:
    session = lab.session()
    await session.load_generators(weights, policy_version=lab.next_version())
    config = lab.config.evaluation
    return await answer_questions(
        session,
        examples,
        max_new_tokens=config.max_new_tokens,
        correct_at=config.correct_at,
        grading_timeout_s=lab.config.rl.reward_timeout_s,
        num_bootstrap=config.num_bootstrap,
        kind_of=lambda question_id: question_kind(lab.config.task, question_id),
    )
