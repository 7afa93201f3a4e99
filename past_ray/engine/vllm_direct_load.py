"""Full weights into a vLLM model on CPU, with one pass over the memory.

vLLM's layerwise reload takes five: it allocates each layer, copies into it, packs it, and copies
what it packed; and it packs the embedding, by which nothing is multiplied. Here each layer packs
straight from the tensor that arrived, or from a small buffer where vLLM fuses several::

    o_proj                  --pack--> kernel's own copy
    q_proj, k_proj, v_proj  --copy--> buffer --pack--> kernel's own copy
    norms, biases, embedding --copy--> parameter

Packing itself is vLLM's (``process_weights_after_loading``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from past_ray.engine.generator_checks import is_tied
from past_ray.engine.vllm_weight_plan import Layer, Place


def can_load_directly(model: nn.Module) -> bool:
    """Whether every layer of the model is one that ``load_directly`` knows."""
    if not current_platform.is_cpu() or current_platform.is_zen_cpu():
        return False
    return all(_is_known(layer) for layer in model.modules())


def _is_known(layer: nn.Module) -> bool:
    """Whether a layer is plain, or has been packed so that its own parameter is empty."""
    typed: Any = layer
    if isinstance(layer, LinearBase):
        is_plain = isinstance(typed.quant_method, UnquantizedLinearMethod) and typed.tp_size == 1
        return is_plain and typed.weight.numel() == 0
    if isinstance(layer, VocabParallelEmbedding):
        return isinstance(typed.quant_method, UnquantizedEmbeddingMethod) and typed.tp_size == 1
    is_adapter_wrapper = hasattr(typed, "base_layer")
    return is_adapter_wrapper or getattr(typed, "quant_method", None) is None


@torch.no_grad()
def load_directly(
    model: nn.Module, weights: Mapping[str, Tensor], places: Mapping[str, Place]
) -> None:
    """Load a whole checkpoint whose names and shapes have been checked."""
    parts: dict[nn.Module, list[str]] = {}
    for name, place in places.items():
        if place.parameter == "weight" and isinstance(place.layer, LinearBase):
            parts.setdefault(place.layer, []).append(name)
        else:
            rows = slice(place.first_row, place.first_row + place.shape[0])
            getattr(place.layer, place.parameter)[rows].copy_(weights[name])
    buffers: dict[tuple[int, ...], Tensor] = {}
    for layer, names in parts.items():
        _pack(layer, [weights[name] for name in names], buffers)
    if is_tied(getattr(model, "config", None)):
        repack_tied_head(model)
    else:
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                _pack_own(layer)


def repack_tied_head(model: nn.Module) -> None:
    """Pack the head anew; it multiplies by a packed copy of the embedding it is tied to.

    A tied head is not in the checkpoint, so nothing else renews that copy.
    """
    typed: Any = model
    _pack_own(typed.lm_head)


def _pack(layer: Layer, tensors: Sequence[Tensor], buffers: dict[tuple[int, ...], Tensor]) -> None:
    """Let a linear layer pack the tensors, one below the other."""
    dtype = layer.weight.dtype
    joined = tensors[0]
    if len(tensors) > 1 or joined.dtype != dtype or not joined.is_contiguous():
        shape = (sum(len(tensor) for tensor in tensors), joined.shape[1])
        joined = buffers.setdefault(shape, torch.empty(0))
        if joined.numel() == 0:
            joined = buffers[shape] = torch.empty(shape, dtype=dtype)
        torch.cat([tensor.to(dtype) for tensor in tensors], out=joined)
    layer.weight = nn.Parameter(joined, requires_grad=False)
    _pack_own(layer)
    if layer.weight.numel():
        raise RuntimeError("vLLM must pack a linear layer into memory of its own, and did not")


def _pack_own(layer: Layer) -> None:
    # The old packed copy is freed first, so that the new one can take its place.
    layer.cpu_linear = None
    layer.quant_method.process_weights_after_loading(layer)
