"""Supervised fine-tuning on documents."""

from typing import Literal

from pydantic import Field

from past_ray.config.base import StrictConfig

Precision = Literal["fp32", "bf16"]


class LoraConfig(StrictConfig):
    """A PEFT LoRA adapter, merged into the saved weights at the end of a run."""

    rank: int = Field(default=32, ge=1)
    """Rank of the adapter."""

    alpha: int = Field(default=64, ge=1)
    """The adapter is scaled by ``alpha / rank``."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""

    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that get an adapter."""


class SFTConfig(StrictConfig):
    """One supervised run: AdamW on fp32 masters, linear warm-up, cosine decay to zero."""

    num_steps: int = Field(default=100, ge=1)
    """Optimizer steps. Documents are repeated in seeded epoch shuffles as often as needed."""

    batch_size: int = Field(default=32, ge=1)
    """Examples of one optimizer step, over all workers."""

    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""

    warmup_frac: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps with linear warm-up."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""

    max_length: int = Field(default=2048, ge=2)
    """Tokens of one example; longer documents are split into pieces, never cut off."""

    max_tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Padded tokens of one forward pass; the loss does not depend on it."""

    precision: Precision = "fp32"
    """Compute precision; masters and optimizer are fp32 in either case."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""

    lora: LoraConfig | None = None
    """Train an adapter instead of all weights."""

    checkpoint_every_steps: int = Field(default=100, ge=1)
    """A killed run loses at most this many steps."""
