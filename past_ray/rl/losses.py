"""Policy losses: what one token costs, and how tokens are averaged.

Shapes: B = sequences, T = token positions; one row is one rollout. Position ``t`` holds the token
that ``logprobs[:, t]`` scores, so nothing here shifts. Outside the loss mask all inputs are 0
(``rl.objective.rl_loss`` sees to it), and so are all terms.

``anchor_logprobs`` are those of the policy in the denominator of the ratio
``w_t = exp(logprobs_t - anchor_logprobs_t)``. Each ``*_terms`` returns the terms ``[B, T]`` and a
bool ``[B, T]`` of tokens that the bound acted on.

Each ``*_mean`` divides a *sum* by counts of the whole optimizer step (all micro-batches, all
ranks), so that micro-batches add up.
"""

import torch
from torch import Tensor

from past_ray.rl.corrections import MAX_LOG_RATIO


def clipped_terms(
    logprobs: Tensor,
    *,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Return ``-min(w_t A_t, clip(w_t, 1 - clip_low, 1 + clip_high) A_t)``: GRPO, Dr. GRPO, DAPO.

    Args:
        logprobs: ``[B, T]`` of the policy being trained; carries grad.
        anchor_logprobs: ``[B, T]``, without grad.
        advantages: ``[B, T]``.
        clip_low: Lower clip distance.
        clip_high: Upper clip distance; larger than ``clip_low`` is clip-higher.

    Reference:
        PPO https://arxiv.org/abs/1707.06347 eq. 7; GRPO https://arxiv.org/abs/2402.03300 eq. 3;
        clip-higher DAPO https://arxiv.org/abs/2503.14476 eq. 8.
    """
    return _clip(
        logprobs - anchor_logprobs, advantages=advantages, clip_low=clip_low, clip_high=clip_high
    )


def sequence_clipped_terms(
    logprobs: Tensor,
    *,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Return the clipped terms of GSPO, whose ratio is one for all tokens of a rollout.

    ``s = exp(mean_t log w_t)`` in value; its gradient on token t is that of ``s log p_t``. The mean
    of the terms over a rollout has the gradient of ``min(s A, clip(s) A)``, and advantages may
    differ by token.

    Args:
        logprobs: ``[B, T]`` of the policy being trained; carries grad.
        anchor_logprobs: ``[B, T]``, without grad.
        advantages: ``[B, T]``.
        loss_mask: ``[B, T]`` bool.
        clip_low: Lower clip distance.
        clip_high: Upper clip distance.

    Reference:
        GSPO https://arxiv.org/abs/2507.18071 eq. 5 to 7; per token, GSPO-token, eq. 13 and 14.
    """
    current = logprobs.detach()
    count = loss_mask.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (current - anchor_logprobs).sum(dim=1, keepdim=True) / count
    return _clip(
        torch.where(loss_mask, mean, 0.0) + (logprobs - current),
        advantages=advantages,
        clip_low=clip_low,
        clip_high=clip_high,
    )


def cispo_terms(
    logprobs: Tensor, *, anchor_logprobs: Tensor, advantages: Tensor, max_ratio: float
) -> tuple[Tensor, Tensor]:
    """Return ``-min(w_t, max_ratio) A_t log p_t`` with the weight detached: CISPO.

    A token beyond the bound keeps its gradient, only its weight is held.

    Args:
        logprobs: ``[B, T]`` of the policy being trained; carries grad.
        anchor_logprobs: ``[B, T]``, without grad.
        advantages: ``[B, T]``.
        max_ratio: Upper bound of the weight.

    Reference:
        MiniMax-M1 https://arxiv.org/abs/2506.13585 eq. 4 and 5, without a lower bound as there.
    """
    log_ratio = logprobs.detach() - anchor_logprobs
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return -ratio.clamp(max=max_ratio) * advantages * logprobs, ratio > max_ratio


def token_mean(terms: Tensor, num_loss_tokens: int) -> Tensor:
    """Return the sum of ``terms`` divided by the step's loss tokens: all tokens weigh the same.

    Reference:
        DAPO https://arxiv.org/abs/2503.14476 section 3.3; verl's default for GRPO.
    """
    return terms.sum() / num_loss_tokens


def rollout_mean(terms: Tensor, *, loss_mask: Tensor, num_rollouts: int) -> Tensor:
    """Return the mean over rollouts of each one's mean over its tokens.

    Args:
        terms: ``[B, T]``.
        loss_mask: ``[B, T]`` bool; a row without a True adds nothing.
        num_rollouts: Rollouts with a loss token in the whole optimizer step.

    Reference:
        GRPO https://arxiv.org/abs/2402.03300 eq. 3; GSPO https://arxiv.org/abs/2507.18071 eq. 5.
    """
    return (terms.sum(dim=1) / loss_mask.sum(dim=1).clamp(min=1)).sum() / num_rollouts


def constant_mean(terms: Tensor, *, num_rollouts: int, rollout_token_limit: int) -> Tensor:
    """Return the sum of ``terms`` over ``num_rollouts * rollout_token_limit``.

    No length is divided by, so a long wrong answer is not punished less per token than a short one.

    Args:
        terms: ``[B, T]``.
        num_rollouts: Rollouts with a loss token in the whole optimizer step.
        rollout_token_limit: Tokens that one completion may have.

    Reference:
        Dr. GRPO https://arxiv.org/abs/2503.20783 section 3.2 and listing 1.
    """
    return terms.sum() / (num_rollouts * rollout_token_limit)


def _clip(
    log_ratio: Tensor, *, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(unclipped, clipped), clipped < unclipped
