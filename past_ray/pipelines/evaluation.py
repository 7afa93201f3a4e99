"""Greedy answers to held-out questions, graded and summarised: the same for every arm."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from past_ray.errors import DataError
from past_ray.rl.types import Rollout, SamplingParams
from past_ray.runtime.rollout_worker import GroupTask, RolloutPlan
from past_ray.runtime.session import RLSession
from past_ray.tasks.examples import QAExample
from past_ray.tasks.statistics import bootstrap_ci

BOOTSTRAP_SEED = 0
"""Intervals must not differ between two evaluations of the same answers."""


async def answer_questions(
    session: RLSession,
    examples: Sequence[QAExample],
    *,
    max_new_tokens: int,
    correct_at: float,
    grading_timeout_s: float,
    num_bootstrap: int,
    kind_of: Callable[[str], str],
) -> dict[str, Any]:
    """Answer ``examples`` greedily with the weights the generators hold.

    Args:
        session: Open actors whose generators have the weights to evaluate.
        examples: Held-out questions.
        max_new_tokens: Token cap of an answer.
        correct_at: An answer is correct when its grade reaches this.
        grading_timeout_s: Longest wait for one grade.
        num_bootstrap: Resamples behind the confidence interval.
        kind_of: Names the kind of a question by its id.

    Returns:
        accuracy and its 95 % interval, mean grade, answer length in tokens, shares that were cut
        off by the cap or failed, accuracy by kind, and the answers by question id. An answer that
        failed to generate counts as wrong; a grader that fails raises.
    """
    groups = await session.collect(
        [GroupTask(group_id=f"0/{e.question_id}", example=e) for e in examples],
        RolloutPlan(
            group_size=1,
            sampling=SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens),
            seed=0,
            env_timeout_s=grading_timeout_s,
        ),
    )
    rollouts = [group.rollouts[0] for group in groups]
    broken = [rollout for rollout in rollouts if rollout.status == "grading_error"]
    if broken:
        raise DataError(f"the grader failed on {len(broken)} answers; first: {broken[0].error}")
    grades = [rollout.reward or 0.0 for rollout in rollouts]
    correct = [float(grade >= correct_at) for grade in grades]
    by_kind: dict[str, list[float]] = defaultdict(list)
    for example, value in zip(examples, correct, strict=True):
        by_kind[kind_of(example.question_id)].append(value)
    low, high = bootstrap_ci(correct, num_samples=num_bootstrap, seed=BOOTSTRAP_SEED)
    return {
        "accuracy": fmean(correct),
        "ci95": [low, high],
        "mean_grade": fmean(grades),
        "num_questions": len(examples),
        "answer_tokens": fmean(_num_tokens(rollout) for rollout in rollouts),
        "truncated_frac": fmean(_is_truncated(rollout) for rollout in rollouts),
        "failed_frac": fmean(not rollout.turns for rollout in rollouts),
        "accuracy_by_kind": {kind: fmean(values) for kind, values in sorted(by_kind.items())},
        "answers": {
            example.question_id: rollout.answer
            for example, rollout in zip(examples, rollouts, strict=True)
        },
    }


def _num_tokens(rollout: Rollout) -> int:
    return sum(len(turn.completion.token_ids) for turn in rollout.turns)


def _is_truncated(rollout: Rollout) -> bool:
    return bool(rollout.turns) and rollout.turns[-1].completion.finish_reason == "length"
