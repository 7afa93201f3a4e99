"""Supervised fine-tuning on documents."""

import math
from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from past_ray.config.base import StrictConfig

Precision = Literal["fp32", "bf16"]

Schedule = Literal["cosine", "linear", "constant"]
"""How the learning rate falls after the warm-up: to zero along a cosine or a line, or not."""


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
    """One supervised run: AdamW on fp32 masters, linear warm-up, then a schedule."""

    num_steps: int = Field(default=100, ge=1)
    """Optimizer steps. Documents are repeated in seeded epoch shuffles as often as needed."""

    num_epochs: float | None = Field(default=None, gt=0)
    """Length of the run in passes over the documents, in place of ``num_steps``."""

    batch_size: int = Field(default=32, ge=1)
    """Examples of one optimizer step, over all workers."""

    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""

    schedule: Schedule = "cosine"
    """What follows the warm-up; ``linear`` is the default of the HF Trainer."""

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

    def resolved(self, num_examples: int) -> "SFTConfig":
        """Return the same recipe with its length in steps, whichever of the two decides it.

        ``num_steps = ceil(num_epochs * num_examples / batch_size)``: steps run on across epochs, so
        only the last one can begin a pass that is not asked for.

        Args:
            num_examples: Examples of one epoch.
        """
        if self.num_epochs is None:
            return self
        # As written in decimal: 0.07 * 100 is above 7 in binary.
        num_drawn = Fraction(str(self.num_epochs)) * num_examples
        num_steps = math.ceil(num_drawn / self.batch_size)
        return self.model_copy(update={"num_steps": num_steps, "num_epochs": None})

    @model_validator(mode="after")
    def _check_length(self) -> "SFTConfig":
        default = type(self).model_fields["num_steps"].default
        if self.num_epochs is not None and self.num_steps != default:
            raise ValueError(
                "one of num_steps and num_epochs must decide the length of a run, got "
                f"{self.num_steps} and {self.num_epochs}. Leave one of them out."
            )
        return self
