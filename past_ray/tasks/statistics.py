"""Uncertainty of a mean over questions, of a difference between two arms, and of a best scale.

Questions of one passage share what was learned from it, so they are right or wrong together. Where
passages are known, whole passages are resampled: taken for independent, their questions would make
an interval too narrow.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from past_ray.errors import DataError

MAX_DRAWS_AT_ONCE = 4_000_000
"""Draws held in memory together: 32 MB of indices."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """How much better one arm is than another on the same questions."""

    difference: float
    """Mean of the arm minus mean of the baseline."""

    ci95: tuple[float, float]
    """95 % bootstrap interval of the difference."""

    p_value: float
    """Two-sided; below 0.05 where the interval leaves out 0, up to the resamples' noise."""

    num_questions: int
    """Questions behind the difference."""

    num_resampled: int
    """Passages that were resampled, or questions where passages are not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleResult:
    """Answers on the validation domain with one scale of the skill vector."""

    scale: float
    """Factor on the skill vector; 0 is the model without it."""

    correct: Mapping[str, float]
    """1 or 0 by question id, or the mean over several answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleChoice:
    """The scale to use on target domains."""

    scale: float
    """What to use."""

    accuracy: float
    """Its accuracy on the validation domain."""

    best_scale: float
    """The scale with the highest accuracy there."""

    reason: str
    """Why this one, in a sentence for the report."""


