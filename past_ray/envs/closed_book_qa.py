"""A question, one answer, one grade; the passage is never shown."""

from collections.abc import Callable
from dataclasses import dataclass

from past_ray.envs.base import EnvStep
from past_ray.tasks.examples import Message, QAExample
from past_ray.tasks.judging import Judge, JudgeGrader


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


@dataclass(frozen=True, slots=True)
class JudgedQA:
    """Makes environments whose answers a judge grades; can be sent to a worker if the judge can."""

    judge: Judge
    """Decides on every answer; where it cannot, the rollout is excluded."""

    def __call__(self, example: QAExample) -> ClosedBookQA:
        """Return a new environment."""
        return ClosedBookQA(example, grade=JudgeGrader(self.judge, example.question))
