"""One LoRA adapter per passage: the single-passage regime."""

from pydantic import Field

from past_ray.config.base import StrictConfig
from past_ray.config.sft import LoraConfig, Precision, Schedule


class SinglePassageConfig(StrictConfig):
    """How the adapter of one passage is trained on its few short sequences.

    The defaults are those of SEAL's test-time training, which PaST's single-passage column uses.

    Reference: https://arxiv.org/abs/2506.10943 (appendix on knowledge incorporation).
    """

    lora: LoraConfig = LoraConfig(
        rank=32, alpha=64, dropout=0.0, target_modules=("q_proj", "v_proj")
    )
    """Size and place of the adapter."""

    num_epochs: int = Field(default=10, ge=1)
    """Passes over the sequences of the passage."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate, from the first step on."""

    schedule: Schedule = "linear"
    """How the learning rate falls; there is no warm-up."""

    batch_size: int = Field(default=1, ge=1)
    """Sequences of one optimizer step."""

    max_length: int = Field(default=2048, ge=2)
    """Tokens of one sequence; longer ones are split into pieces, never cut off."""

    precision: Precision = "bf16"
    """``bf16`` holds the frozen base in bf16; the adapter and its optimizer are fp32."""

    seed: int = 0
    """Seed of the initial adapter, of the order of the sequences and of dropout."""
