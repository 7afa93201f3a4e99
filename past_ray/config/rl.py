"""GRPO on the source domain."""

from typing import Literal

from pydantic import Field, model_validator

from past_ray.config.algorithm import AlgorithmConfig, CorrectionConfig, GRPOConfig, KLConfig
from past_ray.config.base import StrictConfig
from past_ray.config.sft import LoraConfig, Precision


class RLConfig(StrictConfig):
    """One GRPO run: how much to sample, how stale it may be, what to minimise."""

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

    algorithm: AlgorithmConfig = GRPOConfig()
    """What is minimised."""

    advantage: Literal["rollout", "turn"] = "rollout"
    """``rollout``: one advantage from the sum of a rollout's rewards. ``turn``: returns-to-go of
    each turn, normalised within the group per turn index."""

    kl: KLConfig = KLConfig()
    """Penalty towards a reference."""

    correction: CorrectionConfig = CorrectionConfig()
    """Correction between generator and learner."""

    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""

    max_staleness: int = Field(default=0, ge=0)
    """Optimizer steps the learner may be ahead of the weights that sampled a rollout.

    0 is exactly synchronous and, on CPU, reproducible bit for bit. At 1 and above the next steps'
    rollouts are sampled while the learner works.
    """

    max_constant_steps: int = Field(default=20, ge=1)
    """The run stops after this many steps in a row without a group whose rewards differ."""

    max_turns: int = Field(default=1, ge=1)
    """A rollout whose environment is not done after this many turns failed."""

    reward_timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for one reply of an environment; a rollout that exceeds it failed."""

    max_tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Tokens packed into one forward pass; the gradient does not depend on it."""

    precision: Precision = "fp32"
    """Compute precision of the learner; masters and optimizer are fp32."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""

    lora: LoraConfig | None = None
    """Train an adapter instead of all weights."""

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
