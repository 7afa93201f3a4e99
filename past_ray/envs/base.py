"""What an environment is: it poses a prompt, takes an answer, and replies or ends."""

from dataclasses import dataclass, field
from typing import Protocol

from past_ray.tasks.examples import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvStep:
    """What an answer led to."""

    reward: float
    """Added to the rollout's reward."""

    is_done: bool
    """Whether the rollout ends here."""

    messages: list[Message] = field(default_factory=list[Message])
    """The environment's reply; the policy answers it unless ``is_done``."""


class Env(Protocol):
    """One attempt at one example; a new one is made for every rollout.

    A grading failure is an exception of ``step``. It excludes the rollout and is never turned into
    a reward.
    """

    def reset(self) -> list[Message]:
        """Return the prompt."""
        ...

    def step(self, answer: str) -> EnvStep:
        """Take the policy's answer to the messages returned last."""
        ...
