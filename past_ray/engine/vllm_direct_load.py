"""Full weights into a vLLM model on CPU, with one pass over the memory.

vLLM's layerwise reload takes five: it allocates each layer, copies into it, packs it, and copies
what it packed; and it packs the embedding, by which nothing is multiplied. Here each layer packs
straight from the tensor that arrived, or from a small buffer where vLLM fuses several::

    o_proj                  --pack--> kernel's own copy
    q_proj, k_proj, v_proj  --copy--> buffer --pack--> kernel's own copy
    norms, biases, embedding --copy--> parameter

Packing itself is vLLM's (``process_weights_after_loading``).
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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

MAX_THREADS = 8
"""Layers packed at once; more threads than that wait for memory."""


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
    packer = _Packer()
    jobs = [
        partial(packer.pack, layer, [weights[name] for name in names])
        for layer, names in parts.items()
    ]
    if is_tied(getattr(model, "config", None)):
        jobs.append(partial(repack_tied_head, model))
    else:
        heads = [layer for layer in model.modules() if isinstance(layer, ParallelLMHead)]
        jobs += [partial(_pack_own, head) for head in heads]
    # The largest first. Nothing is decoded meanwhile, and the learners wait: all cores are free.
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        for done in [threads.submit(_without_grad, job) for job in reversed(jobs)]:
            done.result()


def repack_tied_head(model: nn.Module) -> None:
    """Pack the head anew; it multiplies by a packed copy of the embedding it is tied to.

    A tied head is not in the checkpoint, so nothing else renews that copy.
    """
    typed: Any = model
    _pack_own(typed.lm_head)


class _Packer:
    """Packs linear layers; every thread joins fused tensors in a buffer of its own."""

    def __init__(self) -> None:
        self._local = threading.local()

    def pack(self, layer: Layer, tensors: Sequence[Tensor]) -> None:
        """Let a layer pack the tensors, one below the other."""
        dtype = layer.weight.dtype
        joined = tensors[0]
        if len(tensors) > 1 or joined.dtype != dtype or not joined.is_contiguous():
            joined = self._buffer((sum(len(t) for t in tensors), joined.shape[1]), dtype)
            torch.cat([tensor.to(dtype) for tensor in tensors], out=joined)
        layer.weight = nn.Parameter(joined, requires_grad=False)
        _pack_own(layer)
        if layer.weight.numel():
            raise RuntimeError("vLLM must pack a linear layer into memory of its own, and did not")

    def _buffer(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        buffers = vars(self._local)
        key = str(shape)
        if key not in buffers:
            buffers[key] = torch.empty(shape, dtype=dtype)
        return buffers[key]


@torch.no_grad()
def _without_grad(job: Callable[[], None]) -> None:
    job()


def _pack_own(layer: Layer) -> None:
    # The old packed copy is freed first, so that the new one can take its place.
    layer.cpu_linear = None
    layer.quant_method.process_weights_after_loading(layer)
