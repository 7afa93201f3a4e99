"""SQuAD passages in the JSON layout of SEAL: a passage, its questions, self-written implications.

A file is a list of records::

    {"title": "Botany", "context": "Plants ...",
     "questions": [{"question": "...", "answer": "..."}, ...],
     "completions": ["1. Plants ...", ...]}

The files are not part of this package. Relative paths are taken from the folder that the
environment variable ``PAST_RAY_DATA`` names.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import unquote

from past_ray.errors import DataError

DATA_VARIABLE = "PAST_RAY_DATA"
"""Environment variable with the folder of the data files."""

NUM_REPORTED = 5
"""Shared titles that an error message lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One passage with what belongs to it.

    Example: ``Passage(passage_id="target_200-0003", title="Genghis Khan", context="The Shah ...",
    questions=(("What metal was used?", "silver"),), completions=("1. The Shah ...",))``
    """

    passage_id: str
    """``<file name>-<index in the file>``."""

    title: str
    """Title of the article; several passages can share one."""

    context: str
    """The passage itself."""

    questions: tuple[tuple[str, str], ...]
    """``(question, answer)`` pairs."""

    completions: tuple[str, ...]
    """Texts that a language model wrote about the passage."""


def resolve_data_path(path: Path) -> Path:
    """Return where a data file is: absolute paths as they are, others below ``PAST_RAY_DATA``.

    Raises:
        DataError: There is no such file; the message says whether the variable must be set.
    """
    folder = os.environ.get(DATA_VARIABLE)
    resolved = Path(folder) / path if folder else path
    if resolved.is_file():
        return resolved
    advice = (
        f"Check {DATA_VARIABLE}={folder} and the path."
        if folder and not path.is_absolute()
        else "Check the path."
        if path.is_absolute()
        else f"Set {DATA_VARIABLE} to the folder that holds it."
    )
    raise DataError(f"{path} must be a data file, found none at {resolved.absolute()}. {advice}")


def load_passages(path: Path, *, num_passages: int) -> list[Passage]:
    """Read the first ``num_passages`` records of a file.

    Args:
        path: Resolved by ``resolve_data_path``.
        num_passages: At least 1.

    Raises:
        DataError: No such file, not JSON, too few records, or a malformed one (with its index).
    """
    resolved = resolve_data_path(path)
    try:
        records: object = json.loads(resolved.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{resolved} must be JSON, got: {error}. Fetch it again.") from error
    if not isinstance(records, list):
        raise DataError(
            f"{resolved} must be a list of passages, found {_kind(records)}."
            " Use a file with the records that the task documents."
        )
    passages = cast(list[object], records)
    if len(passages) < num_passages:
        raise DataError(
            f"{resolved} must have at least {num_passages} passages, found {len(passages)}."
            " Ask for fewer."
        )
    return [
        _parse_passage(record, place=f"{resolved}: record {index}", name=resolved.stem, index=index)
        for index, record in enumerate(passages[:num_passages])
    ]


def passage_tables(
    passages: Sequence[Passage], *, num_completions: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the rows of the documents and of the questions table.

    A passage is a document with id ``<passage_id>``; its first ``num_completions`` completions are
    the documents ``<passage_id>#1`` ... of the same title. Questions name the passage.

    Raises:
        DataError: A passage has fewer completions.
    """
    documents: list[dict[str, str]] = []
    questions: list[dict[str, str]] = []
    for passage in passages:
        if len(passage.completions) < num_completions:
            raise DataError(
                f"{passage.passage_id} must have {num_completions} completions, found"
                f" {len(passage.completions)}. Lower num_completions."
            )
        doc_id = passage.passage_id
        documents.append({"doc_id": doc_id, "title": passage.title, "text": passage.context})
        documents += [
            {"doc_id": f"{doc_id}#{number}", "title": passage.title, "text": text}
            for number, text in enumerate(passage.completions[:num_completions], start=1)
        ]
        questions += [
            {
                "question_id": f"{doc_id}-q{number}",
                "doc_id": doc_id,
                "question": question,
                "answer": answer,
            }
            for number, (question, answer) in enumerate(passage.questions)
        ]
    return documents, questions


def check_disjoint_titles(source: Sequence[Passage], target: Sequence[Passage]) -> None:
    """Refuse a target that shares an article with the source: its answers would not be new.

    Raises:
        DataError: With the shared titles.
    """
    shared = sorted({passage.title for passage in source} & {passage.title for passage in target})
    if shared:
        raise DataError(
            f"source and target must have no title in common, found {len(shared)}:"
            f" {shared[:NUM_REPORTED]}. Choose other files."
        )


def _parse_passage(record: object, *, place: str, name: str, index: int) -> Passage:
    fields = _mapping(record, place)
    return Passage(
        passage_id=f"{name}-{index:04d}",
        title=unquote(_text(fields, "title", place)),
        context=_text(fields, "context", place),
        questions=tuple(
            (_text(pair, "question", where), _text(pair, "answer", where))
            for number, entry in enumerate(_list(fields, "questions", place))
            for where in (f"{place}, question {number}",)
            for pair in (_mapping(entry, where),)
        ),
        completions=tuple(
            _text({"completion": entry}, "completion", f"{place}, completion {number}")
            for number, entry in enumerate(_list(fields, "completions", place))
        ),
    )


def _mapping(value: object, place: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise DataError(f"{place} must be an object, found {_kind(value)}. Repair the record.")
    return cast(dict[str, object], value)


def _list(fields: Mapping[str, object], key: str, place: str) -> list[object]:
    value = fields.get(key)
    if not isinstance(value, list):
        raise DataError(
            f"{place} must have a list {key!r}, found {_kind(value)}; its keys are"
            f" {sorted(fields)}. Repair the record."
        )
    return cast(list[object], value)


def _text(fields: Mapping[str, object], key: str, place: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        found = "an empty text" if isinstance(value, str) else _kind(value)
        raise DataError(
            f"{place} must have a text {key!r}, found {found}; its keys are {sorted(fields)}."
            " Repair the record."
        )
    return value


def _kind(value: object) -> str:
    """Name a JSON value's kind."""
    return "nothing" if value is None else f"a {type(value).__name__}"
