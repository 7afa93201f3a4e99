"""The gap between the generator that sampled and the learner that trains.

Two programs, two numeric formats or two versions give one token two probabilities. Shapes: B =
sequences, T = token positions. Nothing here carries gradient.
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""|log ratio| is clamped here before exp(); exp(20) is 5e8, past any useful bound."""


def token_ratio(logprobs: Tensor, *, generator_logprobs: Tensor) -> Tensor:
    """Return ``[B, T]`` probability ratios learner / generator.

    Args:
        logprobs: ``[B, T]`` of the learner.
        generator_logprobs: ``[B, T]``.
    """
    return (logprobs - generator_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@torch.no_grad()
def truncated_weights(
    logprobs: Tensor, *, generator_logprobs: Tensor, truncate_at: float
) -> tuple[Tensor, Tensor]:
    """Return the weights ``min(learner / generator, truncate_at)`` and where they are cut.

    Args:
        logprobs: ``[B, T]`` of the learner.
        generator_logprobs: ``[B, T]``.
        truncate_at: Largest weight.

    Reference:
        Truncated importance sampling, https://fengyao.notion.site/off-policy-rl; verl
        ``docs/algo/rollout_corr.md``.
    """
    ratio = token_ratio(logprobs, generator_logprobs=generator_logprobs)
    return ratio.clamp(max=truncate_at), ratio > truncate_at


@torch.no_grad()
def geometric_mean_ratio(
    logprobs: Tensor, *, generator_logprobs: Tensor, loss_mask: Tensor
) -> Tensor:
    """Return ``[B, 1]``: ``exp(mean_t log(learner_t / generator_t))`` over a rollout's loss tokens.

    The mean, not the sum: a product of a thousand ratios of 0.999 is 0.37 and would condemn every
    long rollout. A row without loss tokens has ratio 1.

    Args:
        logprobs: ``[B, T]`` of the learner.
        generator_logprobs: ``[B, T]``.
        loss_mask: ``[B, T]`` bool.

    Reference:
        verl ``docs/algo/rollout_corr.md``, geometric sequence masking.
    """
    log_ratio = torch.where(loss_mask, logprobs - generator_logprobs, 0.0)
    count = loss_mask.sum(dim=1, keepdim=True).clamp(min=1)
    mean = log_ratio.sum(dim=1, keepdim=True) / count
    return mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
