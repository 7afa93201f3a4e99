"""Where a vLLM model keeps each tensor of a checkpoint.

vLLM fuses some projections: ``qkv_proj.weight`` holds ``q_proj``, ``k_proj`` and ``v_proj`` one
below the other. A ``Place`` is one checkpoint tensor's rows in one parameter of one layer.

On CPU a linear layer multiplies by a repacked copy and its parameter is empty, so what the layer
really holds is read by multiplying: a unit vector gives one column, exactly.

Shapes: N = output rows of a layer, K = its inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from past_ray.engine.generator_checks import is_tied

TIED_HEAD = "lm_head.weight"
"""Name of the output head, which a checkpoint with tied embeddings does not hold."""

Layer = Any
"""A layer of vLLM; loosely typed, as vLLM's own attributes are."""

SAMPLES, COLUMN = "_past_ray_samples", "_past_ray_column"
"""Attributes under which a model keeps the samples of its last update."""

COLUMN_STEP = 7919
"""A prime, so that successive updates sample all columns of any matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Rows of one parameter that one checkpoint tensor fills."""

    layer: Layer
    """The layer."""

    parameter: str
    """Its attribute: ``weight`` or ``bias``."""

    first_row: int = 0
    """Where the tensor begins."""

    shape: tuple[int, ...]
    """Shape of the checkpoint tensor."""


def weight_places(model: nn.Module) -> dict[str, Place]:
    """Return the place of every tensor of a checkpoint, by its Hugging Face name.

    The shapes are those of the whole model, also where tensor parallelism splits it.
    """
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    skipped = {TIED_HEAD} if is_tied(getattr(model, "config", None)) else set[str]()
    places: dict[str, Place] = {}
    for path, layer in model.named_modules():
        # vLLM wraps layers that take adapters; a checkpoint knows nothing of that.
        prefix = path.replace(".base_layer", "")
        for parameter, tensor in layer.named_parameters(recurse=False):
            name = f"{prefix}.{parameter}" if prefix else parameter
            if name not in skipped:
                places.update(_places_of(name, layer, parameter, tensor, packed))
    return places


def _places_of(
    name: str, layer: Layer, parameter: str, tensor: Tensor, packed: Mapping[str, list[str]]
) -> dict[str, Place]:
    """Return the checkpoint tensors in one parameter: several where vLLM fuses them."""
    path, _, module = name.rpartition(".")[0].rpartition(".")
    if module in packed:
        places: dict[str, Place] = {}
        first_row = 0
        for part, rows in zip(packed[module], layer.output_sizes, strict=True):
            shape = (rows, layer.input_size)[: 2 if parameter == "weight" else 1]
            places[f"{path}.{part}.{parameter}"] = Place(
                layer=layer, parameter=parameter, first_row=first_row, shape=shape
            )
            first_row += rows
        return places
    shape = tuple(tensor.shape)
    if isinstance(layer, LinearBase):
        shape = (layer.output_size, layer.input_size)[: 2 if parameter == "weight" else 1]
    elif isinstance(layer, VocabParallelEmbedding):
        # The parameter is padded to a multiple of 64 rows.
        shape = (layer.org_vocab_size, *shape[1:])
    return {name: Place(layer=layer, parameter=parameter, shape=shape)}


def checkpoint_shapes(places: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint."""
    return {name: place.shape for name, place in places.items()}


def remember_samples(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Keep a sample of each tensor of an update on its model, for ``missed_weights``.

    Every update samples another column. Nothing is kept where it could not be read back: from
    quantized layers, and from layers that several devices share.
    """
    kept: Any = model
    column = (getattr(kept, COLUMN, 0) + COLUMN_STEP) % 2**31
    setattr(kept, COLUMN, column)
    samples = {name: _sample(value, column) for name, value in weights.items()}
    setattr(kept, SAMPLES, samples if _is_readable(model) else {})


def missed_weights(model: nn.Module) -> list[str]:
    """Return the names of the tensors of the last update whose samples the model does not hold."""
    kept: Any = model
    samples: Mapping[str, Tensor] = getattr(kept, SAMPLES, {})
    if not samples:
        return []
    held = _Held(column=getattr(kept, COLUMN))
    places = weight_places(model)
    missed = [name for name, value in samples.items() if not _equal(held.of(places[name]), value)]
    if is_tied(getattr(model, "config", None)):
        # The head multiplies by a copy of its own.
        embedding = next(
            name for name in samples if places[name].layer.weight is kept.lm_head.weight
        )
        if not _equal(held.used_by(kept.lm_head), samples[embedding]):
            missed.append(TIED_HEAD)
    return missed


class _Held:
    """Reads samples back; a fused layer is multiplied once for all of its parts."""

    def __init__(self, *, column: int) -> None:
        self._column = column
        self._outputs: dict[Any, Tensor] = {}

    def of(self, place: Place) -> Tensor:
        """Return the sample of one checkpoint tensor."""
        last_row = place.first_row + place.shape[0]
        if place.parameter == "weight" and isinstance(place.layer, LinearBase):
            return self.used_by(place.layer)[place.first_row : last_row]
        tensor: Tensor = getattr(place.layer, place.parameter)
        return _sample(tensor[place.first_row : last_row], self._column)

    def used_by(self, layer: Layer) -> Tensor:
        """Return one column ``[N]`` of the matrix that a layer multiplies by."""
        if layer not in self._outputs:
            is_vocabulary = isinstance(layer, VocabParallelEmbedding)
            rows = layer.org_vocab_size if is_vocabulary else layer.output_size
            inputs = layer.embedding_dim if is_vocabulary else layer.input_size
            unit = torch.zeros(1, inputs, dtype=layer.weight.dtype, device=layer.weight.device)
            unit[0, self._column % inputs] = 1
            self._outputs[layer] = layer.quant_method.apply(layer, unit)[0, :rows]
        return self._outputs[layer]


def _is_readable(model: nn.Module) -> bool:
    layers: list[Any] = [
        layer for layer in model.modules() if isinstance(layer, LinearBase | VocabParallelEmbedding)
    ]
    known = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    return all(isinstance(layer.quant_method, known) and layer.tp_size == 1 for layer in layers)


def _sample(tensor: Tensor, column: int) -> Tensor:
    """Return one column of a matrix, counted around its end, or all of a vector."""
    return tensor[:, column % tensor.shape[1]].clone() if tensor.ndim == 2 else tensor.clone()


def _equal(held: Tensor, given: Tensor) -> bool:
    return torch.equal(held, given.to(device=held.device, dtype=held.dtype))
