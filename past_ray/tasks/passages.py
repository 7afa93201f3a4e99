"""Passages with questions about them, whatever file they came from, and the rows they become."""

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from past_ray.errors import DataError

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

    completions: tuple[str, ...] = ()
    """Texts that a language model wrote about the passage, given with it."""

    num_unanswerable: int = 0
    """Questions of the file that the passage does not answer; they are not in ``questions``."""


def readable_title(title: str) -> str:
    """Return one spelling of a SQuAD title: ``University_of_Notre_Dame`` as words, no ``%27``.

    Files differ in it, and titles are both compared across files and shown to the model.
    """
    return unquote(title).replace("_", " ").strip()


def passage_rows(passages: Sequence[Passage]) -> list[dict[str, str]]:
    """Return the rows of the documents table: the passages alone, ``doc_id = passage_id``."""
    return [
        {"doc_id": passage.passage_id, "title": passage.title, "text": passage.context}
        for passage in passages
    ]


def given_rows(passages: Sequence[Passage], *, num_completions: int) -> list[dict[str, str]]:
    """Return rows for the first completions of each passage: documents ``<passage_id>#1`` ...

    Args:
        passages: Their titles are the rows' titles.
        num_completions: Taken from each passage.

    Raises:
        DataError: A passage has fewer completions.
    """
    for passage in passages:
        if len(passage.completions) < num_completions:
            raise DataError(
                f"{passage.passage_id} must have {num_completions} completions, found"
                f" {len(passage.completions)}. Lower task.num_completions."
            )
    return [
        {"doc_id": f"{passage.passage_id}#{number}", "title": passage.title, "text": text}
        for passage in passages
        for number, text in enumerate(passage.completions[:num_completions], start=1)
    ]


def question_rows(passages: Sequence[Passage]) -> list[dict[str, str]]:
    """Return the rows of the questions table; each names its passage."""
    return [
        {
            "question_id": f"{passage.passage_id}-q{number}",
            "doc_id": passage.passage_id,
            "question": question,
            "answer": answer,
        }
        for passage in passages
        for number, (question, answer) in enumerate(passage.questions)
    ]


def check_questions_differ(passages: Sequence[Passage]) -> None:
    """Refuse a passage that asks the same twice, letter case and spaces aside: it counts double.

    Raises:
        DataError: With the question and both places.
    """
    for passage in passages:
        places: dict[str, int] = {}
        for number, (question, _) in enumerate(passage.questions):
            first = places.setdefault(" ".join(question.casefold().split()), number)
            if first != number:
                raise DataError(
                    f"{passage.passage_id} must ask {question!r} once, found it as questions"
                    f" {first} and {number} (unanswerable ones not counted). Drop one, or set"
                    " keep_repeated of this split to count it twice, as SEAL does."
                )


def check_disjoint_titles(
    left: Sequence[Passage], right: Sequence[Passage], *, left_name: str, right_name: str
) -> None:
    """Refuse two domains that share an article: what one teaches would not be new to the other.

    Raises:
        DataError: With the shared titles.
    """
    shared = sorted({passage.title for passage in left} & {passage.title for passage in right})
    if shared:
        raise DataError(
            f"{left_name} and {right_name} must have no title in common, found {len(shared)}:"
            f" {shared[:NUM_REPORTED]}. Choose other files or ranges."
        )
