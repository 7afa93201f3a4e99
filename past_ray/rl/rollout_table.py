"""Rollouts as Parquet: one row a rollout, for any Arrow tool, and back to groups without loss.

::

    run_dir/rollouts/step=000123/rollouts.parquet       Hive layout: the folder gives ``step``

    step group question_id index rollout_id  status     reward ... turns
    123  0     ada-q0      0     122/ada-q0/0 completed  1.0       [{prompt_ids: [4, 5, 6],
                                                                    token_ids: [7, 2], ...}]

``step`` is the policy version that training on the rollouts leads to, as in ``metrics.jsonl``. The
file itself has no such column, or readers of single files and of the whole folder would see two.

Rows in error messages are counted from 0, as ``pyarrow`` and ``pandas`` count them.
"""

# pyarrow's tables have no types for pyright.
# pyright: reportUnknownParameterType=false

from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from past_ray.errors import DataError
from past_ray.rl.rollout_schema import SCHEMA, TURN, checked_table
from past_ray.rl.types import (
    Completion,
    FinishReason,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    Turn,
)
from past_ray.storage import atomic_directory

ROLLOUTS_DIR = "rollouts"
ROLLOUTS_FILE = "rollouts.parquet"


def rollouts_to_table(groups: Sequence[RolloutGroup], *, step: int) -> pa.Table:
    """Return one row for every rollout.

    Args:
        groups: At least one rollout each.
        step: Policy version that training on them leads to.

    Raises:
        DataError: If a group has no rollout, because a row could not tell that it was there.
    """
    for group in groups:
        if not group.rollouts:
            raise DataError(
                f"group {group.question_id!r} of step {step} must have at least one rollout, found "
                "none. Record failed rollouts with their status."
            )
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group.rollouts))]
    rollouts = list(chain.from_iterable(group.rollouts for group in groups))
    columns: dict[str, list[Any]] = {
        "step": [step] * len(rollouts),
        "group": [place[0] for place in places],
        "question_id": [_text(groups[place[0]].question_id) for place in places],
        "index": [place[1] for place in places],
        "rollout_id": [_text(r.rollout_id) for r in rollouts],
        "status": [r.status.value for r in rollouts],
        "error": [_text(r.error) for r in rollouts],
        "answer": [_text(r.answer) for r in rollouts],
        "reward": [None if r.reward is None else float(r.reward) for r in rollouts],
        "reward_parts": [_parts(r.reward_parts) for r in rollouts],
        "policy_version": [r.policy_version for r in rollouts],
        "staleness": [_staleness(r, step=step) for r in rollouts],
        "generation_s": [float(r.generation_s) for r in rollouts],
        "environment_s": [float(r.environment_s) for r in rollouts],
    }
    arrays = [pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()]
    return pa.table([*arrays, _turns_array(rollouts)], schema=SCHEMA)


def table_to_groups(table: pa.Table, *, source: str = "the rollouts table") -> list[RolloutGroup]:
    """Rebuild the groups that ``rollouts_to_table`` was given, in their order.

    Rows may come in any order and some may be missing, as after a filter.

    Args:
        table: May have further columns; ``step`` and ``staleness`` may be missing.
        source: Name of the table in error messages.

    Raises:
        DataError: If the table does not follow the schema; the message has the row.
    """
    table = checked_table(table, source)
    steps = _values(table["step"]) if "step" in table.column_names else [0] * table.num_rows
    keys = list(zip(steps, _values(table["group"]), _values(table["index"]), strict=True))
    question_ids = _values(table["question_id"])
    rollouts = _rollouts(table, source)
    groups: dict[tuple[int, int], RolloutGroup] = {}
    previous: int | None = None
    for row in sorted(range(table.num_rows), key=keys.__getitem__):
        if previous is not None and keys[previous] == keys[row]:
            raise DataError(
                f"{source}: step, group and index must be unique, found rows "
                f"{min(previous, row)} and {max(previous, row)} alike. Drop the copy."
            )
        previous = row
        empty = RolloutGroup(question_id=question_ids[row], rollouts=[])
        groups.setdefault(keys[row][:2], empty).rollouts.append(rollouts[row])
    return list(groups.values())


def write_rollouts(run_dir: Path, step: int, groups: Sequence[RolloutGroup]) -> Path:
    """Write the rollouts of one step and return the file; an older one is replaced as a whole.

    Args:
        run_dir: Work directory of an RL run.
        step: Policy version that training on them leads to.
        groups: At least one rollout each.

    Raises:
        DataError: If a group has no rollout.
        StorageError: If the disk is full; an older file is intact.
    """
    table = rollouts_to_table(groups, step=step).drop_columns("step")
    path = rollouts_path(run_dir, step)
    with atomic_directory(path.parent) as writing:
        pq.write_table(table, writing / path.name, compression="zstd")
    return path


def read_rollouts(run_dir: Path, step: int) -> list[RolloutGroup]:
    """Read the groups of one step.

    Raises:
        DataError: If there is no such file, or it does not follow the schema.
    """
    path = rollouts_path(run_dir, step)
    return table_to_groups(read_rollouts_table(path), source=str(path))


