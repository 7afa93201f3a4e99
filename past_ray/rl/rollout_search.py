"""Finds rollouts of a run by step, status, reward and text.

Steps are read one by one and the tokens dropped, so that memory holds the rows that match and not
the run.
"""

# pyarrow's tables have no types for pyright, and its compute functions are made at import.
# pyright: reportUnknownParameterType=false, reportAttributeAccessIssue=false

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from past_ray.errors import DataError
from past_ray.rl.rollout_schema import TURN, checked_table
from past_ray.rl.rollout_table import ROLLOUTS_DIR, read_rollouts_table, rollouts_path
from past_ray.rl.types import RolloutStatus

SortKey = Literal["reward", "num_tokens", "staleness"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutQuery:
    """Conditions that a rollout must all fulfil; None is no condition."""

    first_step: int | None = None
    """Earliest step."""

    last_step: int | None = None
    """Latest step, included."""

    status: RolloutStatus | None = None
    """How it ended."""

    min_reward: float | None = None
    """Least reward; a rollout without a reward does not match."""

    max_reward: float | None = None
    """Largest reward; a rollout without a reward does not match."""

    question_id: str | None = None
    """The question."""

    contains: str | None = None
    """Part of the answer or the error, in any case."""


def find_work_dirs(run: Path) -> list[Path]:
    """Return the RL work directories at or below ``run``, sorted.

    Raises:
        DataError: If there are no rollouts.
    """
    found = sorted({path.parents[2] for path in run.rglob(f"{ROLLOUTS_DIR}/step=*/*.parquet")})
    if not found:
        what = "no rollouts/step=*/ below" if run.is_dir() else "no folder there"
        raise DataError(
            f"{run} must be a run directory or an RL work directory with rollouts, found {what}. "
            "Check the path, e.g. runs/demo or runs/demo/work/rl_source_1."
        )
    return found


def stored_steps(work_dir: Path) -> list[int]:
    """Return the steps whose rollouts are stored, sorted."""
    names = [
        folder.name.removeprefix("step=") for folder in work_dir.glob(f"{ROLLOUTS_DIR}/step=*")
    ]
    return sorted(int(name) for name in names if name.isdigit())


def search_rollouts(run: Path, query: RolloutQuery, *, sort: SortKey | None = None) -> pa.Table:
    """Return a row for every rollout that matches, by folder and step or as sorted.

    Args:
        run: A run directory or an RL work directory.
        query: What to look for.
        sort: Column to sort by, largest first, missing values last.

    Returns:
        The columns of the rollouts table without ``turns`` and with ``work_dir``, ``num_turns`` and
        ``num_tokens`` (sampled).

    Raises:
        DataError: If there are no rollouts of these steps or a file is malformed.
    """
    parts: list[pa.Table] = []
    work_dirs = find_work_dirs(run)
    for work_dir in work_dirs:
        for step in _steps_between(stored_steps(work_dir), query):
            parts.append(_matching_rows(work_dir, step, query))
    if not parts:
        steps = sorted({step for work_dir in work_dirs for step in stored_steps(work_dir)})
        raise DataError(
            f"{run} must have rollouts of the steps asked for, found steps {steps[0]} to "
            f"{steps[-1]}. Choose some of these."
        )
    table = pa.concat_tables(parts)
    if sort is None:
        return table
    return table.take(pc.sort_indices(table, sort_keys=[(sort, "descending", "at_end")]))


def read_turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of one row of ``search_rollouts``, as the table has them."""
    path = rollouts_path(Path(row["work_dir"]), row["step"])
    table = read_rollouts_table(path)
    is_row = pc.and_(pc.equal(table["group"], row["group"]), pc.equal(table["index"], row["index"]))
    turns: list[dict[str, Any]] = table.filter(is_row)["turns"].to_pylist()[0]
    return turns


def _steps_between(steps: list[int], query: RolloutQuery) -> Iterator[int]:
    for step in steps:
        is_early = query.first_step is not None and step < query.first_step
        is_late = query.last_step is not None and step > query.last_step
        if not is_early and not is_late:
            yield step


def _matching_rows(work_dir: Path, step: int, query: RolloutQuery) -> pa.Table:
    path = rollouts_path(work_dir, step)
    table = checked_table(read_rollouts_table(path), str(path))
    num_turns, num_tokens = _sizes(table["turns"].combine_chunks())
    size = table.num_rows
    table = table.drop_columns("turns").append_column("num_turns", pa.array(num_turns))
    table = table.append_column("num_tokens", pa.array(num_tokens))
    table = table.add_column(0, "step", pa.array([step] * size, pa.int32()))
    table = table.add_column(0, "work_dir", pa.array([str(work_dir)] * size))
    condition = _condition(query)
    return table if condition is None else table.filter(condition)


def _sizes(turns: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of turns and of sampled tokens of each row."""
    token_ids = turns.values.flatten()[TURN.get_field_index("token_ids")]
    lengths = pc.list_value_length(token_ids).to_numpy(zero_copy_only=False).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(lengths)])
    offsets = turns.offsets.to_numpy()
    return np.diff(offsets), before[offsets[1:]] - before[offsets[:-1]]


def _condition(query: RolloutQuery) -> pc.Expression | None:
    conditions: list[pc.Expression] = []
    if query.status is not None:
        conditions.append(pc.field("status") == query.status.value)
    if query.question_id is not None:
        conditions.append(pc.field("question_id") == query.question_id)
    if query.min_reward is not None:
        conditions.append(pc.field("reward") >= query.min_reward)
    if query.max_reward is not None:
        conditions.append(pc.field("reward") <= query.max_reward)
    if query.contains is not None:
        conditions.append(
            pc.match_substring(pc.field("answer"), query.contains, ignore_case=True)
            | pc.match_substring(pc.field("error"), query.contains, ignore_case=True)
        )
    condition: pc.Expression | None = None
    for part in conditions:
        condition = part if condition is None else condition & part
    return condition
