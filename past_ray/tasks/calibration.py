"""How well a judge agrees with verdicts that somebody else gave.

``correct`` is the positive class; the reference is the graded file::

                          reference: correct   reference: wrong
    judge: correct        true positive        false positive
    judge: wrong          false negative       true negative
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from past_ray.errors import DataError
from past_ray.tasks.judging import JudgeFailure, JudgeItem, JudgeOutcome

SWEEP_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.67, 0.7, 0.8, 0.9, 1.0)
"""Scores from which on an answer is taken as correct, to see what another threshold would do."""


@dataclass(frozen=True, slots=True)
class GradedAnswer:
    """An answer and the reference's verdict."""

    item: JudgeItem
    """Question, gold answer and answer."""

    is_correct: bool
    """The reference's verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistinctAnswers:
    """Graded answers, each (question, gold, answer) once."""

    graded: list[GradedAnswer]
    """In the order of their first occurrence."""

    num_repeats: int
    """Further occurrences with the same verdict, left out."""

    num_contradictions: int
    """Items that the reference called both correct and wrong, left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Counts of the table above, and what follows from them; None where it is undefined."""

    num_true_positives: int
    """Both say correct."""

    num_false_positives: int
    """Only the judge says correct."""

    num_false_negatives: int
    """Only the reference says correct."""

    num_true_negatives: int
    """Both say wrong."""

    @property
    def num_answers(self) -> int:
        """Answers compared."""
        positives = self.num_true_positives + self.num_false_positives
        return positives + self.num_false_negatives + self.num_true_negatives

    @property
    def agreement(self) -> float | None:
        """Share of equal verdicts."""
        return _ratio(self.num_true_positives + self.num_true_negatives, self.num_answers)

    @property
    def precision(self) -> float | None:
        """Share of the judge's correct answers that the reference calls correct."""
        return _ratio(self.num_true_positives, self.num_true_positives + self.num_false_positives)

    @property
    def recall(self) -> float | None:
        """Share of the reference's correct answers that the judge finds."""
        return _ratio(self.num_true_positives, self.num_true_positives + self.num_false_negatives)

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa: ``(agreement - chance) / (1 - chance)``.

        ``chance`` is the agreement of two judges who say correct as often as these two, blindly.
        """
        judge = self.num_true_positives + self.num_false_positives
        reference = self.num_true_positives + self.num_false_negatives
        total = self.num_answers
        by_chance = judge * reference + (total - judge) * (total - reference)
        equal = self.num_true_positives + self.num_true_negatives
        return _ratio(equal * total - by_chance, total * total - by_chance)


def read_graded_answers(path: Path) -> list[GradedAnswer]:
    """Read a result file of SEAL: two answers per question, each with a verdict.

    Layout: ``{articles: [{completions: [{questions: [{question, answer, baseline_answer,
    baseline_correct, adapter_answer, adapter_correct}]}]}]}``.

    Raises:
        DataError: No such file, or another layout.
    """
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["articles"]
        return [
            _graded_answer(entry, arm)
            for article in articles
            for completion in article["completions"]
            for entry in completion["questions"]
            for arm in ("baseline", "adapter")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} must be a JSON file of graded answers (articles, completions, questions), got "
            f"{type(error).__name__}: {error}. Give a result file in the layout of SEAL's."
        ) from error


def distinct_answers(graded: Sequence[GradedAnswer]) -> DistinctAnswers:
    """Count each (question, gold, answer) once; drop those with contradicting verdicts."""
    verdicts: dict[JudgeItem, set[bool]] = {}
    for entry in graded:
        verdicts.setdefault(entry.item, set()).add(entry.is_correct)
    kept = [
        GradedAnswer(item, is_correct=True in found)
        for item, found in verdicts.items()
        if len(found) == 1
    ]
    num_contradictions = len(verdicts) - len(kept)
    num_repeats = len(graded) - sum(len(found) for found in verdicts.values())
    return DistinctAnswers(
        graded=kept, num_repeats=num_repeats, num_contradictions=num_contradictions
    )


def measure_agreement(
    outcomes: Sequence[JudgeOutcome],
    reference: Sequence[GradedAnswer],
    *,
    correct_at: float | None = None,
) -> Agreement:
    """Compare a judge with the reference; failures are left out.

    Args:
        outcomes: One per entry of ``reference``.
        reference: Verdicts taken for the truth.
        correct_at: Take scores from here on as correct, instead of the judge's own decision.
    """
    counts = {(said, truth): 0 for said in (True, False) for truth in (True, False)}
    for outcome, entry in zip(outcomes, reference, strict=True):
        if isinstance(outcome, JudgeFailure):
            continue
        said = outcome.is_correct if correct_at is None else outcome.score >= correct_at
        counts[said, entry.is_correct] += 1
    return Agreement(
        num_true_positives=counts[True, True],
        num_false_positives=counts[True, False],
        num_false_negatives=counts[False, True],
        num_true_negatives=counts[False, False],
    )


def _graded_answer(entry: dict[str, object], arm: str) -> GradedAnswer:
    texts = [entry["question"], entry["answer"], entry[f"{arm}_answer"]]
    is_correct = entry[f"{arm}_correct"]
    if not isinstance(is_correct, bool) or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"verdicts must be true or false and texts be strings, found {entry!r:.200}"
        )
    question, gold, answer = map(str, texts)
    return GradedAnswer(JudgeItem(question=question, gold=gold, answer=answer), is_correct)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
