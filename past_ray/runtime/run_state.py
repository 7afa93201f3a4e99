"""The part of a checkpoint that is not the learners': groups that were sampled ahead.

Questions need no state of their own, because a step's questions are a function of the seed and the
step. Groups that were still being sampled are begun again under the same ids.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from past_ray.rl.rollout_table import rollouts_to_table, table_to_groups
from past_ray.rl.types import RolloutGroup

PREFIX = "buffer-step-"


def write_buffer(groups_by_step: Mapping[int, Sequence[RolloutGroup]]) -> dict[str, bytes]:
    """Return the files of a checkpoint that hold the groups of steps not yet trained."""
    files: dict[str, bytes] = {}
    for step, groups in groups_by_step.items():
        content = io.BytesIO()
        pq.write_table(rollouts_to_table(groups, step=step + 1), content)
        files[f"{PREFIX}{step:06d}.parquet"] = content.getvalue()
    return files


def read_buffer(folder: Path) -> dict[int, list[RolloutGroup]]:
    """Return the groups of ``write_buffer`` by step."""
    return {
        int(file.stem.removeprefix(PREFIX)): table_to_groups(pq.read_table(file))
        for file in sorted(folder.glob(f"{PREFIX}*.parquet"))
    }
