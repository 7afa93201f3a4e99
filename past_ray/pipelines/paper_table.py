"""Our arms in the layout of the paper's tables, next to its numbers and to what differs.

::

    method                             ours                gain over target SFT        paper  note
    Passage + Synthetic (target SFT)   21.4 [18.1, 24.9]                               39.7*
    PaST, two rounds                   30.2 [26.6, 33.9]   +8.8 [+5.1, +12.4] p<0.001  56.9* (+17.2)

    * Measured otherwise than ours: the model is ..., in the paper Qwen2.5-7B; ...
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from past_ray.errors import DataError
from past_ray.tasks.published import (
    METHODS,
    PAPER_SETUPS,
    REGIME_TITLES,
    PublishedFigure,
    Regime,
    Setup,
    published,
)
from past_ray.tasks.statistics import (
    PairedDifference,
    bootstrap_ci,
    paired_bootstrap,
    passage_ids_of,
)

TEXT_WIDTH = 140
"""Columns of the plain text; a note wraps inside its own column."""

COLUMNS = ("method", "ours", "gain over target SFT", "words", "paper", "note")
"""Headings, one for each field of ``PaperRow``."""

ABSENT = "-"
"""Stands where there is no number."""

WITHOUT_GAIN = frozenset({"base", "passage_only", "target_sft", "in_context"})
"""Arms that no method is credited for; the paper prints no gain for them either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFigures:
    """What one arm reached on the questions of the target."""

    accuracy: float
    """In [0, 1]."""

    ci95: tuple[float, float]
    """95 % bootstrap interval of the accuracy."""

    mean_words: float
    """Words of an answer: a longer one holds the gold answer more easily."""

    gain: PairedDifference | None
    """Against target SFT on the same questions; None without such an arm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRow:
    """One line of the table, as text for a terminal or a page; nothing in it is markup."""

    method: str
    """Name in the paper."""

    ours: str
    """Accuracy in percent with its 95 % interval."""

    gain: str
    """Points over target SFT, with interval and p-value."""

    mean_words: str
    """Words of an answer."""

    published: str
    """The paper's accuracy and gain; ``*`` where it was measured otherwise."""

    note: str
    """What a reader must know to compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperTable:
    """A table of the paper with our numbers in it."""

    title: str
    """What is measured."""

    rows: tuple[PaperRow, ...]
    """In the paper's order."""

    footnotes: tuple[str, ...]
    """What the marks mean."""

    @property
    def text(self) -> str:
        """The table for a terminal or a log, in plain characters."""
        table = Table(box=box.ASCII, title=self.title, title_justify="left")
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for row in self.rows:
            cells = (row.method, row.ours, row.gain, row.mean_words, row.published, row.note)
            table.add_row(*map(Text, cells))  # an interval in brackets is no markup
        out = StringIO()
        console = Console(file=out, width=TEXT_WIDTH, color_system=None)
        console.print(table)
        for footnote in self.footnotes:
            console.print(Text(footnote))
        return out.getvalue()


def paper_table(
    arms: Mapping[str, ArmFigures], *, regime: Regime, differences: Sequence[str]
) -> PaperTable:
    """Return our arms and the published ones, in the paper's order.

    Args:
        arms: Our figures by arm; a published arm without any is shown as not run.
        regime: Which of the paper's tables.
        differences: How our measurement differs (``differences_from_paper``). If there are any,
            every published number carries a mark.

    Raises:
        DataError: An arm has no place in the table.
    """
    if unknown := sorted(arms.keys() - METHODS.keys()):
        raise DataError(
            f"arms of the paper's table must be among {sorted(METHODS)}, found {unknown}. Show"
            " others in a table of their own."
        )
    figures, mark = published(regime), "*" if differences else ""
    rows = tuple(
        _row(arm, arms.get(arm), figures.get(arm), mark)
        for arm in METHODS
        if arm in arms or arm in figures
    )
    footnotes = ["Intervals are 95 % bootstrap intervals; gains are paired by question."]
    if differences:
        footnotes.append(f"* Measured otherwise than ours: {'; '.join(differences)}.")
    return PaperTable(title=REGIME_TITLES[regime], rows=rows, footnotes=tuple(footnotes))


