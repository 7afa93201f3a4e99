"""From rows of the tables to the prompts that a policy sees."""

# pyarrow's tables have no types that pyright can read.
# pyright: reportUnknownParameterType=false

from typing import Literal

import pyarrow as pa

from past_ray.tasks.examples import Message, QAExample

PromptStyle = Literal["bare", "topic", "in_context"]
"""``bare``: the question alone. ``topic``: an instruction, the title, the question; the document
stays closed. ``in_context``: an instruction, the document's text, the question."""

INSTRUCTION = "Answer the question directly and concisely."
"""The same with and without the passage, so that the passage is all that differs."""


def closed_book_messages(question: str, *, title: str | None) -> tuple[Message, ...]:
    """Ask without showing the document.

    Args:
        question: The question as the table has it.
        title: Says what the question is about, since it was written next to its passage; None
            leaves the line out.
    """
    return (_user(_asked(question, title)),)


def in_context_messages(question: str, passage: str, *, title: str | None) -> tuple[Message, ...]:
    """Ask with the passage in the prompt: what a model that has not learned it can do."""
    return (_user(f"Passage: {passage}\n\n{_asked(question, title)}"),)


def qa_examples(documents: pa.Table, questions: pa.Table, *, style: PromptStyle) -> list[QAExample]:
    """Turn every question into an example, in the order of the table.

    Args:
        documents: From ``tables.read_documents``; holds the document of every question.
        questions: From ``tables.read_questions``.
        style: How the question is asked.
    """
    documents_by_id: dict[str, dict[str, str]] = {
        row["doc_id"]: row for row in documents.to_pylist()
    }
    rows: list[dict[str, str]] = questions.to_pylist()
    return [
        QAExample(
            question_id=row["question_id"],
            messages=_messages(row["question"], documents_by_id[row["doc_id"]], style=style),
            answer=row["answer"],
            question=row["question"],
        )
        for row in rows
    ]


def _messages(
    question: str, document: dict[str, str], *, style: PromptStyle
) -> tuple[Message, ...]:
    match style:
        case "bare":
            return (_user(question),)
        case "topic":
            return closed_book_messages(question, title=document["title"])
        case "in_context":
            return in_context_messages(question, document["text"], title=document["title"])


def _asked(question: str, title: str | None) -> str:
    topic = f"Topic: {title}\n" if title else ""
    return f"{INSTRUCTION}\n{topic}Question: {question}\nAnswer:"


def _user(content: str) -> Message:
    return {"role": "user", "content": content}
