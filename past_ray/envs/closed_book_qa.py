"""A question, one answer, one grade; the passage is never shown."""

from collections.abc import Callable

from past_ray.envs.base import EnvStep
from past_ray.tasks.examples import Message, QAExample


class ClosedBookQA:
    """Single-turn environment over a ``QAExample``."""

    def __init__(self, example: QAExample, grade: Callable[[str, str], float]) -> None:
        """Keep the example; ``grade(answer, gold_answer)`` returns the reward."""
        self._example = example
        self._grade = grade

    def reset(self) -> list[Message]:
        """Return the example's own messages."""
        return list(self._example.messages)

    def step(self, answer: str) -> EnvStep:
        """Grade the answer and end."""
        return EnvStep(reward=float(self._grade(answer, self._example.answer)), is_done=True)