def bootstrap_ci(
    values: Sequence[float],
    *,
    num_samples: int,
    seed: int,
    level: float = 0.95,
    passage_ids: Sequence[str] | None = None,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean.

    Args:
        values: One per question, e.g. 0 or 1; at least one.
        num_samples: Resamples, each of as many questions (or passages) as there are.
        seed: The same seed and values give the same interval, whatever ran before.
        level: Share of the resampled means inside the interval.
        passage_ids: The passage of each question; whole passages are then resampled.

    Raises:
        DataError: ``values`` is empty, or all questions are about one passage.

    Reference:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3. Clusters:
        Field and Welsh, https://doi.org/10.1111/j.1467-9868.2007.00593.x
    """
    sums, counts = _resampled_units(values, passage_ids)
    means = _resampled_means(sums, counts, num_samples=num_samples, seed=seed)
    return _percentile_interval(means, level)


def paired_bootstrap(
    correct: Mapping[str, float],
    *,
    baseline: Mapping[str, float],
    num_samples: int,
    seed: int,
    passage_of: Mapping[str, str] | None = None,
) -> PairedDifference:
    """Return the difference of two arms that answered the same questions.

    A resample takes a question with both of its answers, so that what makes it hard for both arms
    cancels. ``p = 2 min(share of resampled differences <= 0, share >= 0)``, at most 1, the observed
    difference counted among the resamples so that p is never 0.

    Args:
        correct: 1 or 0 by question id, or the mean over several answers.
        baseline: The same for the arm to compare with.
        num_samples: Resamples.
        seed: The same seed and answers give the same result, in whatever order they come.
        passage_of: Passage id by question id; whole passages are then resampled.

    Raises:
        DataError: The questions differ, there are none, one lacks its passage, or all are about
            one passage.

    Reference:
        Koehn, https://aclanthology.org/W04-3250 (paired bootstrap); the p-value inverts the
        percentile interval: Efron and Tibshirani (1993), section 15.4.
    """
    question_ids = _common_questions(correct, baseline)
    differences = [correct[key] - baseline[key] for key in question_ids]
    passage_ids = None if passage_of is None else passage_ids_of(question_ids, passage_of)
    sums, counts = _resampled_units(differences, passage_ids)
    resampled = _resampled_means(sums, counts, num_samples=num_samples, seed=seed)
    not_above = (1 + np.count_nonzero(resampled <= 0)) / (1 + num_samples)
    not_below = (1 + np.count_nonzero(resampled >= 0)) / (1 + num_samples)
    return PairedDifference(
        difference=fmean(differences),
        ci95=_percentile_interval(resampled, 0.95),
        p_value=float(min(1.0, 2 * min(not_above, not_below))),
        num_questions=len(question_ids),
        num_resampled=len(sums),
    )


def choose_scale(
    results: Sequence[ScaleResult],
    *,
    num_samples: int,
    seed: int,
    passage_of: Mapping[str, str] | None = None,
) -> ScaleChoice:
    """Return the smallest scale that the validation questions cannot tell from the best one.

    A smaller scale changes the target model less, so it wins ties, and also where the 95 % interval
    of its paired difference from the best scale holds 0. It may be 0, which says that these
    questions show no use of the skill vector.

    Args:
        results: Answers to the same questions of a validation source domain, at each scale; never
            of a target, whose labels must not be used.
        num_samples: Resamples of each comparison.
        seed: Seed of the resamples.
        passage_of: Passage id by question id; whole passages are then resampled.

    Raises:
        DataError: There are no results, a scale occurs twice, or the questions differ.

    Differs from the paper:
        It uses scale 1 everywhere and names the choice as open (Limitations).
    """
    ordered = sorted(results, key=lambda result: abs(result.scale))
    scales = [result.scale for result in ordered]
    if not scales or len(set(scales)) < len(scales):
        raise DataError(
            f"scales to choose from must be at least one and all different, found {scales}. Give"
            " one result per scale."
        )
    best = max(ordered, key=_accuracy)
    leads = [
        paired_bootstrap(
            best.correct,
            baseline=result.correct,
            num_samples=num_samples,
            seed=seed,
            passage_of=passage_of,
        )
        for result in ordered
    ]
    # The best scale leads itself by 0, so one is always found.
    chosen, lead = next(
        (result, lead) for result, lead in zip(ordered, leads, strict=True) if lead.ci95[0] <= 0
    )
    return ScaleChoice(
        scale=chosen.scale,
        accuracy=_accuracy(chosen),
        best_scale=best.scale,
        reason=_reason(chosen, best, lead),
    )


def passage_ids_of(question_ids: Iterable[str], passage_of: Mapping[str, str]) -> list[str]:
    """Return the passage of each question.

    Raises:
        DataError: A question has none.
    """
    question_ids = list(question_ids)
    if missing := [key for key in question_ids if key not in passage_of]:
        raise DataError(
            f"every question must have a passage, {len(missing)} have none (first: {missing[:3]})."
            " Leave the passages out to resample questions."
        )
    return [passage_of[key] for key in question_ids]


def _accuracy(result: ScaleResult) -> float:
    return fmean(result.correct.values()) if result.correct else 0.0


def _reason(chosen: ScaleResult, best: ScaleResult, lead: PairedDifference) -> str:
    figure = f"scale {best.scale:g} has the best validation accuracy ({_accuracy(best):.1%})"
    if chosen is best:
        return (
            f"{figure}, and no smaller scale is within the noise of {lead.num_questions} questions"
        )
    low, high = lead.ci95
    return (
        f"{figure}, but its lead over scale {chosen.scale:g} ({_accuracy(chosen):.1%}) has a 95 %"
        f" interval of {100 * low:+.1f} to {100 * high:+.1f} points, so the smaller scale is used"
    )


def _common_questions(correct: Mapping[str, float], baseline: Mapping[str, float]) -> list[str]:
    if different := sorted(correct.keys() ^ baseline.keys()):
        raise DataError(
            f"two arms must have answered the same questions, {len(different)} are in one only"
            f" (first: {different[:3]}). Evaluate both on one table."
        )
    return sorted(correct)


def _resampled_units(
    values: Sequence[float], passage_ids: Sequence[str] | None
) -> tuple[FloatArray, FloatArray]:
    """Return sum of values and number of questions of each passage, or of each question."""
    if not values:
        raise DataError("a confidence interval needs at least one value, found none.")
    observed = np.asarray(values, dtype=np.float64)
    if passage_ids is None:
        return observed, np.ones_like(observed)
    passages, index = np.unique(np.asarray(passage_ids), return_inverse=True)
    if len(index) != len(observed) or len(passages) < 2:
        raise DataError(
            f"resampling passages needs a passage for each of {len(observed)} questions and at"
            f" least two passages, found {len(index)} ids of {len(passages)} passages. Leave the"
            " passages out to resample questions."
        )
    sums = np.bincount(index, weights=observed)
    return sums.astype(np.float64), np.bincount(index).astype(np.float64)


def _resampled_means(
    sums: FloatArray, counts: FloatArray, *, num_samples: int, seed: int
) -> FloatArray:
    """Return ``sum of sums / sum of counts`` over as many units as there are, drawn anew."""
    rng = np.random.default_rng(seed)
    means: list[FloatArray] = []
    for num_rows in _block_sizes(num_samples, max(1, MAX_DRAWS_AT_ONCE // len(sums))):
        drawn = rng.integers(len(sums), size=(num_rows, len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)


def _percentile_interval(resampled: FloatArray, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _block_sizes(total: int, block: int) -> list[int]:
    """Split ``total`` into blocks of at most ``block``."""
    return [min(block, total - start) for start in range(0, total, block)]
