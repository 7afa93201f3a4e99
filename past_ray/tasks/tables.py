"""The two Parquet tables of every task: documents to learn, and questions about them.

This module owns their schemas. Whatever is read or written passes the checks here, so everything
behind it may rely on non-null text, unique ids and questions that name a document.

Rows in error messages are counted from 0, as ``pyarrow`` and ``pandas`` count them.
"""

# pyarrow's tables have no types for pyright, and its compute functions are made at import.
# pyright: reportUnknownParameterType=false, reportAttributeAccessIssue=false

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from past_ray.errors import DataError, StorageError

DOCUMENTS = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("doc_id", "title", "text")]
)
"""One document a row; ``title`` may be the empty string."""

QUESTIONS = pa.schema(
    [
        pa.field(name, pa.string(), nullable=False)
        for name in ("question_id", "doc_id", "question", "answer")
    ]
)
"""One question a row; ``doc_id`` names the document that holds the answer."""

NUM_REPORTED = 5
"""Offending rows that an error message lists; the count is always given in full."""


def write_documents(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a documents table; a file at ``path`` is replaced as a whole.

    Args:
        path: The Parquet file. Missing parents are created.
        rows: ``{"doc_id": "ada-d0", "title": "ada birch", "text": "ada birch lives in oslo ."}``.

    Raises:
        DataError: A row breaks the schema; the message has its number.
        StorageError: The file could not be written; an older one is intact.
    """
    table = _table_of_rows(path, rows, DOCUMENTS)
    _check_documents(path, table)
    _write(path, table)


def write_questions(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a questions table; a file at ``path`` is replaced as a whole.

    Whether every ``doc_id`` exists is checked by ``read_questions``, which sees the documents.

    Args:
        path: The Parquet file. Missing parents are created.
        rows: ``{"question_id": "ada-q0", "doc_id": "ada-d0", "question": "where does ada birch
            live ?", "answer": "oslo"}``.

    Raises:
        DataError: A row breaks the schema; the message has its number.
        StorageError: The file could not be written; an older one is intact.
    """
    table = _table_of_rows(path, rows, QUESTIONS)
    _check_questions(path, table)
    _write(path, table)


def read_documents(path: Path) -> pa.Table:
    """Read a documents table in file order; columns beyond the schema are left out.

    Args:
        path: A Parquet file, or a folder of them.

    Raises:
        DataError: A column is missing or not text, a document or an id is null or blank, or an id
            occurs twice.
    """
    table = _read(path, DOCUMENTS)
    _check_documents(path, table)
    return table


def read_questions(path: Path, documents: pa.Table) -> pa.Table:
    """Read the questions about ``documents`` in file order.

    Args:
        path: A Parquet file, or a folder of them.
        documents: The table that ``read_documents`` gave.

    Raises:
        DataError: As for ``read_documents``; also a question about an unknown document.
    """
    table = _read(path, QUESTIONS)
    _check_questions(path, table)
    is_known = pc.is_in(table["doc_id"], value_set=documents["doc_id"].combine_chunks())
    unknown = _rows_where(pc.invert(is_known))
    if unknown:
        names = [table["doc_id"][row].as_py() for row in unknown[:NUM_REPORTED]]
        raise DataError(
            f"{path}: doc_id must name a document, found {len(unknown)} unknown "
            f"({_listed(unknown)}; they name {names}). Add the documents or drop the questions."
        )
    return table


def _check_documents(path: Path, table: pa.Table) -> None:
    _check_filled(path, table, may_be_empty=("title",))
    _check_unique(path, table, "doc_id")


def _check_questions(path: Path, table: pa.Table) -> None:
    _check_filled(path, table, may_be_empty=())
    _check_unique(path, table, "question_id")


def _table_of_rows(path: Path, rows: Sequence[Mapping[str, str]], schema: pa.Schema) -> pa.Table:
    for row, values in enumerate(rows):
        if set(values) != set(schema.names):
            raise DataError(
                f"{path}: row {row} must have the columns {schema.names}, found {sorted(values)}."
                " Rename or complete them."
            )
    columns: list[pa.Array] = []
    for name in schema.names:
        values = [row[name] for row in rows]
        try:
            columns.append(pa.array(values, type=pa.string()))
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            row = next(
                number
                for number, value in enumerate(values)
                if not isinstance(value, str | None)  # pyright: ignore[reportUnnecessaryIsInstance]
            )
            raise DataError(
                f"{path}: {name} must be text, found {values[row]!r} in row {row}."
                " Convert it to a string."
            ) from error
    return pa.table(columns, schema=schema)


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    if not path.exists():
        raise DataError(
            f"{path} must be a Parquet file with the columns {schema.names}, found nothing there."
            " Check the path."
        )
    try:
        dataset = ds.dataset(path, format="parquet")
        found = dataset.schema
        _check_columns(path, found, schema)
        table = dataset.to_table(columns=schema.names)
        return table.cast(pa.schema([(name, pa.string()) for name in schema.names]))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} must be readable as Parquet, got: {error}. Write it again."
        ) from error


