"""One question as an environment needs it."""

from dataclasses import dataclass
from typing import TypedDict


class Message(TypedDict):
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QAExample:
    """A question with its prompt and its gold answer.

    Example: ``QAExample(question_id="target/p3/city", messages=({"role": "user", "content":
    "where does ada smith live ?"},), answer="oslo")``
    """

    question_id: str
    """Unique over all tables of a run."""

    messages: tuple[Message, ...]
    """The prompt; a chat template turns it into ids."""

    answer: str
    """Gold answer; used by the grader only, never shown to the policy."""

    question: str = ""
    """The question alone, for judges that read it; rules do not."""
