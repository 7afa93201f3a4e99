"""A LoRA adapter on its way from the learner to the generators."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """What a generator needs to apply the adapter to weights it already holds."""

    tensors: Mapping[str, Tensor]
    """fp32 factors under PEFT's names, such as
    ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``."""

    rank: int
    """Width of the factors."""

    alpha: int
    """The product of the factors is scaled by ``alpha / rank``."""

    target_modules: tuple[str, ...]
    """Last part of the names of the wrapped layers."""
