"""SEAL, the rival: a writer of texts that is trained on its own best ones."""

from pydantic import Field

from past_ray.config.base import StrictConfig
from past_ray.config.sft import LoraConfig, SFTConfig


class WriterSFTConfig(SFTConfig):
    """SFT of the writer on its best self-edits; the schedule is not published, ours is a cosine.

    A prompt and its self-edit are one example, which ``max_length`` does not split.
    """

    num_epochs: float | None = Field(default=2, gt=0)
    """Passes over the best self-edits, one per passage."""

    batch_size: int = Field(default=10, ge=1)
    """Examples of one optimizer step, over all workers."""

    lora: LoraConfig | None = LoraConfig(
        rank=64,
        alpha=128,
        target_modules=(
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ),
    )
    """Adapter on all linear layers, merged into the writer."""


class SealConfig(StrictConfig):
    """How arm ``seal`` finds its writer. Self-edits are sampled as ``texts`` says.

    Reference: https://arxiv.org/abs/2506.10943 (section 3 and appendix on knowledge incorporation).
    """

    num_rounds: int = Field(default=2, ge=1)
    """Rounds of sampling, choosing and training (ReST-EM)."""

    num_self_edits: int = Field(default=5, ge=2)
    """Texts of each of ``texts.kinds`` about each source passage, among which the best is chosen;
    in place of ``texts.texts_per_kind``."""

    num_seeds: int = Field(default=1, ge=1)
    """Adapters trained on each self-edit, whose answers count together; SEAL trains 3."""

    sft: WriterSFTConfig = WriterSFTConfig()
    """SFT of the writer after each round."""
