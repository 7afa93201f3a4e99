"""The schema of the rollouts table, and what every table that is read must fulfil."""

# pyarrow's tables have no types for pyright.
# pyright: reportUnknownParameterType=false

from collections.abc import Sequence
from typing import cast

import pyarrow as pa

from past_ray.errors import DataError

SCHEMA_VERSION = "1"
"""Changes when a reader of older tables would misread newer ones."""

_VERSION_KEY = b"past_ray.rollouts"

TURN = pa.struct(
    [
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),
        ("token_versions", pa.list_(pa.int64())),
        ("reward", pa.float64()),
        ("finish_reason", pa.string()),
        ("policy_version", pa.int64()),
        ("num_cached_tokens", pa.int32()),
    ]
)
"""One turn; log-probabilities are kept as the doubles that training saw."""

SCHEMA = pa.schema(
    [
        # The type that Arrow gives to ``step=000123``.
        ("step", pa.int32()),
        ("group", pa.int32()),
        ("question_id", pa.string()),
        ("index", pa.int32()),
        ("rollout_id", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("answer", pa.string()),
        ("reward", pa.float64()),
        ("reward_parts", pa.map_(pa.string(), pa.float64())),
        ("policy_version", pa.int64()),
        ("staleness", pa.int64()),
        ("generation_s", pa.float64()),
        ("environment_s", pa.float64()),
        ("turns", pa.list_(TURN)),
    ],
    metadata={_VERSION_KEY: SCHEMA_VERSION},
)
"""One rollout a row. ``group`` and ``index`` are places in the step and in the group; ``staleness``
is in optimizer steps between the oldest token and the weights that trained on it."""

NULLABLE = ("reward", "staleness")
"""Null for a rollout without a reward, or without a token."""

OPTIONAL = ("step", "staleness")
"""Columns that groups can be rebuilt without."""


def checked_table(table: pa.Table, source: str) -> pa.Table:
    """Return the columns of the schema in its types and without unexpected nulls."""
    version = (table.schema.metadata or {}).get(_VERSION_KEY, SCHEMA_VERSION.encode()).decode()
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{source} must have schema version {SCHEMA_VERSION}, found {version}. Read it with "
            "the past_ray that wrote it."
        )
    missing = [n for n in SCHEMA.names if n not in table.column_names and n not in OPTIONAL]
    if missing:
        raise DataError(
            f"{source} must have the columns {SCHEMA.names}, found {table.column_names}. Rename or "
            f"add {missing}."
        )
    fields = [field for field in SCHEMA if field.name in table.column_names]
    columns = [_checked_column(table.column(field.name), field, source) for field in fields]
    return pa.table(columns, schema=pa.schema(fields))


def _checked_column(column: pa.ChunkedArray, field: pa.Field, source: str) -> pa.Array:
    try:
        array = column.cast(field.type).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise DataError(
            f"{source}: {field.name} must be of type {field.type}, found {column.type}: {error}. "
            "Convert the column."
        ) from error
    if field.name not in NULLABLE and _has_null(array):
        row = next(row for row, value in enumerate(array.to_pylist()) if _contains_none(value))
        raise DataError(
            f"{source}: {field.name} must not be null, found one in row {row}. Fill it or drop the "
            "row."
        )
    return array


def _has_null(array: pa.Array) -> bool:
    if array.null_count:
        return True
    if isinstance(array, pa.StructArray):
        return any(_has_null(part) for part in array.flatten())
    if isinstance(array, pa.MapArray):
        first, last = (array.offsets[place].as_py() for place in (0, -1))
        return _has_null(array.items.slice(first, last - first))
    return isinstance(array, pa.ListArray) and _has_null(array.flatten())


def _contains_none(value: object) -> bool:
    if isinstance(value, dict):
        value = list(cast(dict[str, object], value).values())
    if isinstance(value, list | tuple):
        return any(_contains_none(entry) for entry in cast(Sequence[object], value))
    return value is None
