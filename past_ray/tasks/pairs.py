"""Questions with answers out of what a model wrote, and the rows they become.

Models write prose around the tags, forget to close one or stop in the middle. A pair counts only if
both its parts are closed; everything else is dropped and counted.
"""

import html
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from past_ray.errors import DataError
from past_ray.tasks.synthesis import TextRequest

NUM_REPORTED = 5
"""Documents that an error message lists; the count is always given in full."""

_OPENINGS = re.compile(r"<(question|answer)\b[^<>]*>", re.IGNORECASE)
_CONTENT = r"((?:(?!</?(?:question|answer)\b).)*)"
_PAIR = re.compile(
    rf"<question\b[^<>]*>{_CONTENT}</question>(?:(?!</?(?:question|answer)\b).)*"
    rf"<answer\b[^<>]*>{_CONTENT}</answer>",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QAPair:
    """One question with its answer, entities resolved and white space single."""

    question: str
    """Never empty."""

    answer: str
    """Never empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedPairs:
    """The pairs of one text."""

    pairs: tuple[QAPair, ...]
    """In the order of the text, each question once."""

    num_dropped: int
    """Pairs that were begun but are not among them: unclosed, empty or repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRows:
    """The pairs of many texts as a table."""

    rows: list[dict[str, str]]
    """Rows for ``tables.write_questions``."""

    num_dropped: int
    """Pairs that were begun but dropped."""

    num_without_pairs: int
    """Texts that gave no pair at all."""


def parse_pairs(text: str) -> ParsedPairs:
    """Read ``<question>..</question> <answer>..</answer>`` out of any text.

    Example: ``<question>Who fled?</question><answer>The Shah</answer>`` is one pair.
    """
    openings = [match[1].lower() for match in _OPENINGS.finditer(text)]
    num_begun = max(openings.count("question"), openings.count("answer"))
    pairs: dict[str, QAPair] = {}
    for match in _PAIR.finditer(text):
        question, answer = _plain(match[1]), _plain(match[2])
        if _has_words(question) and _has_words(answer):
            pairs.setdefault(question.casefold(), QAPair(question=question, answer=answer))
    return ParsedPairs(pairs=tuple(pairs.values()), num_dropped=num_begun - len(pairs))


def pair_rows(requests: Sequence[TextRequest], texts: Mapping[str, str]) -> PairRows:
    """Turn the texts of pair requests into rows; ``question_id`` is ``<request_id>.<number>``.

    Args:
        requests: From ``synthesis.pair_requests``.
        texts: What was generated, by ``request_id``.

    Raises:
        DataError: All texts about a document together gave no pair; the message names it.
    """
    rows: list[dict[str, str]] = []
    num_dropped = num_without_pairs = 0
    num_pairs: defaultdict[str, int] = defaultdict(int)
    for request in requests:
        parsed = parse_pairs(texts[request.request_id])
        num_dropped += parsed.num_dropped
        num_without_pairs += not parsed.pairs
        num_pairs[request.doc_id] += len(parsed.pairs)
        rows += [
            {
                "question_id": f"{request.request_id}.{number}",
                "doc_id": request.doc_id,
                "question": pair.question,
                "answer": pair.answer,
            }
            for number, pair in enumerate(parsed.pairs)
        ]
    barren = [doc_id for doc_id, number in num_pairs.items() if number == 0]
    if barren:
        raise DataError(
            "every document must give a question with an answer, but all that was generated about "
            f"{len(barren)} of {len(num_pairs)} documents held none that could be read (first: "
            f"{barren[:NUM_REPORTED]}). Use a model that keeps to the asked XML, or raise "
            "max_new_tokens."
        )
    return PairRows(rows=rows, num_dropped=num_dropped, num_without_pairs=num_without_pairs)


def _plain(content: str) -> str:
    """Resolve entities, drop nested tags and join white space."""
    try:
        text = "".join(ElementTree.fromstring(f"<text>{content}</text>").itertext())
    except ElementTree.ParseError:  # "5 < 7" and "R&D" are no XML, but good answers.
        text = html.unescape(content)
    return " ".join(text.split())


def _has_words(text: str) -> bool:
    return any(char.isalnum() for char in text)
