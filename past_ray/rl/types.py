"""Records of a rollout, from sampled tokens to training samples.

Shapes: T = token positions of one sequence.

A two-token answer to a three-token prompt, reward 1::

    Completion(token_ids=[7, 2], logprobs=[-0.1, -0.2], finish_reason="stop", policy_version=5)
    TrainSample(
        token_ids=[4, 5, 6, 7, 2],
        loss_mask=[False, False, False, True, True],
        generator_logprobs=[0, 0, 0, -0.1, -0.2],
        advantages=[0, 0, 0, 0.7, 0.7],
    )

Position ``t`` of every per-token list describes ``token_ids[t]`` itself; the shift by one between
logits and tokens happens in ``engine/packing.py`` and nowhere else.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


class RolloutStatus(StrEnum):
    """How a rollout ended."""

    COMPLETED = "completed"
    """It has a reward."""

    GENERATION_ERROR = "generation_error"
    """The generator returned no usable completion."""

    GRADING_ERROR = "grading_error"
    """The environment raised, hung or gave no finite reward; excluded from its group, never scored
    0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one completion is sampled. Truncated sampling (top-p, top-k) is not offered.

    It would renormalise the generator's log-probabilities but not the learner's.
    """

    temperature: float
    """0 is greedy."""

    max_new_tokens: int
    """Length limit of the completion."""

    seed: int | None = None
    """Seed of this completion alone; None is unseeded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Tokens of one generator call."""

    token_ids: list[int]
    """Sampled ids, the end-of-sequence token included."""

    logprobs: list[float]
    """Log-probabilities of the sampling distribution (temperature applied), one per token."""

    finish_reason: FinishReason
    """``stop``: ended by itself; ``length``: hit the limit; ``abort``: cut off."""

    policy_version: int
    """Version of the weights that sampled its first token, the oldest."""

    token_versions: list[int] = field(default_factory=list[int])
    """Version behind each token, where a weight sync came in between; empty if all are
    ``policy_version``."""

    num_cached_tokens: int = field(default=0, compare=False)
    """Prompt tokens that the engine did not compute, but took from its prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One completion and the tokens that were put before it."""

    prompt_ids: list[int]
    """Ids added before the completion: the whole prompt, later only the environment's reply."""

    completion: Completion
    """What the policy answered."""

    reward: float = 0.0
    """What the environment gave for this answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled attempt at one question."""

    rollout_id: str
    """Unique in a run: ``step/question_id/index``."""

    turns: list[Turn]
    """Empty when generation failed."""

    answer: str
    """Text of the last completion."""

    reward: float | None
    """Sum over its turns; None unless ``status`` is COMPLETED."""

    status: RolloutStatus
    """How it ended."""

    policy_version: int
    """Oldest version of the weights behind any of its turns; -1 when none was sampled."""

    error: str = ""
    """The error's text when it failed."""

    reward_parts: dict[str, float] = field(default_factory=dict[str, float])
    """What the reward is made of, summed over turns; empty if the environment names no parts."""

    generation_s: float = 0.0
    """Time spent waiting for completions."""

    environment_s: float = 0.0
    """Time spent waiting for the environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All rollouts of one question."""

    question_id: str
    """The question."""

    rollouts: list[Rollout]
    """``group_size`` of them, failed ones included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSample:
    """One rollout as the learner sees it. All lists have length T."""

    token_ids: list[int]
    """Prompts and completions of all turns."""

    loss_mask: list[bool]
    """True on sampled tokens, False on prompts and environment replies."""

    generator_logprobs: list[float]
    """0 where ``loss_mask`` is False."""

    advantages: list[float]
    """The rollout's advantage on its sampled tokens, 0 elsewhere."""
