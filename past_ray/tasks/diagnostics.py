"""Signs that a skill vector broke the target model, from its answers alone: no gold answer is used.

The target domain has no labels, so whether injection went wrong must show without them. Each sign
is compared with the same model before injection, on the same questions and documents.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from past_ray.errors import DataError
from past_ray.tasks.grading import normalized_tokens

NGRAM = 4
"""Words of the n-grams that must not repeat: ordinary prose hardly repeats four in a row."""

MAX_EMPTY_RISE = 0.05
"""An asked model nearly always says something; one empty answer in twenty more is not chance."""

MAX_LENGTH_RATIO = 4.0
"""RL may teach longer or shorter answers, so a factor of 2 or 3 is style; more is rambling."""

MAX_REPETITION_RISE = 0.10
"""Answers of a few sentences repeat almost nothing; a loop pushes its own answer near 1."""

MAX_PERPLEXITY_RATIO = 1.4
"""About what separates two sizes of one model: GPT-2 small and medium on WikiText-103."""

MAX_CONSISTENCY_DROP = 0.2
"""Twice the standard deviation of the mean over 25 questions whose agreement is 0 or 1."""

ADVICE = "Inject with a smaller scale, or keep the model without the skill vector."

Finding = tuple[str, bool, str]
"""Sign, whether all is fine, and what was expected and found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosticFigures:
    """What can be measured on a target without labels."""

    empty_frac: float
    """Share of answers without a word."""

    mean_words: float
    """Words of an answer, empty ones included."""

    repetition_frac: float
    """Mean over answers of ``repetition``."""

    self_consistency: float | None
    """``self_consistency`` of the sampled answers; None where a question has one answer."""

    perplexity: float | None = None
    """Of the target's documents; None if it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosticWarning:
    """One sign that the injected model degenerates."""

    sign: str
    """The field of ``DiagnosticFigures`` that shows it."""

    message: str
    """What was expected, what was found and what to do."""


def diagnose(*, before: DiagnosticFigures, after: DiagnosticFigures) -> list[DiagnosticWarning]:
    """Return what speaks against the injected model; an empty list if nothing does.

    Args:
        before: The model without the skill vector.
        after: The model with it, on the same questions, sampling and documents.
    """
    length_ratio = _ratio(after.mean_words, before.mean_words)
    findings: list[Finding] = [
        (
            "empty_frac",
            after.empty_frac - before.empty_frac <= MAX_EMPTY_RISE,
            f"empty answers must not rise by more than {MAX_EMPTY_RISE:.0%} of all, found"
            f" {after.empty_frac:.1%} after {before.empty_frac:.1%}",
        ),
        (
            "mean_words",
            1 / MAX_LENGTH_RATIO <= length_ratio <= MAX_LENGTH_RATIO,
            f"answers must not grow or shrink by more than a factor of {MAX_LENGTH_RATIO:g}, found"
            f" {after.mean_words:.1f} words after {before.mean_words:.1f}",
        ),
        (
            "repetition_frac",
            after.repetition_frac - before.repetition_frac <= MAX_REPETITION_RISE,
            f"repeated {NGRAM}-grams must not rise by more than {MAX_REPETITION_RISE:.0%} of all,"
            f" found {after.repetition_frac:.1%} after {before.repetition_frac:.1%}",
        ),
        *_consistency_findings(before.self_consistency, after.self_consistency),
        *_perplexity_findings(before.perplexity, after.perplexity),
    ]
    return [
        DiagnosticWarning(sign=sign, message=f"{text}. {ADVICE}")
        for sign, is_fine, text in findings
        if not is_fine
    ]


def diagnostic_figures(
    answers: Sequence[Sequence[str]], *, perplexity: float | None = None
) -> DiagnosticFigures:
    """Measure sampled answers.

    Args:
        answers: For every question its sampled answers, as many for each.
        perplexity: Of the target's documents, if it was measured.

    Raises:
        DataError: There are no answers, or questions have different numbers of them.
    """
    counts = {len(samples) for samples in answers}
    if len(counts) != 1 or 0 in counts:
        raise DataError(
            "every question must have the same number of answers, at least one, found"
            f" {sorted(counts)} over {len(answers)} questions. Sample all with one group size."
        )
    flat = list(chain.from_iterable(answers))
    return DiagnosticFigures(
        empty_frac=fmean(not answer.strip() for answer in flat),
        mean_words=fmean(len(answer.split()) for answer in flat),
        repetition_frac=fmean(repetition(answer) for answer in flat),
        self_consistency=None if counts == {1} else self_consistency(answers),
        perplexity=perplexity,
    )


def self_consistency(answers: Sequence[Sequence[str]]) -> float:
    """Return the share of pairs of sampled answers that are the same, averaged over questions.

    ``mean over questions of sum_a c_a (c_a - 1) / (n (n - 1))`` with ``c_a`` the number of samples
    that say ``a`` after normalisation. An empty answer agrees with nothing, not even another one:
    else a model that falls silent would look certain.

    Example: ``self_consistency([["Oslo.", "oslo", "Bergen"]])`` is 1/3.

    Args:
        answers: For every question its samples, at least two, drawn at a temperature above 0.

    Raises:
        DataError: There is no question, or one has fewer than two answers.
    """
    if not answers or min(len(samples) for samples in answers) < 2:
        raise DataError(
            "agreement needs questions with at least two sampled answers each, found"
            f" {len(answers)} questions, some with fewer or none at all. Sample more per question."
        )
    return fmean(_agreement(samples) for samples in answers)


def repetition(answer: str) -> float:
    """Return the share of an answer's 4-grams of words that occurred in it before.

    ``1 - (different 4-grams) / (4-grams)``; 0 for fewer than four words.

    Reference:
        seq-rep-4 of https://arxiv.org/abs/1908.04319 section 6.
    """
    words = answer.lower().split()
    ngrams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _agreement(samples: Sequence[str]) -> float:
    said = Counter(tuple(normalized_tokens(sample)) for sample in samples if sample.strip())
    agreeing = sum(count * (count - 1) for count in said.values())
    return agreeing / (len(samples) * (len(samples) - 1))


def _ratio(after: float, before: float) -> float:
    """Return ``after / before``; two zeros are equal, a rise from zero has no bound."""
    if before == 0:
        return 1.0 if after == 0 else float("inf")
    return after / before


def _consistency_findings(before: float | None, after: float | None) -> list[Finding]:
    if before is None or after is None:
        return []
    text = (
        f"sampled answers must not agree less by more than {MAX_CONSISTENCY_DROP:g}, found"
        f" {after:.2f} after {before:.2f}"
    )
    return [("self_consistency", before - after <= MAX_CONSISTENCY_DROP, text)]


def _perplexity_findings(before: float | None, after: float | None) -> list[Finding]:
    """Compare so that a perplexity that is not a number is not fine."""
    if before is None or after is None:
        return []
    text = (
        "perplexity of the documents must not rise by more than a factor of"
        f" {MAX_PERPLEXITY_RATIO:g}, found {after:.2f} after {before:.2f}"
    )
    return [("perplexity", _ratio(after, before) <= MAX_PERPLEXITY_RATIO, text)]
