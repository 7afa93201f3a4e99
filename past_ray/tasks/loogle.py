"""LooGLE's long documents with short-dependency questions.

One JSON object a line; the pairs are a string with a Python literal, which is parsed as a literal
and never run::

    {"title": "...", "input": "Early life. ...",
     "qa_pairs": "[{'Q': '...', 'A': '...', 'S': 'the sentence that says it'}, ...]"}

Reference: https://arxiv.org/abs/2311.04939
"""

import ast
from pathlib import Path
from typing import cast

from past_ray.errors import DataError
from past_ray.tasks import hub
from past_ray.tasks.passages import Passage
from past_ray.tasks.records import as_mapping, read_json_lines, resolve_data_path, text_field

MAX_FOUND_CHARS = 60
"""Longest excerpt of an unreadable literal in a message."""


def load_passages(path: str) -> list[Passage]:
    """Read all documents of a file or of a data set on the hub, in their order.

    Args:
        path: Resolved by ``resolve_data_path``, or ``hf:bigai-nlco/LooGLE:shortdep_qa:test``.

    Raises:
        DataError: No such file, not JSON lines, or a malformed record (with its index).
    """
    if hub.is_hub_name(path):
        source, name, records = path, hub.file_name(path), hub.load_rows(path)
    else:
        resolved = resolve_data_path(Path(path))
        source, name, records = str(resolved), resolved.stem, read_json_lines(resolved)
    return [
        _parse_document(record, place=f"{source}: record {index}", passage_id=f"{name}-{index:04d}")
        for index, record in enumerate(records)
    ]


def _parse_document(record: object, *, place: str, passage_id: str) -> Passage:
    fields = as_mapping(record, place)
    return Passage(
        passage_id=passage_id,
        title=text_field(fields, "title", place).strip(),
        context=text_field(fields, "input", place).strip(),
        questions=tuple(
            (text_field(pair, "Q", where), text_field(pair, "A", where))
            for number, entry in enumerate(
                _parse_pairs(text_field(fields, "qa_pairs", place), place)
            )
            for where in (f"{place}, question {number}",)
            for pair in (as_mapping(entry, where),)
        ),
    )


def _parse_pairs(literal: str, place: str) -> list[object]:
    try:
        pairs: object = ast.literal_eval(literal)
    # What literal_eval raises on text that is not a literal, too deep or too large.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise DataError(
            f"{place}: qa_pairs must be a Python literal, found {literal[:MAX_FOUND_CHARS]!r}"
            f" ({type(error).__name__}). Repair the record."
        ) from error
    if not isinstance(pairs, list):
        raise DataError(
            f"{place}: qa_pairs must be a list of pairs, found {literal[:MAX_FOUND_CHARS]!r}."
            " Repair the record."
        )
    return cast(list[object], pairs)