def _check_columns(path: Path, found: pa.Schema, expected: pa.Schema) -> None:
    missing = [name for name in expected.names if name not in found.names]
    if missing:
        raise DataError(
            f"{path} must have the columns {expected.names}, found {found.names}."
            f" Rename or add {missing}."
        )
    for name in expected.names:
        kind = found.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(
                f"{path}: {name} must be a column of strings, found {kind}. Convert the column."
            )


def _check_filled(path: Path, table: pa.Table, *, may_be_empty: Sequence[str]) -> None:
    if table.num_rows == 0:
        raise DataError(f"{path} must have at least one row, found none. Check what wrote it.")
    for name in table.column_names:
        column = table[name]
        if column.null_count:
            nulls = _rows_where(pc.is_null(column))
            raise DataError(
                f"{path}: {name} must not be null, found {len(nulls)} nulls ({_listed(nulls)})."
                " Fill or drop them."
            )
        if name in may_be_empty:
            continue
        is_blank = pc.or_(pc.utf8_is_space(column), pc.equal(pc.binary_length(column), 0))
        if pc.any(is_blank).as_py():
            blanks = _rows_where(is_blank)
            raise DataError(
                f"{path}: {name} must not be empty, found {len(blanks)} empty ({_listed(blanks)})."
                " Fill or drop them."
            )


def _check_unique(path: Path, table: pa.Table, name: str) -> None:
    ids = table[name]
    if pc.count_distinct(ids).as_py() == table.num_rows:
        return
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    shown: list[str] = []
    for value in repeated[:NUM_REPORTED]:
        rows = _rows_where(pc.equal(ids, value))
        shown.append(f"{value.as_py()!r} in {_listed(rows)}")
    raise DataError(
        f"{path}: {name} must be unique, found {len(repeated)} repeated: {'; '.join(shown)}."
        " Rename or drop the copies."
    )


def _rows_where(is_offender: pa.ChunkedArray) -> list[int]:
    """Return the row numbers that are true; only called where an error is about to be raised."""
    rows: list[int] = pc.indices_nonzero(is_offender).to_pylist()
    return rows


def _listed(rows: Sequence[int]) -> str:
    """Name the first rows: ``row 3``, ``rows 3 and 7``, ``rows 3, 7, 9, 10, 11, ...``."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    if len(rows) == 2:
        return f"rows {rows[0]} and {rows[1]}"
    numbers = ", ".join(str(row) for row in rows[:NUM_REPORTED])
    return f"rows {numbers}{', ...' if len(rows) > NUM_REPORTED else ''}"


def _write(path: Path, table: pa.Table) -> None:
    writing = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, writing)
        writing.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} must be writable, got: {error}. An older version is intact; free space or"
            " choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            writing.unlink()
