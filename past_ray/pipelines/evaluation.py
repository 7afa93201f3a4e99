"""Answers to held-out questions, judged and summarised: the same for every arm."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from past_ray.errors import DataError
from past_ray.rl.types import Completion, Rollout, SamplingParams
from past_ray.runtime.rollout_worker import GroupTask, RolloutPlan
from past_ray.runtime.session import RLSession
from past_ray.tasks.examples import QAExample
from past_ray.tasks.judging import Judge, JudgeFailure, JudgeItem, JudgeOutcome, Verdict
from past_ray.tasks.statistics import bootstrap_ci

BOOTSTRAP_SEED = 0
"""Intervals must not differ between two evaluations of the same answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer and what the judge says of it."""

    text: str
    """Empty when generation failed."""

    num_tokens: int
    """Sampled tokens."""

    is_truncated: bool
    """Whether it reached the token cap."""

    has_failed: bool
    """Whether nothing was generated; counts as wrong."""

    outcome: JudgeOutcome
    """A failure of the judge leaves the question out of the accuracy."""


async def answer_questions(
    session: RLSession,
    examples: Sequence[QAExample],
    *,
    sampling: SamplingParams,
    correct_at: float,
    grading_timeout_s: float,
) -> list[Answer]:
    """Answer ``examples`` with the weights the generators hold; the environments judge.

    Args:
        session: Open actors whose generators have the weights to evaluate.
        examples: Held-out questions.
        sampling: Temperature and token cap of every answer.
        correct_at: An answer is correct when its score reaches this.
        grading_timeout_s: Longest wait for one grade.
    """
    groups = await session.collect(
        [GroupTask(group_id=f"0/{e.question_id}", example=e) for e in examples],
        RolloutPlan(group_size=1, sampling=sampling, seed=0, env_timeout_s=grading_timeout_s),
    )
    return [_answer_of(group.rollouts[0], correct_at) for group in groups]


def judged_answers(
    examples: Sequence[QAExample],
    completions: Sequence[Completion],
    *,
    decode: Callable[[list[int]], str],
    judge: Judge,
) -> list[Answer]:
    """Decode and judge one completion per example."""
    texts = [decode(completion.token_ids) for completion in completions]
    outcomes = judge.judge(
        [
            JudgeItem(question=example.question, gold=example.answer, answer=text)
            for example, text in zip(examples, texts, strict=True)
        ]
    )
    return [
        Answer(
            text=text,
            num_tokens=len(completion.token_ids),
            is_truncated=completion.finish_reason == "length",
            has_failed=False,
            outcome=outcome,
        )
        for text, completion, outcome in zip(texts, completions, outcomes, strict=True)
    ]


def summarise_answers(
    examples: Sequence[QAExample],
    answers: Sequence[Answer],
    *,
    num_bootstrap: int,
    kind_of: Callable[[str], str],
    passage_of: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what the report says of one arm.

    Args:
        examples: The questions.
        answers: One per question.
        num_bootstrap: Resamples behind the confidence interval.
        kind_of: Names the kind of a question by its id.
        passage_of: Passage by question id; the interval then resamples whole passages.

    Returns:
        accuracy and its 95 % interval, mean score, answer length in tokens, shares that were cut
        off by the cap or failed, the judge's failures, accuracy by kind, and by question id the
        answers and whether they are correct. Questions that the judge failed on are left out of
        all shares of correct answers.

    Raises:
        DataError: The judge failed on every answer.
    """
    verdicts = {
        example.question_id: answer.outcome
        for example, answer in zip(examples, answers, strict=True)
        if isinstance(answer.outcome, Verdict)
    }
    failures = [a.outcome.error for a in answers if isinstance(a.outcome, JudgeFailure)]
    if not verdicts:
        raise DataError(
            f"the judge must decide on some answer, it failed on all {len(failures)}; "
            f"first: {failures[0]}"
        )
    correct = {question: float(verdict.is_correct) for question, verdict in verdicts.items()}
    by_kind: dict[str, list[float]] = defaultdict(list)
    for question, value in correct.items():
        by_kind[kind_of(question)].append(value)
    passages = None if passage_of is None else [passage_of[question] for question in correct]
    low, high = bootstrap_ci(
        list(correct.values()), num_samples=num_bootstrap, seed=BOOTSTRAP_SEED, passage_ids=passages
    )
    return {
        "accuracy": fmean(correct.values()),
        "ci95": [low, high],
        "mean_grade": fmean(verdict.score for verdict in verdicts.values()),
        "num_questions": len(examples),
        "answer_tokens": fmean(answer.num_tokens for answer in answers),
        "truncated_frac": fmean(answer.is_truncated for answer in answers),
        "failed_frac": fmean(answer.has_failed for answer in answers),
        "judge_failures": len(failures),
        "accuracy_by_kind": {kind: fmean(values) for kind, values in sorted(by_kind.items())},
        "correct": correct,
        "answers": {
            example.question_id: answer.text
            for example, answer in zip(examples, answers, strict=True)
        },
    }


def _answer_of(rollout: Rollout, correct_at: float) -> Answer:
    score = rollout.reward or 0.0
    outcome: JudgeOutcome = (
        JudgeFailure(error=rollout.error)
        if rollout.status == "grading_error"
        else Verdict(score=score, is_correct=score >= correct_at)
    )
    return Answer(
        text=rollout.answer,
        num_tokens=sum(len(turn.completion.token_ids) for turn in rollout.turns),
        is_truncated=bool(rollout.turns) and rollout.turns[-1].completion.finish_reason == "length",
        has_failed=not rollout.turns,
        outcome=outcome,
    )
