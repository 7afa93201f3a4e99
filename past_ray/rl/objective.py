"""The one loss function of RL: every algorithm, correction and penalty, from one configuration.

Shapes: B = sequences, T = token positions; one row is one whole rollout, padded. Position ``t``
holds the token that ``logprobs[:, t]`` scores, so nothing here shifts.

Everything is a *sum* over tokens or rollouts divided by counts of the whole optimizer step
(``StepTotals``, over all micro-batches and ranks). Parts then add up to the full-batch loss and
gradient exactly, however samples are split, as long as no rollout is cut in two.

Metrics are detached and merge over micro-batches and ranks with ``rl.metrics.merge_metrics``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from past_ray.config.algorithm import (
    AlgorithmConfig,
    CISPOConfig,
    CorrectionConfig,
    DrGRPOConfig,
    GSPOConfig,
)
from past_ray.config.rl import RLConfig
from past_ray.rl.corrections import geometric_mean_ratio, token_ratio, truncated_weights
from past_ray.rl.kl import kl_k3, kl_terms
from past_ray.rl.losses import (
    cispo_terms,
    clipped_terms,
    constant_mean,
    rollout_mean,
    sequence_clipped_terms,
    token_mean,
)
from past_ray.rl.types import TrainSample

Metrics = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Denominators of one optimizer step, counted over all ranks before the samples are split."""

    num_loss_tokens: int
    """Tokens that train."""

    num_rollouts: int
    """Samples with at least one token that trains."""

    rollout_token_limit: int
    """Tokens that one completion may have; Dr. GRPO divides by it instead of by the length."""


def count_totals(samples: Sequence[TrainSample], *, rollout_token_limit: int) -> StepTotals:
    """Return the denominators of a step that trains on ``samples``.

    Args:
        samples: Those of all ranks.
        rollout_token_limit: ``rl.max_new_tokens``.
    """
    counts = [sum(sample.loss_mask) for sample in samples]
    return StepTotals(
        num_loss_tokens=sum(counts),
        num_rollouts=sum(count > 0 for count in counts),
        rollout_token_limit=rollout_token_limit,
    )


def rl_loss(
    logprobs: Tensor,
    *,
    generator_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    totals: StepTotals,
    rl: RLConfig,
) -> tuple[Tensor, Metrics]:
    """Return this part's share of the step's loss, and its share of the metrics.

    ``L = mean(weight * policy + kl.coefficient * KL - entropy_coefficient * H)``, where ``mean`` is
    the algorithm's own (``reduce_terms``), so that one normalisation holds for all three.

    Args:
        logprobs: ``[B, T]`` under the policy being trained; carries grad.
        generator_logprobs: ``[B, T]`` the generator sampled with.
        advantages: ``[B, T]``.
        loss_mask: ``[B, T]`` bool; what any other tensor holds where it is False is ignored, NaN
            included.
        ref_logprobs: ``[B, T]`` under the reference; None leaves the KL penalty out.
        entropy: ``[B, T]`` in nats; carries grad only if ``rl.entropy_coefficient`` is above 0.
        totals: Of the whole optimizer step, with at least one loss token.
        rl: Names the algorithm, penalty and correction.

    Returns:
        The scalar loss, and as token means over the step unless said otherwise: ``loss`` and
        ``policy_loss`` (as minimised), ``ratio_mean`` and ``ratio_max`` (learner / generator),
        ``generator_kl`` (k3 estimate of the divergence from the generator, in nats), ``clip_frac``
        (tokens whose gradient the clip removed or, in CISPO, whose weight it bounded), ``ref_kl``
        (k3, whatever is minimised) and ``entropy`` if given, and those of ``correction_weights``.
    """
    # Before any arithmetic: a NaN behind a later torch.where would still reach the gradient.
    clean = partial(_zero_outside, loss_mask)
    mean = partial(reduce_terms, loss_mask=loss_mask, totals=totals, algorithm=rl.algorithm)
    logprobs, generator_logprobs = clean(logprobs), clean(generator_logprobs)
    current = logprobs.detach()
    terms, is_clipped = _policy_terms(
        logprobs,
        # Every batch gets one optimizer step, so the policy before the step is the current one.
        anchor_logprobs=generator_logprobs if rl.correction.anchor == "generator" else current,
        advantages=clean(advantages),
        loss_mask=loss_mask,
        algorithm=rl.algorithm,
    )
    weights, trains, metrics = correction_weights(
        current,
        generator_logprobs=generator_logprobs,
        loss_mask=loss_mask,
        totals=totals,
        correction=rl.correction,
    )
    policy = terms * weights * trains
    penalty = torch.zeros_like(policy)
    if ref_logprobs is not None:
        reference = clean(ref_logprobs)
        is_weighted = rl.kl.gradient == "importance_weighted"
        penalty = penalty + rl.kl.coefficient * kl_terms(
            logprobs,
            ref_logprobs=reference,
            generator_logprobs=generator_logprobs if is_weighted else None,
            estimator=rl.kl.estimator,
        )
        metrics["ref_kl"] = token_mean(kl_k3(current, reference), totals.num_loss_tokens)
    if entropy is not None:
        bonus = clean(entropy)
        penalty = penalty - rl.entropy_coefficient * bonus
        metrics["entropy"] = token_mean(bonus.detach(), totals.num_loss_tokens)
    loss = mean(policy + penalty * trains)
    metrics |= {"loss": loss.detach(), "policy_loss": mean(policy.detach())}
    metrics["clip_frac"] = token_mean(is_clipped.to(current.dtype), totals.num_loss_tokens)
    return loss, metrics | _gap_metrics(current, generator_logprobs, loss_mask, totals)


