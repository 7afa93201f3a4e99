"""What an environment is: it poses a prompt, takes an answer, and replies or ends."""

from dataclasses import dataclass, field
from typing import Protocol

from past_ray.tasks.examples import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvStep:
    """What an answer led to."""

    reward: float
    """This turn's reward; a rollout's reward is the sum over its turns."""

    is_done: bool
    """Whether the rollout ends here."""

    messages: list[Message] = field(default_factory=list[Message])
    """The environment's reply; the policy answers it unless ``is_done``."""

    reward_parts: dict[str, float] = field(default_factory=dict[str, float])
    """What ``reward`` is made of, by name; recorded, and summed over the turns of a rollout."""


class Env(Protocol):
    """One attempt at one example; a new one is made for every rollout.

    It is made, reset and stepped in threads beside the event loop, so it may wait for a network or
    a judge. Calls of one environment follow each other; those of different environments overlap.

    A failure is an exception, or no answer in time. It excludes the rollout and is never turned
    into a reward.
    """

    def reset(self) -> list[Message]:
        """Return the prompt."""
        ...

    def step(self, answer: str) -> EnvStep:
        """Take the policy's answer to the messages returned last."""
        ...
