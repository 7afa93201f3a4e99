"""What GRPO and its relatives minimise: one variant per published algorithm.

The class defaults of a variant are its published setting, so any key in a YAML file is visibly the
user's own. Losses are in ``rl/losses.py``, advantages in ``rl/advantages.py``.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from past_ray.config.base import StrictConfig


class GRPOConfig(StrictConfig):
    """GRPO in the form of verl, the paper's trainer: token mean, sample deviation.

    Reference: https://arxiv.org/abs/2402.03300.
    """

    kind: Literal["grpo"] = "grpo"
    """Selects this algorithm."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """Lower clip distance of the token's probability ratio."""

    clip_high: float = Field(default=0.2, gt=0)
    """Upper clip distance."""


class DrGRPOConfig(StrictConfig):
    """Dr. GRPO: no division by the deviation, sums over tokens divided by a constant.

    Reference: https://arxiv.org/abs/2503.20783.
    """

    kind: Literal["dr_grpo"] = "dr_grpo"
    """Selects this algorithm."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """Lower clip distance of the token's probability ratio."""

    clip_high: float = Field(default=0.2, gt=0)
    """Upper clip distance."""


class OverlongConfig(StrictConfig):
    """DAPO's soft punishment of answers that come close to the length limit."""

    buffer_tokens: int = Field(ge=1)
    """The reward falls linearly over this many tokens before ``rl.max_new_tokens``."""

    penalty: float = Field(default=1.0, gt=0)
    """Taken from the reward at the limit."""


class DAPOConfig(StrictConfig):
    """DAPO: clip-higher, token mean, dynamic sampling, overlong shaping.

    Reference: https://arxiv.org/abs/2503.14476.
    """

    kind: Literal["dapo"] = "dapo"
    """Selects this algorithm."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """Lower clip distance of the token's probability ratio."""

    clip_high: float = Field(default=0.28, gt=0)
    """Upper clip distance."""

    max_draws: int = Field(default=3, ge=1)
    """Dynamic sampling: a step draws at most this many times its questions until it has enough
    groups whose rewards differ; 1 switches it off."""

    overlong: OverlongConfig | None = None
    """Soft punishment of long answers; None switches it off."""


class GSPOConfig(StrictConfig):
    """GSPO: one ratio per rollout, the geometric mean over its tokens; mean of rollout means.

    Reference: https://arxiv.org/abs/2507.18071.
    """

    kind: Literal["gspo"] = "gspo"
    """Selects this algorithm."""

    clip_low: float = Field(default=3e-4, gt=0, lt=1)
    """Lower clip distance of the rollout's ratio."""

    clip_high: float = Field(default=4e-4, gt=0)
    """Upper clip distance."""


class CISPOConfig(StrictConfig):
    """CISPO: REINFORCE weighted by a clipped, detached ratio; no token loses its gradient.

    Reference: MiniMax-M1, https://arxiv.org/abs/2506.13585.
    """

    kind: Literal["cispo"] = "cispo"
    """Selects this algorithm."""

    max_ratio: float = Field(default=5.0, gt=0)
    """Upper bound of the weight."""


AlgorithmConfig = Annotated[
    GRPOConfig | DrGRPOConfig | DAPOConfig | GSPOConfig | CISPOConfig, Field(discriminator="kind")
]


class KLConfig(StrictConfig):
    """The penalty that keeps the policy near a reference."""

    coefficient: float = Field(default=0.001, ge=0)
    """Weight of the penalty; 0 loads no reference."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator per token (Schulman, http://joschu.net/blog/kl-approx.html)."""

    gradient: Literal["importance_weighted", "plain"] = "importance_weighted"
    """``importance_weighted`` has the divergence's own gradient for every estimator, also on tokens
    of an older policy. ``plain`` differentiates the estimator alone: k1 then has no effect on
    average and k3 descends the forward divergence."""

    reference: Literal["sft", "init"] = "sft"
    """Reference of round k: theta_sft,k, or theta_init,k = theta_sft,k + v_(k-1)."""


class CorrectionConfig(StrictConfig):
    """How the gap between the generator that sampled and the learner that trains is corrected."""

    anchor: Literal["generator", "learner"] = "generator"
    """Policy in the denominator of the clipped ratio. ``generator``: the one that sampled, so the
    ratio itself corrects. ``learner``: the policy before the step, corrected by
    ``truncate_at``."""

    truncate_at: float | None = Field(default=None, gt=0)
    """Truncated importance sampling: each token's loss is weighted by
    min(learner / generator, truncate_at); needs ``anchor: learner``."""

    min_sequence_ratio: float | None = Field(default=None, gt=0, lt=1)
    """A rollout whose geometric-mean ratio learner / generator is below this does not train."""

    max_sequence_ratio: float | None = Field(default=None, gt=1)
    """A rollout whose geometric-mean ratio is above this does not train."""

    @model_validator(mode="after")
    def _check(self) -> "CorrectionConfig":
        if self.truncate_at is not None and self.anchor == "generator":
            raise ValueError(
                "truncate_at needs anchor: learner, got anchor: generator. The clipped ratio would "
                "correct the same gap twice."
            )
        return self
