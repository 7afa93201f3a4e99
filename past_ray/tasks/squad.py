"""SQuAD passages from the official files, from SEAL's files and from the Hugging Face hub.

Three layouts hold the same passages::

    official  {"version": "v2.0", "data": [{"title": "Botany", "paragraphs": [
                {"context": "Plants ...", "qas": [
                  {"id": "56be", "question": "...", "is_impossible": false,
                   "answers": [{"text": "...", "answer_start": 3}, ...]}]}]}]}

    SEAL      [{"title": "Botany", "context": "Plants ...",
                "questions": [{"question": "...", "answer": "..."}, ...],
                "completions": ["1. Plants ...", ...]}]

    hub       one row a question: {"title": "Botany", "context": "Plants ...", "question": "...",
               "answers": {"text": ["...", ...], "answer_start": [3, ...]}}

Of several gold answers the first is taken. Questions of SQuAD v2 that the passage does not answer
are left out and counted on the passage.

Reference: https://arxiv.org/abs/1606.05250, https://arxiv.org/abs/1806.03822 (v2),
https://arxiv.org/abs/2506.10943 (SEAL).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from past_ray.errors import DataError
from past_ray.tasks import hub
from past_ray.tasks.passages import Passage, readable_title
from past_ray.tasks.records import (
    as_mapping,
    kind_of,
    list_field,
    read_json_file,
    resolve_data_path,
    text_field,
)

QA = tuple[str, str]


def load_passages(path: str) -> list[Passage]:
    """Read all passages of a file or of a data set on the hub, in their order.

    Args:
        path: Resolved by ``resolve_data_path``, or a name such as ``hf:rajpurkar/squad:train``.

    Raises:
        DataError: No such file, not JSON, or a malformed record (with its index).
    """
    if hub.is_hub_name(path):
        return _hub_passages(hub.load_rows(path), name=hub.file_name(path), source=path)
    resolved = resolve_data_path(Path(path))
    content = read_json_file(resolved)
    if isinstance(content, list):
        return [
            _seal_passage(record, place=f"{resolved}: record {index}", passage_id=passage_id)
            for index, record in enumerate(cast(list[object], content))
            for passage_id in (_passage_id(resolved.stem, index),)
        ]
    if isinstance(content, dict) and "data" in content:
        return _official_passages(cast(Mapping[str, object], content), resolved)
    raise DataError(
        f"{resolved} must be a list of passages or an object with 'data', found"
        f" {kind_of(cast(object, content))}. Use a file of SQuAD or of SEAL."
    )


def _seal_passage(record: object, *, place: str, passage_id: str) -> Passage:
    fields = as_mapping(record, place)
    return Passage(
        passage_id=passage_id,
        title=readable_title(text_field(fields, "title", place)),
        context=text_field(fields, "context", place),
        questions=tuple(
            (text_field(pair, "question", where), text_field(pair, "answer", where))
            for number, entry in enumerate(list_field(fields, "questions", place))
            for where in (f"{place}, question {number}",)
            for pair in (as_mapping(entry, where),)
        ),
        completions=tuple(
            text_field({"completion": entry}, "completion", f"{place}, completion {number}")
            for number, entry in enumerate(list_field(fields, "completions", place))
        ),
    )


def _official_passages(content: Mapping[str, object], path: Path) -> list[Passage]:
    passages: list[Passage] = []
    for index, article in enumerate(list_field(content, "data", str(path))):
        place = f"{path}: record {index}"
        fields = as_mapping(article, place)
        title = readable_title(text_field(fields, "title", place))
        for number, paragraph in enumerate(list_field(fields, "paragraphs", place)):
            where = f"{place}, paragraph {number}"
            entries = as_mapping(paragraph, where)
            context = text_field(entries, "context", where)
            questions = [
                _official_question(entry, f"{where}, question {position}")
                for position, entry in enumerate(list_field(entries, "qas", where))
            ]
            passage_id = _passage_id(path.stem, len(passages))
            passages.append(_answered(passage_id, title, context, questions))
    return passages


def _official_question(entry: object, place: str) -> QA | None:
    """Return the question with its first answer; None where the passage has no answer."""
    fields = as_mapping(entry, place)
    question = text_field(fields, "question", place)
    if fields.get("is_impossible") is True:
        return None
    answers = list_field(fields, "answers", place)
    if not answers:
        raise DataError(
            f"{place} must have an answer or 'is_impossible': true, found an empty list"
            " 'answers'. Repair the record."
        )
    return question, text_field(as_mapping(answers[0], place), "text", f"{place}, answer 0")


def _hub_passages(rows: Sequence[object], *, name: str, source: str) -> list[Passage]:
    questions: dict[tuple[str, str], list[QA | None]] = {}
    for index, row in enumerate(rows):
        place = f"{source}: record {index}"
        fields = as_mapping(row, place)
        title = readable_title(text_field(fields, "title", place))
        passage = (title, text_field(fields, "context", place))
        questions.setdefault(passage, []).append(_hub_question(fields, place))
    return [
        _answered(_passage_id(name, index), title, context, pairs)
        for index, ((title, context), pairs) in enumerate(questions.items())
    ]


def _hub_question(fields: Mapping[str, object], place: str) -> QA | None:
    """Return as ``_official_question``; the hub says impossible by an empty list of answers."""
    question = text_field(fields, "question", place)
    texts = list_field(as_mapping(fields.get("answers"), f"{place}, answers"), "text", place)
    return (question, text_field({"answer": texts[0]}, "answer", place)) if texts else None


def _answered(passage_id: str, title: str, context: str, questions: Sequence[QA | None]) -> Passage:
    answered = tuple(question for question in questions if question is not None)
    return Passage(
        passage_id=passage_id,
        title=title,
        context=context,
        questions=answered,
        num_unanswerable=len(questions) - len(answered),
    )


def _passage_id(name: str, index: int) -> str:
    return f"{name}-{index:04d}"
