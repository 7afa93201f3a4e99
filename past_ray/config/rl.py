"""GRPO on the source domain."""

from typing import Literal

from pydantic import Field, model_validator

from past_ray.config.base import StrictConfig
from past_ray.config.sft import LoraConfig, Precision


class RLConfig(StrictConfig):
    """One synchronous GRPO run: how much to sample and what to minimise."""

    num_steps: int = Field(default=48, ge=1)
    """Optimizer steps of one arm. Refinement rounds share them equally."""

    prompts_per_step: int = Field(default=24, ge=1)
    """Questions of one step."""

    group_size: int = Field(default=8, ge=2)
    """Rollouts per question. Two is the least that gives a group-relative advantage."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Constant learning rate."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""

    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the learner divides its logits by the same value."""

    max_new_tokens: int = Field(default=8, ge=1)
    """Tokens of one completion."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """Lower clip distance of the probability ratio."""

    clip_high: float = Field(default=0.2, gt=0)
    """Upper clip distance; larger than ``clip_low`` is DAPO's clip-higher."""

    scale_by_std: bool = True
    """Divide advantages by the group's sample deviation (GRPO); False is Dr. GRPO."""

    kl_coefficient: float = Field(default=0.001, ge=0)
    """Weight of the KL penalty towards the reference; 0 loads no reference."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL penalty (Schulman, http://joschu.net/blog/kl-approx.html)."""

    kl_reference: Literal["sft", "init"] = "sft"
    """Reference weights of round k: theta_sft,k, or theta_init,k = theta_sft,k + v_(k-1)."""

    max_tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Padded tokens of one forward pass; the gradient does not depend on it."""

    precision: Precision = "fp32"
    """Compute precision of the learner; masters and optimizer are fp32."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""

    lora: LoraConfig | None = None
    """Train an adapter instead of all weights; it is merged for every weight sync."""

    checkpoint_every_steps: int = Field(default=10, ge=1)
    """A killed run loses at most this many steps."""

    max_rollout_error_frac: float = Field(default=0.1, ge=0, le=1)
    """The run stops when a larger share of a step's rollouts failed."""

    parity_tolerance: float = Field(default=1e-4, gt=0)
    """Largest log-probability gap between generator and learner after a weight sync, in nats."""

    num_parity_prompts: int = Field(default=4, ge=1)
    """Fixed prompts of the parity probe."""

    @model_validator(mode="after")
    def _check(self) -> "RLConfig":
        if self.lora is not None and self.lora.dropout > 0:
            raise ValueError(
                f"lora.dropout must be 0 in RL, got {self.lora.dropout}: the learner's "
                "log-probabilities would not be those of the generator. Remove the setting."
            )
        return self

    @property
    def rollouts_per_step(self) -> int:
        """Derived, never configured: ``prompts_per_step * group_size``."""
        return self.prompts_per_step * self.group_size
