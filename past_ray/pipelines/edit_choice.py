"""Verdicts -> the best self-edit of every passage.

Reference: SEAL https://arxiv.org/abs/2506.10943 section 3 (ReST-EM keeps what answers best).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from past_ray.errors import DataError
from past_ray.tasks.judging import JudgeOutcome, Verdict

Outcomes = Mapping[str, Mapping[str, Sequence[JudgeOutcome]]]
"""Of all answers of a self-edit's adapters, by passage and self-edit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditChoice:
    """The best self-edits of a round."""

    best: dict[str, str]
    """Id of the best self-edit, by passage."""

    scores: dict[str, float]
    """Share of correct answers, by self-edit; those without any verdict are left out."""

    num_tied: int
    """Passages in ``best`` whose self-edits all score the same, so that nothing was chosen."""

    unscored: tuple[str, ...]
    """Passages without any verdict; they have no best self-edit."""


def choose_edits(outcomes: Outcomes) -> EditChoice:
    """Choose the self-edit of each passage with most correct answers, of equal ones the first.

    ``score = num_correct / num_verdicts``; failures of the judge are in neither number.

    Args:
        outcomes: In the order in which the self-edits were sampled.

    Raises:
        DataError: There is no verdict at all.
    """
    best: dict[str, str] = {}
    scores: dict[str, float] = {}
    num_tied = 0
    for passage, edits in outcomes.items():
        verdicts = {
            edit: [outcome.is_correct for outcome in found if isinstance(outcome, Verdict)]
            for edit, found in edits.items()
        }
        shares = {edit: fmean(correct) for edit, correct in verdicts.items() if correct}
        if shares:
            best[passage] = max(shares, key=shares.__getitem__)
            num_tied += len(set(shares.values())) == 1
            scores |= shares
    if not best:
        raise DataError(
            "the judge must decide on some answer to choose self-edits, it decided on none about "
            f"{len(outcomes)} passages. Check that the source has questions and the judge answers."
        )
    unscored = tuple(passage for passage in outcomes if passage not in best)
    return EditChoice(best=best, scores=scores, num_tied=num_tied, unscored=unscored)
