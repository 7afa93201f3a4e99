"""Metrics of parts of a step, put together to those of the step."""

import math
from collections.abc import Iterable, Mapping, Sequence

from past_ray.rl.types import RolloutGroup, RolloutStatus

MAX_SUFFIX = "_max"
"""Metrics with this ending merge by the largest, all others by their sum."""


def merge_metrics(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Merge the metrics of micro-batches or ranks.

    A mean is reported by each part as its sum over the count of the *whole* step, so that means
    merge by addition; a mean of means would weight tokens of short micro-batches more.

    Args:
        parts: One mapping a part; a name may be absent from some.
    """
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            elif name.endswith(MAX_SUFFIX):
                merged[name] = max(merged[name], value)
            else:
                merged[name] += value
    return merged


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Describe the rollouts of a step.

    Args:
        groups: All groups of the step, failed rollouts included.

    Returns:
        ``num_rollouts``, ``reward`` (mean over completed rollouts), ``num_tokens`` (all sampled),
        ``completion_tokens`` (mean per completed rollout), ``truncated_frac`` (last completion hit
        its limit, of completed ones), ``error_frac`` (of all rollouts) and ``constant_group_frac``
        (groups whose completed rollouts have equal rewards, so nothing to learn). A mean over
        nothing is NaN.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    completed = [rollout for rollout in rollouts if rollout.status is RolloutStatus.COMPLETED]
    rewards = [rollout.reward for rollout in completed if rollout.reward is not None]
    lengths = [sum(len(t.completion.token_ids) for t in rollout.turns) for rollout in completed]
    truncated = [r.turns[-1].completion.finish_reason == "length" for r in completed]
    sampled = [len(turn.completion.token_ids) for rollout in rollouts for turn in rollout.turns]
    return {
        "num_rollouts": float(len(rollouts)),
        "reward": _mean(rewards),
        "num_tokens": float(sum(sampled)),
        "completion_tokens": _mean(lengths),
        "truncated_frac": _mean(truncated),
        "error_frac": 1 - len(completed) / len(rollouts) if rollouts else math.nan,
        "constant_group_frac": _mean([_has_constant_reward(group) for group in groups]),
    }


def staleness_metrics(groups: Sequence[RolloutGroup], *, learner_version: int) -> dict[str, float]:
    """Return how old the completed rollouts of a step are, in optimizer steps.

    Args:
        groups: All groups of the step.
        learner_version: Optimizer steps the learner had taken before it trains on them.

    Returns:
        ``staleness_mean``, ``staleness_max`` and the histogram: ``staleness_0``, ``staleness_1``
        and so on count rollouts by the age of their first token.
    """
    ages = [
        learner_version - rollout.policy_version
        for group in groups
        for rollout in group.rollouts
        if rollout.status is RolloutStatus.COMPLETED
    ]
    histogram = {f"staleness_{age}": float(ages.count(age)) for age in sorted(set(ages))}
    return {
        "staleness_mean": _mean(ages),
        "staleness_max": float(max(ages, default=0)),
        **histogram,
    }


def _has_constant_reward(group: RolloutGroup) -> bool:
    completed = [r.reward for r in group.rollouts if r.status is RolloutStatus.COMPLETED]
    return len(set(completed)) <= 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
