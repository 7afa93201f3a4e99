"""From rows of the tables to the prompts that a policy sees."""

# pyarrow's tables have no types that pyright can read.
# pyright: reportUnknownParameterType=false

from typing import Literal

import pyarrow as pa

from past_ray.tasks.examples import Message, QAExample

PromptStyle = Literal["bare", "topic", "in_context"]
"""``bare``: the question alone. ``topic``: an instruction, the title, the question; the document
stays closed. ``in_context``: an instruction, the document's text, the question."""

CLOSED_BOOK_INSTRUCTION = (
    "Answer the question from memory. Give only the answer, in as few words as possible."
)

IN_CONTEXT_INSTRUCTION = (
    "Use the passage to answer the question. Give only the answer, in as few words as possible."
)


def closed_book_messages(question: str, *, title: str | None) -> tuple[Message, ...]:
    """Ask without showing the document.

    Args:
        question: The question as the table has it.
        title: Says what the question is about, since it was written next to its passage; None
            leaves the line out.
    """
    topic = f"Topic: {title}\n" if title else ""
    return (_user(f"{CLOSED_BOOK_INSTRUCTION}\n\n{topic}Question: {question}"),)


def in_context_messages(question: str, passage: str) -> tuple[Message, ...]:
    """Ask with the passage in the prompt: what a model that has not learned it can do."""
    return (_user(f"{IN_CONTEXT_INSTRUCTION}\n\nPassage: {passage}\n\nQuestion: {question}"),)


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
            return in_context_messages(question, document["text"])


def _user(content: str) -> Message:
    return {"role": "user", "content": content}
