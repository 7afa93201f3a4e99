"""What is learned: the miniature world, SQuAD passages or the user's own Parquet tables."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from past_ray.config.base import StrictConfig

RewardName = Literal["exact_match", "gold_token_recall"]


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

    reward: RewardName = "exact_match"
    """Reward of a rollout, and the accuracy of the evaluation."""


class SquadTaskConfig(StrictConfig):
    """SEAL-style SQuAD files: passages, questions and self-written implications."""

    kind: Literal["squad"] = "squad"
    """Selects this task."""

    source_paths: tuple[Path, ...] = (Path("squad/source_round1.json"),)
    """One file per refinement round; relative paths are taken from ``PAST_RAY_DATA``."""

    target_path: Path = Path("squad/target_200.json")
    """The target file; relative paths are taken from ``PAST_RAY_DATA``."""

    num_source_passages: int = Field(default=50, ge=1)
    """The first passages of each source file."""

    num_target_passages: int = Field(default=200, ge=1)
    """The first passages of the target file."""

    num_completions: int = Field(default=5, ge=0)
    """Implication texts used for each passage, besides the passage itself."""

    reward: RewardName = "gold_token_recall"
    """Reward of a rollout, and the accuracy of the evaluation."""


class TablesTaskConfig(StrictConfig):
    """The user's own Parquet tables."""

    kind: Literal["tables"] = "tables"
    """Selects this task."""

    source_dirs: tuple[Path, ...] = Field(min_length=1)
    """One folder per refinement round, each with documents.parquet and questions.parquet."""

    target_dir: Path
    """Folder with documents.parquet and questions.parquet (the questions only evaluate)."""

    reward: RewardName = "gold_token_recall"
    """Reward of a rollout, and the accuracy of the evaluation."""


TaskConfig = Annotated[
    WorldTaskConfig | SquadTaskConfig | TablesTaskConfig, Field(discriminator="kind")
]
