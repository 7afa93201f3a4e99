"""What a model is asked to write about the documents it has to learn, and the rows it becomes.

::

    documents --> passage_requests ---------------------------> texts --> training_texts
    documents --> summary_requests --> texts --> recall_requests --> texts --> training_texts
    documents --> pair_requests ------------------------------> texts --> pairs.pair_rows

A request is known by its id, ``<doc_id>#<kind>-<number>``; over windows the number is
``<size>.<window>.<n>``. Its seed and its template are drawn from the id, so neither depends on
which other requests there are, and an interrupted job asks for the same again.

Reference:
    SEAL https://arxiv.org/abs/2506.10943 (texts about a passage); PaST
    https://arxiv.org/abs/2601.11258 (texts and questions about windows).

Differs from the papers: all wording is our own, and the passage stands before the instruction, so
that an engine computes it once for all requests about it.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from past_ray.config.texts import PassageKind
from past_ray.errors import DataError
from past_ray.storage import read_jsonl
from past_ray.tasks.examples import Message
from past_ray.tasks.text_prompts import (
    PAIR_FOCUSES,
    PAIR_INSTRUCTION,
    PASSAGE_INSTRUCTIONS,
    RECALL_INSTRUCTIONS,
    SUMMARY_INSTRUCTIONS,
)
from past_ray.tasks.windows import text_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TextKind = PassageKind | Literal["summarise", "recall", "pairs"]
"""What is written: see ``config.texts``; ``pairs`` are questions with answers in XML."""

NUM_REPORTED = 5
"""Ids that an error message lists; the count is always given in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """One text to write."""

    request_id: str
    """``<doc_id>#<kind>-<number>``."""

    doc_id: str
    """The document that it is about."""

    title: str
    """Title of the document; may be empty."""

    kind: TextKind
    """What is asked for."""

    passage: str
    """The document, or the window of it, that the prompt shows."""

    messages: tuple[Message, ...]
    """The prompt."""

    seed: int
    """Seed of this text alone."""

    opening: str = ""
    """What stands before the text when it is trained: the summary that it was recalled from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTexts:
    """Generated texts as a table."""

    rows: list[dict[str, str]]
    """Rows for ``tables.write_documents``, ids those of the requests."""

    num_dropped: int
    """Texts that were empty."""


def passage_requests(
    documents: Sequence[Mapping[str, str]],
    *,
    kinds: Sequence[PassageKind],
    texts_per_kind: int,
    seed: int,
) -> list[TextRequest]:
    """Ask for ``texts_per_kind`` texts of each kind about every document as a whole.

    Args:
        documents: Rows of a documents table.
        kinds: What to write.
        texts_per_kind: Equal prompts that differ in their seed.
        seed: Seed of all.
    """
    return [
        _request(
            document, document["text"], kind, str(number), (PASSAGE_INSTRUCTIONS[kind],), seed=seed
        )
        for document in documents
        for kind in kinds
        for number in range(texts_per_kind)
    ]


def summary_requests(
    documents: Sequence[Mapping[str, str]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sizes: Sequence[int],
    overlap: int,
    texts_per_window: int,
    seed: int,
) -> list[TextRequest]:
    """Ask for the summaries of every window: ``texts_per_window / 2``, the other half is recalled.

    Args:
        documents: Rows of a documents table.
        tokenizer: Counts tokens.
        sizes: Tokens of a window; the document is covered once with each size.
        overlap: Tokens that neighbouring windows share.
        texts_per_window: Even.
        seed: Seed of all.
    """
    return [
        _request(document, passage, "summarise", f"{place}.{n}", SUMMARY_INSTRUCTIONS, seed=seed)
        for document in documents
        for place, passage in _windows(document["text"], tokenizer, sizes, overlap)
        for n in range(texts_per_window // 2)
    ]


def recall_requests(
    summaries: Sequence[TextRequest], texts: Mapping[str, str], *, seed: int
) -> list[TextRequest]:
    """Ask to expand each generated summary to all that its window says; empty ones are left out.

    Differs from the paper, which does not say what is shown: here the window stands in the prompt,
    or details would be invented. Trained is the summary with the account behind it, nothing else.

    Args:
        summaries: From ``summary_requests``.
        texts: The generated summaries, by ``request_id``.
        seed: Seed of all.
    """
    return [
        _request(
            {"doc_id": asked.doc_id, "title": asked.title},
            asked.passage,
            "recall",
            asked.request_id.removeprefix(f"{asked.doc_id}#summarise-"),
            RECALL_INSTRUCTIONS,
            seed=seed,
            summary=texts[asked.request_id].strip(),
        )
        for asked in summaries
        if texts[asked.request_id].strip()
    ]


def pair_requests(
    documents: Sequence[Mapping[str, str]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sizes: Sequence[int],
    overlap: int,
    pairs_per_window: int,
    seed: int,
) -> list[TextRequest]:
    """Ask for ``pairs_per_window`` questions with answers about every window, of one of six sorts.

    The other arguments are those of ``summary_requests``.
    """
    instructions = [
        PAIR_INSTRUCTION.format(number=pairs_per_window, focus=focus)
        for focus in PAIR_FOCUSES.values()
    ]
    return [
        _request(document, passage, "pairs", f"{place}.0", instructions, seed=seed)
        for document in documents
        for place, passage in _windows(document["text"], tokenizer, sizes, overlap)
    ]


def training_texts(requests: Sequence[TextRequest], texts: Mapping[str, str]) -> TrainingTexts:
    """Turn generated texts into documents to train; empty texts are dropped and counted.

    Args:
        requests: All kinds but ``pairs``.
        texts: What was generated, by ``request_id``.

    Raises:
        DataError: All texts about a document are empty; the message names it.
    """
    rows: list[dict[str, str]] = []
    num_kept: defaultdict[str, int] = defaultdict(int)
    for request in requests:
        text = texts[request.request_id].strip()
        num_kept[request.doc_id] += bool(text)
        if text:
            whole = f"{request.opening}\n\n{text}" if request.opening else text
            rows.append({"doc_id": request.request_id, "title": request.title, "text": whole})
    barren = [doc_id for doc_id, number in num_kept.items() if number == 0]
    if barren:
        raise DataError(
            f"every document must give a text, but all that was generated about {len(barren)} of "
            f"{len(num_kept)} documents is empty (first: {barren[:NUM_REPORTED]}). Use another "
            "model or another kind of text."
        )
    return TrainingTexts(rows=rows, num_dropped=len(requests) - len(rows))


def read_given_texts(path: Path, requests: Sequence[TextRequest]) -> dict[str, str]:
    """Read texts that were written before, by ``request_id``; lines of other requests are skipped.

    Args:
        path: JSON lines ``{"request_id": "p0#rewrite-0", "text": "..."}``.
        requests: What has to be there.

    Raises:
        DataError: A line is malformed, or a request has no text.
    """
    texts: dict[str, str] = {}
    records: list[Any] = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        try:
            texts[record["request_id"]] = str(record["text"])
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path} line {number} must be an object with request_id and text, got "
                f"{type(record).__name__}. Repair the line."
            ) from error
    missing = [request.request_id for request in requests if request.request_id not in texts]
    if missing:
        raise DataError(
            f"{path} must have a text for all {len(requests)} requests, found none for "
            f"{len(missing)} (first: {missing[:NUM_REPORTED]}). Add them or generate texts instead."
        )
    return {request.request_id: texts[request.request_id] for request in requests}


def _windows(
    text: str, tokenizer: "PreTrainedTokenizerBase", sizes: Sequence[int], overlap: int
) -> Iterator[tuple[str, str]]:
    """Yield ``<size>.<window>`` and the text of every window of every size."""
    for size in sizes:
        for index, passage in enumerate(text_windows(text, tokenizer, size=size, overlap=overlap)):
            yield f"{size}.{index}", passage


def _request(
    document: Mapping[str, str],
    passage: str,
    kind: TextKind,
    number: str,
    instructions: Sequence[str],
    *,
    seed: int,
    summary: str = "",
) -> TextRequest:
    """Build a request; which of the instructions it has is drawn from its id."""
    request_id = f"{document['doc_id']}#{kind}-{number}"
    draw = _draw(request_id, seed)
    parts = [
        f"Title: {document['title']}" if document["title"] else "",
        f"Passage:\n{passage.strip()}",
        f"Summary:\n{summary}" if summary else "",
        random.Random(draw).choice(instructions),
    ]
    content = "\n\n".join(part for part in parts if part)
    return TextRequest(
        request_id=request_id,
        doc_id=document["doc_id"],
        title=document["title"],
        kind=kind,
        passage=passage,
        messages=({"role": "user", "content": content},),
        seed=draw,
        opening=summary,
    )


def _draw(request_id: str, seed: int) -> int:
    """Return a number in [0, 2^31) that ``hash`` would change with every process."""
    digest = hashlib.sha256(f"{seed}/{request_id}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1
