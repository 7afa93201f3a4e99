"""A run on paper: the model's shape, the hardware, and stages with their published numbers.

Nothing here is executed. ``pipelines/paper_plan.py`` turns a plan into GPUs, memory, tokens, judge
calls and hours, before any of them is paid for.
"""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from past_ray.config.base import StrictConfig
from past_ray.config.plan_stages import StagePlan

GpuName = Literal["a100-80gb", "h100-80gb", "h200-141gb"]


class GpuConfig(StrictConfig):
    """One kind of GPU, as its data sheet describes the SXM form."""

    memory_bytes: float = Field(gt=0)
    """Memory. Data sheets round down by a few percent, which is what a CUDA context takes."""

    peak_flops: float = Field(gt=0)
    """Dense bf16 operations per second."""

    bandwidth: float = Field(gt=0)
    """Bytes per second between the memory and the processors."""


GPUS: dict[GpuName, GpuConfig] = {
    "a100-80gb": GpuConfig(memory_bytes=80e9, peak_flops=312e12, bandwidth=2.039e12),
    "h100-80gb": GpuConfig(memory_bytes=80e9, peak_flops=989e12, bandwidth=3.35e12),
    "h200-141gb": GpuConfig(memory_bytes=141e9, peak_flops=989e12, bandwidth=4.8e12),
}
"""By name, smallest first."""


class HardwareConfig(StrictConfig):
    """GPUs, and the shares of their peaks that a real run reaches."""

    gpu: GpuName = "a100-80gb"
    """Kind of all GPUs."""

    flops_utilization: float = Field(default=0.4, gt=0, le=1)
    """Reached share of ``peak_flops`` in training and in reading prompts."""

    bandwidth_utilization: float = Field(default=0.6, gt=0, le=1)
    """Reached share of ``bandwidth`` while tokens are decoded."""

    usd_per_gpu_hour: float | None = Field(default=None, gt=0)
    """Price of one GPU for one hour; without it no cost is printed."""


class ModelShape(StrictConfig):
    """Sizes of a dense decoder with gated feed-forward layers: Llama or Qwen2."""

    name: str
    """Name in the printed plan."""

    num_layers: PositiveInt
    """Transformer layers."""

    hidden_size: PositiveInt
    """Width of the residual stream."""

    intermediate_size: PositiveInt
    """Width of the feed-forward layer."""

    num_heads: PositiveInt
    """Query heads; ``hidden_size / num_heads`` is the head size."""

    num_kv_heads: PositiveInt
    """Key-value heads."""

    vocab_size: PositiveInt
    """Rows of the embedding, padding of the vocabulary included."""

    tie_word_embeddings: bool
    """The head is the embedding, so both count once."""

    attention_bias: bool
    """Query, key and value have a bias, as in Qwen2 but not in Llama."""

    @property
    def kv_size(self) -> int:
        """Width of the keys of one token in one layer."""
        return self.hidden_size // self.num_heads * self.num_kv_heads

    @property
    def layer_matrix_parameters(self) -> int:
        """Weights of one layer's matrix products: query, output, key, value, feed-forward."""
        attention = 2 * self.hidden_size * (self.hidden_size + self.kv_size)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def matrix_parameters(self) -> int:
        """Weights that every token is multiplied with: the layers and the head."""
        return self.num_layers * self.layer_matrix_parameters + self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights: matrices, embedding (once if tied), norms and biases."""
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        norms = (2 * self.num_layers + 1) * self.hidden_size
        biases = self.num_layers * (self.hidden_size + 2 * self.kv_size)
        return self.matrix_parameters + embedding + norms + self.attention_bias * biases


class PlanConfig(StrictConfig):
    """One recipe: which model on which GPUs goes through which stages."""

    name: str
    """Title of the printed plan."""

    model: ModelShape
    """The model of all stages."""

    hardware: HardwareConfig
    """The GPUs of all stages."""

    stages: tuple[StagePlan, ...] = Field(min_length=1)
    """In the order in which they run, one after another."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages must have different names, got {names}. Rename one.")
        return self