def arm_figures(
    correct: Mapping[str, Mapping[str, float]],
    *,
    mean_words: Mapping[str, float],
    num_bootstrap: int,
    seed: int,
    passage_of: Mapping[str, str] | None = None,
) -> dict[str, ArmFigures]:
    """Return accuracy, interval and gain of every arm.

    Args:
        correct: By arm and question id, 1 or 0 or the mean over several answers.
        mean_words: Words of an answer, by arm.
        num_bootstrap: Resamples behind each interval.
        seed: Seed of the resamples.
        passage_of: Passage id by question id; whole passages are then resampled, which is right
            wherever the questions of a passage share its adapter or its training text.

    Raises:
        DataError: Arms answered different questions, or a question has no passage.
    """
    resampling = {"num_samples": num_bootstrap, "seed": seed}

    def figures(arm: str, answers: Mapping[str, float]) -> ArmFigures:
        values, passage_ids, gain = list(answers.values()), None, None
        if passage_of is not None:
            passage_ids = passage_ids_of(answers, passage_of)
        ci95 = bootstrap_ci(values, passage_ids=passage_ids, **resampling)
        if "target_sft" in correct and arm != "target_sft":
            baseline = correct["target_sft"]
            gain = paired_bootstrap(answers, baseline=baseline, passage_of=passage_of, **resampling)
        return ArmFigures(accuracy=fmean(values), ci95=ci95, mean_words=mean_words[arm], gain=gain)

    return {arm: figures(arm, answers) for arm, answers in correct.items()}


def differences_from_paper(ours: Setup, *, regime: Regime) -> list[str]:
    """Say in which respects our numbers were measured otherwise than the published ones.

    Args:
        ours: Our setup; ``model`` may be a path or have an organisation before it.
        regime: Which of the paper's tables.
    """
    paper = PAPER_SETUPS[regime]
    pairs = [
        ("the model is", ours.model.rstrip("/").rpartition("/")[2], paper.model),
        ("the judge is", ours.judge, paper.judge),
        ("target passages or documents are", ours.num_passages, paper.num_passages),
        ("questions are", ours.num_questions, paper.num_questions),
        ("source passages or documents per round are", ours.source_size, paper.source_size),
    ]
    return [
        f"{what} {_value(own)}, in the paper {_value(theirs)}"
        for what, own, theirs in pairs
        if theirs is not None and own != theirs
    ]


def _row(arm: str, ours: ArmFigures | None, paper: PublishedFigure | None, mark: str) -> PaperRow:
    has_gain = arm not in WITHOUT_GAIN
    notes = [] if ours else ["not run here"]
    if paper is None:
        notes.append(
            "ceiling; not in the paper" if arm == "in_context" else "not in this table of the paper"
        )
    elif paper.source != "Table 1":
        notes.append(paper.source)
    if paper is not None and paper.remark:
        notes.append(paper.remark)
    return PaperRow(
        method=METHODS[arm],
        ours=_accuracy(ours) if ours else ABSENT,
        gain=_gain(ours.gain) if ours and ours.gain and has_gain else "",
        mean_words=f"{ours.mean_words:.1f}" if ours else ABSENT,
        published=_published(paper, mark, has_gain=has_gain) if paper else ABSENT,
        note="; ".join(notes),
    )


def _accuracy(ours: ArmFigures) -> str:
    low, high = ours.ci95
    return f"{100 * ours.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _gain(gain: PairedDifference) -> str:
    low, high = gain.ci95
    p_value = "p<0.001" if gain.p_value < 0.001 else f"p={gain.p_value:.3f}"
    return f"{100 * gain.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] {p_value}"


def _published(paper: PublishedFigure, mark: str, *, has_gain: bool) -> str:
    text = f"{paper.percent:.1f}{mark}"
    return f"{text} ({paper.percent - paper.target_sft:+.1f})" if has_gain else text


def _value(value: str | int | None) -> str:
    return "not known" if value is None else f"{value:,}" if isinstance(value, int) else value
