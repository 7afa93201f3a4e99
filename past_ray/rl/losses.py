"""Policy losses and KL penalties: pure functions from tensors to ``(loss, metrics)``.

Shapes: B = sequences, T = token positions. Position ``t`` holds the token that ``logprobs[:, t]``
scores, so nothing here shifts.

Every loss divides a *sum* by ``num_loss_tokens``, the count over the whole optimizer step (all
micro-batches, all ranks). Micro-batches then add up to the full-batch loss exactly.

Metrics are detached and merge over micro-batches and ranks with ``rl.metrics.merge_metrics``:
those named ``*_max`` by the largest, all others by their sum.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""|log ratio| is clamped here before exp(); exp(20) is 5e8, past any useful clip."""


def token_mean(values: Tensor, *, loss_mask: Tensor, num_loss_tokens: int) -> Tensor:
    """Return the sum of ``values`` on loss tokens divided by ``num_loss_tokens``.

    Args:
        values: ``[B, T]``; what stands under a False mask is ignored, NaN included.
        loss_mask: ``[B, T]`` bool.
        num_loss_tokens: Loss tokens in the whole optimizer step, at least 1.
    """
    return torch.where(loss_mask, values, 0.0).sum() / num_loss_tokens


def ppo_clip_loss(
    logprobs: Tensor,
    *,
    generator_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    num_loss_tokens: int,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate, token level.

    ``L = -(1/N) sum_t min(w_t A_t, clip(w_t, 1 - clip_low, 1 + clip_high) A_t)`` with
    ``w_t = exp(logprobs_t - generator_logprobs_t)`` and ``N = num_loss_tokens``.

    Args:
        logprobs: ``[B, T]`` log-probabilities under the policy being trained; carries grad.
        generator_logprobs: ``[B, T]`` log-probabilities the generator sampled with.
        advantages: ``[B, T]`` the rollout's advantage on each of its tokens.
        loss_mask: ``[B, T]`` bool, True on sampled tokens, False on prompts, replies, padding.
        num_loss_tokens: Loss tokens in the whole optimizer step, at least 1.
        clip_low: Lower clip distance.
        clip_high: Upper clip distance; larger than ``clip_low`` is clip-higher.

    Returns:
        The scalar loss and the metrics ``policy_loss``, ``ratio_mean``, ``ratio_max``,
        ``clip_frac`` (tokens whose gradient the clip removed) and ``generator_kl`` (k3 estimate of
        the divergence from the generator, in nats).

    Reference:
        PPO https://arxiv.org/abs/1707.06347 eq. 7; clip-higher and token-level normalisation from
        DAPO https://arxiv.org/abs/2503.14476 eq. 8.

    Differs from the paper:
        The old policy is the generator itself, with the log-probabilities it reported, not a
        second forward pass of the learner.
    """
    log_ratio = torch.where(loss_mask, logprobs - generator_logprobs, 0.0)
    advantages = torch.where(loss_mask, advantages, 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages

    def mean(values: Tensor) -> Tensor:
        return token_mean(values, loss_mask=loss_mask, num_loss_tokens=num_loss_tokens)

    loss = mean(-torch.minimum(unclipped, clipped))
    with torch.no_grad():
        metrics = {
            "policy_loss": loss.detach(),
            "ratio_mean": mean(ratio),
            "ratio_max": torch.where(loss_mask, ratio, 0.0).amax(),
            "clip_frac": mean((clipped < unclipped).to(ratio.dtype)),
            "generator_kl": mean(kl_k3(-log_ratio, torch.zeros_like(log_ratio))),
        }
    return loss, metrics


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return ``log(p / q)`` per token for ``KL(p || q)``: unbiased, may be negative.

    As a loss its gradient is 0 on average, because the mean score of a distribution is 0: it
    reports the divergence but does not shrink it.

    Args:
        logprobs: ``[B, T]`` of the policy p that sampled the tokens.
        ref_logprobs: ``[B, T]`` of the reference q.

    Reference:
        http://joschu.net/blog/kl-approx.html
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return ``(log(p / q))^2 / 2`` per token: biased as a value, low variance.

    As a loss its mean gradient is that of ``KL(p || q)``. Arguments as in ``kl_k1``.

    Reference:
        http://joschu.net/blog/kl-approx.html
    """
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return ``q / p - 1 - log(q / p)`` per token: unbiased and never negative.

    As a loss its mean gradient is that of the forward divergence ``KL(q || p)``. Arguments as in
    ``kl_k1``.

    Reference:
        http://joschu.net/blog/kl-approx.html; GRPO https://arxiv.org/abs/2402.03300 eq. 4.
    """
    log_ratio = ref_logprobs - logprobs
    # expm1 keeps the digits that exp() - 1 loses near equality, where training spends its time.
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expm1() - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
}
"""Per-token estimators by the name that the configuration uses."""


def kl_penalty(
    logprobs: Tensor,
    *,
    ref_logprobs: Tensor,
    loss_mask: Tensor,
    num_loss_tokens: int,
    estimator: Literal["k1", "k2", "k3"],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``(1/N) sum_t k(logprobs_t, ref_logprobs_t)``, to be weighted and added to a loss.

    Args:
        logprobs: ``[B, T]`` of the policy being trained; carries grad.
        ref_logprobs: ``[B, T]`` of the frozen reference.
        loss_mask: ``[B, T]`` bool.
        num_loss_tokens: Loss tokens in the whole optimizer step, at least 1.
        estimator: Which of ``KL_ESTIMATORS``.

    Returns:
        The scalar penalty and the metric ``ref_kl``: the k3 estimate, whatever is minimised.

    Reference:
        GRPO https://arxiv.org/abs/2402.03300 eq. 3 and 4.

    Differs from the paper:
        Token mean over the optimizer step instead of a mean of per-rollout means, as in
        ``ppo_clip_loss``. Neither applies an importance weight to the penalty.
    """
    # Masked before the estimator: a NaN behind torch.where would still reach the gradient.
    policy = torch.where(loss_mask, logprobs, 0.0)
    reference = torch.where(loss_mask, ref_logprobs, 0.0)

    def mean(values: Tensor) -> Tensor:
        return token_mean(values, loss_mask=loss_mask, num_loss_tokens=num_loss_tokens)

    penalty = mean(KL_ESTIMATORS[estimator](policy, reference))
    with torch.no_grad():
        metrics = {"ref_kl": mean(kl_k3(policy, reference))}
    return penalty, metrics