def reduce_terms(
    terms: Tensor, *, loss_mask: Tensor, totals: StepTotals, algorithm: AlgorithmConfig
) -> Tensor:
    """Return the algorithm's mean of per-token terms.

    GRPO, DAPO and CISPO weigh tokens equally, GSPO rollouts, and Dr. GRPO divides by
    ``num_rollouts * rollout_token_limit``, whatever the lengths.

    Args:
        terms: ``[B, T]``, 0 outside ``loss_mask``.
        loss_mask: ``[B, T]`` bool.
        totals: Of the whole optimizer step.
        algorithm: Whose mean.
    """
    match algorithm:
        case GSPOConfig():
            return rollout_mean(terms, loss_mask=loss_mask, num_rollouts=totals.num_rollouts)
        case DrGRPOConfig():
            return constant_mean(
                terms,
                num_rollouts=totals.num_rollouts,
                rollout_token_limit=totals.rollout_token_limit,
            )
        case _:
            return token_mean(terms, totals.num_loss_tokens)


def correction_weights(
    logprobs: Tensor,
    *,
    generator_logprobs: Tensor,
    loss_mask: Tensor,
    totals: StepTotals,
    correction: CorrectionConfig,
) -> tuple[Tensor, Tensor, Metrics]:
    """Return what corrects the gap to the generator: a weight per token and a mask per rollout.

    A masked rollout trains nothing, neither policy nor penalties, but still counts in every
    denominator: one that was sampled badly must not make the others weigh more.

    Args:
        logprobs: ``[B, T]``, detached, 0 outside ``loss_mask``.
        generator_logprobs: ``[B, T]``, 0 outside ``loss_mask``.
        loss_mask: ``[B, T]`` bool.
        totals: Of the whole optimizer step.
        correction: Which of the two apply.

    Returns:
        Weights ``[B, T]`` of the policy terms, bool ``[B, 1]`` that is False on masked rollouts,
        and the metrics of what is switched on: ``truncated_weight_frac`` (of tokens, weight cut at
        ``truncate_at``) and ``masked_sequence_frac`` (of rollouts).
    """
    metrics: Metrics = {}
    weights = torch.ones_like(logprobs)
    if correction.truncate_at is not None:
        weights, is_truncated = truncated_weights(
            logprobs, generator_logprobs=generator_logprobs, truncate_at=correction.truncate_at
        )
        metrics["truncated_weight_frac"] = token_mean(
            (is_truncated & loss_mask).to(logprobs.dtype), totals.num_loss_tokens
        )
    low, high = correction.min_sequence_ratio, correction.max_sequence_ratio
    trains = torch.ones_like(loss_mask[:, :1])
    if low is not None or high is not None:
        ratio = geometric_mean_ratio(
            logprobs, generator_logprobs=generator_logprobs, loss_mask=loss_mask
        )
        trains = (ratio >= (low or 0.0)) & (ratio <= (high or torch.inf))
        # An empty row has ratio 1, which every pair of bounds allows.
        metrics["masked_sequence_frac"] = (~trains).sum().to(logprobs.dtype) / totals.num_rollouts
    return weights, trains, metrics


def _policy_terms(
    logprobs: Tensor,
    *,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    algorithm: AlgorithmConfig,
) -> tuple[Tensor, Tensor]:
    match algorithm:
        case CISPOConfig():
            return cispo_terms(
                logprobs,
                anchor_logprobs=anchor_logprobs,
                advantages=advantages,
                max_ratio=algorithm.max_ratio,
            )
        case GSPOConfig():
            return sequence_clipped_terms(
                logprobs,
                anchor_logprobs=anchor_logprobs,
                advantages=advantages,
                loss_mask=loss_mask,
                clip_low=algorithm.clip_low,
                clip_high=algorithm.clip_high,
            )
        case _:
            return clipped_terms(
                logprobs,
                anchor_logprobs=anchor_logprobs,
                advantages=advantages,
                clip_low=algorithm.clip_low,
                clip_high=algorithm.clip_high,
            )


def _gap_metrics(
    logprobs: Tensor, generator_logprobs: Tensor, loss_mask: Tensor, totals: StepTotals
) -> Metrics:
    """Describe how far the learner is from the generator."""
    ratio = _zero_outside(loss_mask, token_ratio(logprobs, generator_logprobs=generator_logprobs))
    return {
        "ratio_mean": token_mean(ratio, totals.num_loss_tokens),
        "ratio_max": ratio.amax(),
        "generator_kl": token_mean(kl_k3(generator_logprobs, logprobs), totals.num_loss_tokens),
    }


def _zero_outside(loss_mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(loss_mask, values, 0.0)