def read_rollouts_table(path: Path, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one file of rollouts; ``step`` is in the path alone.

    Args:
        path: A file of ``write_rollouts``.
        columns: Names to read; None for all.

    Raises:
        DataError: If it is missing or not Parquet.
    """
    if not path.is_file():
        raise DataError(
            f"{path} must be a Parquet file of rollouts, found nothing there. Check the folder and "
            "the step."
        )
    try:
        # ParquetFile takes the path as it is; read_table would add the folder's name as a column.
        with pq.ParquetFile(path) as file:
            return file.read(columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} must be readable as Parquet, got: {error}. Train the step again or restore "
            "the file."
        ) from error


def rollouts_path(run_dir: Path, step: int) -> Path:
    """Return where the rollouts of a step are."""
    return run_dir / ROLLOUTS_DIR / f"step={step:06d}" / ROLLOUTS_FILE


def _text(text: str) -> str:
    """Return ``text`` as valid Unicode: an error may quote bytes that are none."""
    return text.encode("utf-8", "backslashreplace").decode()


def _parts(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(_text(name), float(value)) for name, value in parts.items()]


def _staleness(rollout: Rollout, *, step: int) -> int | None:
    return None if rollout.policy_version < 0 else step - 1 - rollout.policy_version


def _turns_array(rollouts: Sequence[Rollout]) -> pa.ListArray:
    """Return the turns of each rollout, built by column: a dict for every turn would be slow."""
    turns = list(chain.from_iterable(rollout.turns for rollout in rollouts))
    completions = [turn.completion for turn in turns]
    columns: dict[str, list[Any]] = {
        "prompt_ids": [turn.prompt_ids for turn in turns],
        "token_ids": [completion.token_ids for completion in completions],
        "logprobs": [completion.logprobs for completion in completions],
        "token_versions": [completion.token_versions for completion in completions],
        "reward": [float(turn.reward) for turn in turns],
        "finish_reason": [completion.finish_reason for completion in completions],
        "policy_version": [completion.policy_version for completion in completions],
        "num_cached_tokens": [completion.num_cached_tokens for completion in completions],
    }
    arrays = [pa.array(values, TURN.field(name).type) for name, values in columns.items()]
    offsets = [0]
    for rollout in rollouts:
        offsets.append(offsets[-1] + len(rollout.turns))
    struct = pa.StructArray.from_arrays(arrays, fields=list(TURN))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), struct)


def _rollouts(table: pa.Table, source: str) -> list[Rollout]:
    """Return the rollout of every row."""
    columns = {
        name: _values(table[name])
        for name in table.column_names
        if name not in ("turns", "reward_parts", "reward")
    }
    # As Python's own values: to NumPy, a null is the same as a NaN.
    rewards = cast(list[float | None], table["reward"].to_pylist())
    parts = cast(list[list[tuple[str, float]]], table["reward_parts"].to_pylist())
    turns = _turns(table["turns"].combine_chunks())
    rollouts: list[Rollout] = []
    for row in range(table.num_rows):
        try:
            status = RolloutStatus(columns["status"][row])
        except ValueError as error:
            raise DataError(
                f"{source}: status must be one of {[s.value for s in RolloutStatus]}, found "
                f"{columns['status'][row]!r} in row {row}. Correct it."
            ) from error
        rollout = Rollout(
            rollout_id=columns["rollout_id"][row],
            turns=turns[row],
            answer=columns["answer"][row],
            reward=rewards[row],
            status=status,
            policy_version=columns["policy_version"][row],
            error=columns["error"][row],
            reward_parts=dict(parts[row]),
            generation_s=columns["generation_s"][row],
            environment_s=columns["environment_s"][row],
        )
        _check_rollout(rollout, f"{source}: row {row}")
        rollouts.append(rollout)
    return rollouts


def _turns(array: pa.ListArray) -> list[list[Turn]]:
    """Return the turns of every row, read by column: ``to_pylist`` makes an object for each id."""
    struct = array.values
    columns = {
        field.name: _values(part) for field, part in zip(TURN, struct.flatten(), strict=True)
    }
    turns = [
        Turn(
            prompt_ids=columns["prompt_ids"][place],
            completion=Completion(
                token_ids=columns["token_ids"][place],
                logprobs=columns["logprobs"][place],
                finish_reason=cast(FinishReason, columns["finish_reason"][place]),
                policy_version=columns["policy_version"][place],
                token_versions=columns["token_versions"][place],
                num_cached_tokens=columns["num_cached_tokens"][place],
            ),
            reward=columns["reward"][place],
        )
        for place in range(len(struct))
    ]
    bounds = cast(list[int], array.offsets.to_pylist())
    return [turns[start:end] for start, end in pairwise(bounds)]


def _values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return Python's values of a column without nulls; lists of numbers as lists."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if not isinstance(array, pa.ListArray):
        return array.to_numpy(zero_copy_only=False).tolist()
    values = _values(array.values)
    return [values[start:end] for start, end in pairwise(_values(array.offsets))]


def _check_rollout(rollout: Rollout, place: str) -> None:
    """Refuse what cannot train; a failed rollout may hold anything."""
    if rollout.status is not RolloutStatus.COMPLETED:
        return
    if rollout.reward is None:
        raise DataError(
            f"{place} must have a reward because its status is 'completed', found null. Fill it or "
            "change the status."
        )
    for turn in rollout.turns:
        completion = turn.completion
        if completion.finish_reason not in get_args(FinishReason):
            raise DataError(
                f"{place} must have finish reasons out of {get_args(FinishReason)}, found "
                f"{completion.finish_reason!r}. Correct it."
            )
        counts = {
            len(completion.logprobs),
            len(completion.token_versions) or len(completion.token_ids),
        }
        if counts != {len(completion.token_ids)}:
            raise DataError(
                f"{place} must have one log-probability and at most one version for each of its "
                f"{len(completion.token_ids)} tokens, found {len(completion.logprobs)} and "
                f"{len(completion.token_versions)}. Restore the row."
            )
