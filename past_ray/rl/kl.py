"""KL penalties towards a reference: per-token estimators and their gradients.

Shapes: B = sequences, T = token positions. ``p`` is the policy being trained, ``q`` the reference,
``g`` the generator that sampled the tokens.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from past_ray.rl.corrections import MAX_LOG_RATIO, token_ratio

KLEstimator = Literal["k1", "k2", "k3"]


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return ``log(p / q)`` per token for ``KL(p || q)``: unbiased, may be negative.

    Differentiated as it stands its gradient is 0 on average, because the mean score of a
    distribution is 0: it reports the divergence but does not shrink it.

    Args:
        logprobs: ``[B, T]`` of the policy p that sampled the tokens.
        ref_logprobs: ``[B, T]`` of the reference q.

    Reference:
        http://joschu.net/blog/kl-approx.html
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return ``(log(p / q))^2 / 2`` per token: biased as a value, low variance.

    Differentiated as it stands its mean gradient is that of ``KL(p || q)``. Arguments as in
    ``kl_k1``.

    Reference:
        http://joschu.net/blog/kl-approx.html
    """
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return ``q / p - 1 - log(q / p)`` per token: unbiased and never negative.

    Differentiated as it stands its mean gradient is that of the forward divergence ``KL(q || p)``.
    Arguments as in ``kl_k1``.

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


def kl_terms(
    logprobs: Tensor,
    *,
    ref_logprobs: Tensor,
    generator_logprobs: Tensor | None,
    estimator: KLEstimator,
) -> Tensor:
    """Return ``[B, T]`` penalties whose value is the estimator and whose gradient is chosen.

    Without ``generator_logprobs`` the estimator is differentiated as it stands (see there what it
    then descends). With them the gradient of every estimator is

    ``w_t log(p_t / q_t) grad log p_t`` with ``w_t = p_t / g_t``, detached,

    whose mean over tokens that ``g`` sampled is the gradient of ``KL(p || q)`` exactly. It is what
    ``w k3`` gives if ``w`` is differentiated too: ``k3 + d k3 / d log p = log(p / q)``; what k1
    gives without the zero-mean ``+ 1``; and what k2 gives with ``w`` held fixed.

    It is the divergence of each next-token distribution at the prefixes that were sampled: how the
    policy changes which prefixes it reaches is left out, as in GRPO.

    Args:
        logprobs: ``[B, T]``; carries grad.
        ref_logprobs: ``[B, T]`` of the frozen reference.
        generator_logprobs: ``[B, T]`` the tokens were sampled with, or None.
        estimator: Which of ``KL_ESTIMATORS``.

    Reference:
        DeepSeek-V3.2 https://arxiv.org/abs/2512.02556 section 3.1, the unbiased KL estimate.
    """
    values = KL_ESTIMATORS[estimator](logprobs, ref_logprobs)
    if generator_logprobs is None:
        return values
    current = logprobs.detach()
    weight = token_ratio(current, generator_logprobs=generator_logprobs)
    # Zero in value, one in gradient by log p.
    score = logprobs - current
    return values.detach() + weight * kl_k1(current, ref_logprobs) * score
