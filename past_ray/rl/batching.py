"""From groups of rollouts to padded micro-batches; owns the loss mask.

``groups -> build_train_samples -> split_over_ranks -> micro_batches -> learner``

Masks come from lengths alone, never from token values: the padding id may be the end-of-sequence
id, which trains. Padding is on the right, where causal attention cannot see it.

Shapes: B = sequences, T = token positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from past_ray.errors import DataError
from past_ray.rl.advantages import constant_groups, group_advantages
from past_ray.rl.types import Rollout, RolloutGroup, RolloutStatus, TrainSample

PADDING_ID = 0
"""Any valid id does; nothing reads what is under the mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Samples of one forward pass, padded on the right.

    Two samples of 3 and 2 tokens, the last token of each sampled::

        token_ids       [[4, 5, 7], [4, 2, 0]]
        attention_mask  [[1, 1, 1], [1, 1, 0]]
        loss_mask       [[F, F, T], [F, T, F]]
        indices         [0, 3]
    """

    token_ids: Tensor  # [B, T]
    """Padded with ``PADDING_ID``."""

    attention_mask: Tensor  # [B, T]
    """1 on tokens, 0 on padding."""

    loss_mask: Tensor  # [B, T]
    """True on sampled tokens."""

    generator_logprobs: Tensor  # [B, T]
    """0 where ``loss_mask`` is False."""

    advantages: Tensor  # [B, T]
    """0 where ``loss_mask`` is False."""

    indices: list[int]
    """Place of each row in the sequence of samples that was batched; empty for a filler."""

    first_loss_position: int
    """No token before it trains in any row; T if none trains at all."""


def build_train_samples(
    groups: Sequence[RolloutGroup], *, scale_by_std: bool, keep_constant_groups: bool
) -> list[TrainSample]:
    """Turn the completed rollouts of each group into samples, with group-relative advantages.

    Rollouts that failed are left out before the baseline is taken. A completion that hit its
    length limit trains like any other: its reward decides. A completed rollout without a sampled
    token counts for the baseline and gives no sample.

    A group whose rewards are all equal has advantage 0 everywhere. Dropped, it is missing from
    ``count_loss_tokens`` too, which then counts only tokens that carry a gradient. With a KL
    penalty it must be kept, because the penalty still acts on it.

    Args:
        groups: Finished groups.
        scale_by_std: As in ``group_advantages``.
        keep_constant_groups: Set it when the KL coefficient is above 0.

    Raises:
        DataError: If a rollout lacks its reward, its prompt or log-probabilities.
    """
    samples: list[TrainSample] = []
    for group in groups:
        completed = [r for r in group.rollouts if r.status is RolloutStatus.COMPLETED]
        rewards = torch.tensor([_reward(rollout) for rollout in completed], dtype=torch.float64)
        if not completed or (not keep_constant_groups and bool(constant_groups(rewards))):
            continue
        advantages = group_advantages(rewards, scale_by_std=scale_by_std).tolist()
        for rollout, advantage in zip(completed, advantages, strict=True):
            if any(turn.completion.token_ids for turn in rollout.turns):
                samples.append(build_train_sample(rollout, advantage=advantage))
    return samples


def build_train_sample(rollout: Rollout, *, advantage: float) -> TrainSample:
    """Lay out all turns of a rollout as one sequence, with the very ids that were sampled.

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
    for turn in rollout.turns:
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
    return TrainSample(
        token_ids=token_ids,
        loss_mask=loss_mask,
        generator_logprobs=generator_logprobs,
        advantages=[advantage if is_sampled else 0.0 for is_sampled in loss_mask],
    )


def count_loss_tokens(samples: Sequence[TrainSample]) -> int:
    """Return the tokens that train: the denominator of every loss of the step."""
    return sum(sum(sample.loss_mask) for sample in samples)


def split_over_ranks(samples: Sequence[TrainSample], num_ranks: int) -> list[list[TrainSample]]:
    """Share samples among ranks so that their token counts are about equal.

    Longest first, each to the rank with the fewest tokens so far; within a rank the given order
    is kept. A rank may stay empty. The learner evens out the number of micro-batches.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in _longest_first(samples):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += len(samples[index].token_ids)
    return [[samples[index] for index in sorted(share)] for share in shares]


def micro_batches(samples: Sequence[TrainSample], *, max_tokens: int) -> list[MicroBatch]:
    """Pad samples of similar length together, at most ``max_tokens`` padded tokens a batch.

    Longest first, so that a run which lacks memory fails in its first pass. A sample longer than
    the budget gets a micro-batch of its own.
    """
    batches: list[MicroBatch] = []
    rows: list[int] = []
    for index in _longest_first(samples):
        if rows and (len(rows) + 1) * len(samples[rows[0]].token_ids) > max_tokens:
            batches.append(_pad(samples, rows))
            rows = []
        rows.append(index)
    if rows:
        batches.append(_pad(samples, rows))
    return batches


def filler_micro_batch() -> MicroBatch:
    """Return a micro-batch without loss tokens, for a rank that has less work than the others.

    Every rank must run the same number of forward passes, or sharded layers wait forever.
    """
    return MicroBatch(
        token_ids=torch.full((1, 2), PADDING_ID),
        attention_mask=torch.ones(1, 2, dtype=torch.long),
        loss_mask=torch.zeros(1, 2, dtype=torch.bool),
        generator_logprobs=torch.zeros(1, 2),
        advantages=torch.zeros(1, 2),
        indices=[],
        first_loss_position=2,
    )


def _reward(rollout: Rollout) -> float:
    if rollout.reward is None:
        raise DataError(
            f"rollout {rollout.rollout_id!r} must have a reward because its status is "
            f"{rollout.status.value!r}, found None. Mark it as failed or grade it."
        )
    return rollout.reward


def _longest_first(samples: Sequence[TrainSample]) -> list[int]:
    return sorted(range(len(samples)), key=lambda index: (-len(samples[index].token_ids), index))


def _pad(samples: Sequence[TrainSample], indices: list[int]) -> MicroBatch:
    rows = [samples[index] for index in indices]
    length = max(len(row.token_ids) for row in rows)
    first_positions = [row.loss_mask.index(True) for row in rows if any(row.loss_mask)]
    lengths = torch.tensor([len(row.token_ids) for row in rows])
    return MicroBatch(
        token_ids=_stack([row.token_ids for row in rows], length, torch.long),
        attention_mask=(torch.arange(length) < lengths.unsqueeze(1)).long(),
        loss_mask=_stack([row.loss_mask for row in rows], length, torch.bool),
        generator_logprobs=_stack([row.generator_logprobs for row in rows], length, torch.float32),
        advantages=_stack([row.advantages for row in rows], length, torch.float32),
        indices=list(indices),
        first_loss_position=min(first_positions, default=length),
    )


def _stack(rows: Sequence[Sequence[float]], length: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([[*row, *[PADDING_ID] * (length - len(row))] for row in rows], dtype=dtype)
