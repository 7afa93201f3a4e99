"""Named parts of the data files: the splits that the papers use.

========================  =============================  ===========================
preset                    records                        role in PaST
========================  =============================  ===========================
``seal_round_1``          0-49 of source_round1.json     SQuAD source, round 1
``seal_round_2``          0-49 of source_round2.json     SQuAD source, round 2
``seal_target_200``       0-199 of target_200.json       SQuAD target, n = 200
``loogle_source_1``       100-104 of shortdep_qa.jsonl   LooGLE source, round 1
``loogle_source_2``       95-99                          LooGLE source, round 2
``loogle_validation``     90-94                          choice of the checkpoint
``loogle_test``           0-49                           LooGLE target
``loogle_ablation``       0-9                            target of the ablations
========================  =============================  ===========================

Reference: https://arxiv.org/abs/2601.11258, sections on SQuAD and LooGLE.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from past_ray.config.task import SplitPreset
from past_ray.errors import DataError
from past_ray.tasks.passages import Passage


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A range of the passages of one file."""

    path: str
    """As the loaders take it."""

    start: int
    """Index of the first passage in the file."""

    count: int | None
    """Passages; None for all from ``start`` on."""

    keep_repeated: bool = False
    """Whether a passage may ask the same question twice."""


PRESETS: Mapping[SplitPreset, Split] = {
    "seal_round_1": Split(path="squad/source_round1.json", start=0, count=50),
    "seal_round_2": Split(path="squad/source_round2.json", start=0, count=50),
    # Four of its 974 questions are asked twice; the published numbers count them.
    "seal_target_200": Split(path="squad/target_200.json", start=0, count=200, keep_repeated=True),
    "loogle_source_1": Split(path="loogle/shortdep_qa.jsonl", start=100, count=5),
    "loogle_source_2": Split(path="loogle/shortdep_qa.jsonl", start=95, count=5),
    "loogle_validation": Split(path="loogle/shortdep_qa.jsonl", start=90, count=5),
    "loogle_test": Split(path="loogle/shortdep_qa.jsonl", start=0, count=50),
    "loogle_ablation": Split(path="loogle/shortdep_qa.jsonl", start=0, count=10),
}
"""What each name stands for."""


def preset_split(preset: SplitPreset, *, path: str | None, start: int, count: int | None) -> Split:
    """Return the part of a preset that begins ``start`` passages after its own beginning.

    Args:
        preset: The named split.
        path: Where its file is; None for the usual place.
        start: Counted from the preset's first passage.
        count: None for the rest of the preset.

    Raises:
        DataError: The part does not lie within the preset.
    """
    whole = PRESETS[preset]
    assert whole.count is not None
    count = whole.count - start if count is None else count
    if count < 1 or start + count > whole.count:
        raise DataError(
            f"split {preset} has {whole.count} passages, found start {start} and count {count}."
            " Ask for fewer, or give a path without a preset."
        )
    return Split(
        path=path or whole.path,
        start=whole.start + start,
        count=count,
        keep_repeated=whole.keep_repeated,
    )


def selected(passages: Sequence[Passage], split: Split) -> list[Passage]:
    """Return the passages of the split.

    Args:
        passages: All passages of ``split.path``.
        split: Which of them.

    Raises:
        DataError: The file has fewer passages than the split reaches for.
    """
    end = split.start + (1 if split.count is None else split.count)
    if end > len(passages):
        raise DataError(
            f"{split.path} must have at least {end} passages to start at {split.start}, found"
            f" {len(passages)}. Ask for fewer, or give the path of the full file."
        )
    return list(passages[split.start : None if split.count is None else end])
