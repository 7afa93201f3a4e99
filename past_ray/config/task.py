"""What is learned: the miniature world, SQuAD, LooGLE or the user's own Parquet tables."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from past_ray.config.base import StrictConfig

SplitPreset = Literal[
    "seal_round_1",
    "seal_round_2",
    "seal_target_200",
    "loogle_source_1",
    "loogle_source_2",
    "loogle_validation",
    "loogle_test",
    "loogle_ablation",
]
"""Names of splits; ``tasks/splits.py`` says which records they are."""


class WorldTaskConfig(StrictConfig):
    """The embedded miniature world: people with attributes; needs no download."""

    kind: Literal["world"] = "world"
    """Selects this task."""

    num_people: int = Field(default=60, ge=2)
    """People in each of the populations source_1, source_2 and target."""

    num_paraphrases: int = Field(default=4, ge=1)
    """Documents about each person, each wording every attribute differently."""

    num_pairs: int = Field(default=3, ge=0)
    """Questions per person that need two facts."""

    num_comparisons: int = Field(default=2, ge=0)
    """Questions per person that compare a fact of two people."""


class SplitConfig(StrictConfig):
    """Which passages of which file; the bare name of a preset stands for ``{preset: name}``."""

    preset: SplitPreset | None = None
    """A split that the papers use, see ``tasks/splits.py``; null takes a range of ``path``."""

    path: str | None = None
    """The file, below ``PAST_RAY_DATA`` where relative, or ``hf:<data set>:<split>``.

    With a preset: where its file is, if not at the usual place.
    """

    start: int = Field(default=0, ge=0)
    """First passage, counted from 0 at the beginning of the preset, or else of the file."""

    count: int | None = Field(default=None, ge=1)
    """Number of passages; null takes the rest of the preset or of the file."""

    keep_repeated: bool = False
    """Whether a passage may ask the same question twice; it is refused otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _read_name(cls, value: object) -> object:
        return {"preset": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "SplitConfig":
        if self.preset is None and self.path is None:
            raise ValueError("a split must have a preset or a path, got neither. Add one.")
        return self


class _PassagesTaskConfig(StrictConfig):
    """What the tasks made of passages have in common."""

    preset_prefix: ClassVar[str]

    sources: tuple[SplitConfig, ...] = Field(min_length=1)
    """One split per refinement round."""

    target: SplitConfig
    """Shares no title with any other split; its questions only evaluate."""

    validation: SplitConfig | None = None
    """A further source domain to choose the scale on."""

    held_out: SplitConfig | None = None
    """Text that shares no title with sources and target, to measure forgetting on."""

    @model_validator(mode="after")
    def _check_presets(self) -> Self:
        for split in (*self.sources, self.target, self.validation, self.held_out):
            if split and split.preset and not split.preset.startswith(self.preset_prefix):
                raise ValueError(
                    f"presets of this task must start with {self.preset_prefix}, got"
                    f" {split.preset}. Choose another, or another kind."
                )
        return self


class SquadTaskConfig(_PassagesTaskConfig):
    """SQuAD passages: official files, the hub, or SEAL's files with self-written implications."""

    preset_prefix: ClassVar[str] = "seal_"

    kind: Literal["squad"] = "squad"
    """Selects this task."""

    sources: tuple[SplitConfig, ...] = Field(
        default=(SplitConfig(preset="seal_round_1"), SplitConfig(preset="seal_round_2")),
        min_length=1,
    )
    """One split per refinement round."""

    target: SplitConfig = SplitConfig(preset="seal_target_200")
    """Shares no title with any other split; its questions only evaluate."""

    num_completions: int = Field(default=5, ge=0)
    """Given implication texts used for each passage, besides the passage itself.

    The held-out text takes none. Only SEAL's files have them; others need 0.
    """


class LoogleTaskConfig(_PassagesTaskConfig):
    """LooGLE's long documents with short-dependency questions."""

    preset_prefix: ClassVar[str] = "loogle_"

    kind: Literal["loogle"] = "loogle"
    """Selects this task."""

    sources: tuple[SplitConfig, ...] = Field(
        default=(SplitConfig(preset="loogle_source_1"), SplitConfig(preset="loogle_source_2")),
        min_length=1,
    )
    """One split per refinement round."""

    target: SplitConfig = SplitConfig(preset="loogle_test")
    """Shares no title with any other split; its questions only evaluate."""


class TablesTaskConfig(StrictConfig):
    """The user's own Parquet tables."""

    kind: Literal["tables"] = "tables"
    """Selects this task."""

    source_dirs: tuple[Path, ...] = Field(min_length=1)
    """One folder per refinement round, each with documents.parquet and questions.parquet."""

    target_dir: Path
    """Folder with documents.parquet and questions.parquet (the questions only evaluate)."""


TaskConfig = Annotated[
    WorldTaskConfig | SquadTaskConfig | LoogleTaskConfig | TablesTaskConfig,
    Field(discriminator="kind"),
]
