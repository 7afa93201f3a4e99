"""From groups of rollouts to training samples, shared among ranks; owns the loss mask.

``groups -> build_train_samples -> count_totals -> split_over_ranks -> learner``

Masks come from lengths alone, never from token values: the padding id may be the end-of-sequence
id, which trains.
"""

import math
from collections.abc import Sequence

import torch

from past_ray.config.algorithm import DAPOConfig, DrGRPOConfig
from past_ray.config.rl import RLConfig
from past_ray.errors import DataError
from past_ray.rl.advantages import group_advantages, turn_advantages
from past_ray.rl.reward_shaping import overlong_penalty
from past_ray.rl.types import Rollout, RolloutGroup, RolloutStatus, TrainSample, Turn


def build_train_samples(groups: Sequence[RolloutGroup], *, rl: RLConfig) -> list[TrainSample]:
    """Turn the completed rollouts of each group into samples, with group-relative advantages.

    Rollouts that failed are left out before the baseline is taken. A completion that hit its
    length limit trains like any other: its reward decides. A completed rollout without a sampled
    token counts for the baseline and gives no sample.

    A group in which nothing differs has advantage 0 everywhere. It is dropped, and is then missing
    from the step's denominators too, which count only tokens that carry a gradient; unless there is
    a KL penalty or an entropy bonus, which still act on it.

    Args:
        groups: Finished groups.
        rl: Names the estimator of advantages, the shaping of rewards and the penalties.

    Raises:
        DataError: If a rollout lacks its reward, its prompt or log-probabilities, or if turns are
            compared and their rewards do not add up to the rollout's.
    """
    keeps_constant = rl.kl.coefficient > 0 or rl.entropy_coefficient > 0
    samples: list[TrainSample] = []
    for group in groups:
        completed = _completed(group)
        advantages = _advantages(completed, rl)
        if not keeps_constant and _is_zero(advantages):
            continue
        samples += [
            build_train_sample(rollout, advantages=row)
            for rollout, row in zip(completed, advantages, strict=True)
            if any(turn.completion.token_ids for turn in rollout.turns)
        ]
    return samples


def is_constant_group(group: RolloutGroup, *, rl: RLConfig) -> bool:
    """Return whether nothing that is compared differs, so that the policy cannot learn from it.

    Compared are shaped rewards (or returns, per turn), as exact numbers. A group with fewer than
    two completed rollouts is constant.
    """
    return _is_zero(_advantages(_completed(group), rl))


def build_train_sample(rollout: Rollout, *, advantages: Sequence[float]) -> TrainSample:
    """Lay out all turns of a rollout as one sequence, with the very ids that were sampled.

    Args:
        rollout: At least one turn.
        advantages: One per turn, given to each of its sampled tokens.

    Raises:
        DataError: If the first turn has no prompt, or log-probabilities are missing.
    """
    if not rollout.turns[0].prompt_ids:
        raise DataError(
            f"rollout {rollout.rollout_id!r} must start with prompt tokens, found none: nothing "
            "predicts its first token. Give the prompt at least a start token."
        )
    token_ids: list[int] = []
    loss_mask: list[bool] = []
    generator_logprobs: list[float] = []
    token_advantages: list[float] = []
    for turn, advantage in zip(rollout.turns, advantages, strict=True):
        completion = turn.completion
        if len(completion.token_ids) != len(completion.logprobs):
            raise DataError(
                f"rollout {rollout.rollout_id!r} must have one log-probability per sampled token, "
                f"got {len(completion.logprobs)} for {len(completion.token_ids)}. Check the "
                "generator's log-probability setting."
            )
        num_prompt, num_sampled = len(turn.prompt_ids), len(completion.token_ids)
        token_ids += [*turn.prompt_ids, *completion.token_ids]
        loss_mask += [False] * num_prompt + [True] * num_sampled
        generator_logprobs += [0.0] * num_prompt + completion.logprobs
        token_advantages += [0.0] * num_prompt + [advantage] * num_sampled
    return TrainSample(
        token_ids=token_ids,
        loss_mask=loss_mask,
        generator_logprobs=generator_logprobs,
        advantages=token_advantages,
    )


def split_over_ranks(samples: Sequence[TrainSample], num_ranks: int) -> list[list[TrainSample]]:
    """Share samples among ranks so that their token counts are about equal.

    Longest first, each to the rank with the fewest tokens so far; within a rank the given order
    is kept. A rank may stay empty: the learner evens out the number of passes.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    longest_first = sorted(range(len(samples)), key=lambda i: (-len(samples[i].token_ids), i))
    for index in longest_first:
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += len(samples[index].token_ids)
    return [[samples[index] for index in sorted(share)] for share in shares]


def _completed(group: RolloutGroup) -> list[Rollout]:
    return [r for r in group.rollouts if r.status is RolloutStatus.COMPLETED]


def _advantages(completed: Sequence[Rollout], rl: RLConfig) -> list[list[float]]:
    """Return one advantage per turn of each rollout."""
    if not completed:
        return []
    scale_by_std = not isinstance(rl.algorithm, DrGRPOConfig)
    penalties = [_turn_penalties(rollout, rl) for rollout in completed]
    if rl.advantage == "turn":
        shaped = [
            [turn.reward + penalty for turn, penalty in zip(_graded_turns(r), row, strict=True)]
            for r, row in zip(completed, penalties, strict=True)
        ]
        return turn_advantages(shaped, scale_by_std=scale_by_std)
    totals = [math.fsum([_reward(r), *row]) for r, row in zip(completed, penalties, strict=True)]
    compared = torch.tensor(totals, dtype=torch.float64)
    advantages = group_advantages(compared, scale_by_std=scale_by_std).tolist()
    return [[a] * len(r.turns) for a, r in zip(advantages, completed, strict=True)]


def _is_zero(advantages: Sequence[Sequence[float]]) -> bool:
    return not any(advantage for row in advantages for advantage in row)


def _turn_penalties(rollout: Rollout, rl: RLConfig) -> list[float]:
    """Return what each turn loses by its length."""
    overlong = rl.algorithm.overlong if isinstance(rl.algorithm, DAPOConfig) else None
    if overlong is None:
        return [0.0] * len(rollout.turns)
    return [
        overlong_penalty(
            len(turn.completion.token_ids),
            max_new_tokens=rl.max_new_tokens,
            buffer_tokens=overlong.buffer_tokens,
            penalty=overlong.penalty,
        )
        for turn in rollout.turns
    ]


def _reward(rollout: Rollout) -> float:
    if rollout.reward is None or not math.isfinite(rollout.reward):
        raise DataError(
            f"rollout {rollout.rollout_id!r} must have a finite reward because its status is "
            f"{rollout.status.value!r}, found {rollout.reward}. Mark it as failed or grade it."
        )
    return rollout.reward


def _graded_turns(rollout: Rollout) -> list[Turn]:
    """Return the turns, whose rewards must make up the rollout's."""
    total = math.fsum(turn.reward for turn in rollout.turns)
    if not math.isclose(total, _reward(rollout), rel_tol=1e-6, abs_tol=1e-6):
        raise DataError(
            f"rewards of the turns of rollout {rollout.rollout_id!r} must add up to its reward "
            f"{rollout.reward}, found {total}. Give rewards per turn, or set rl.advantage=rollout."
        )
    return rollout.turns
