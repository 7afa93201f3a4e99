"""Hugging Face model folders as state dicts in memory: read, written and hashed."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from past_ray.locations import Place, open_folder
from past_ray.skill.blocks import Chunk, Measures, Workspace, block_digests, digest_of, weights_hash
from past_ray.skill.stream import StreamSettings, measure
from past_ray.skill.weights import (
    CONFIG_FILE,
    EMBEDDINGS,
    HEAD,
    WEIGHTS_FILE,
    StoredWeights,
    different_head,
    is_tied,
    open_weights,
)
from past_ray.storage import atomic_directory, write_json

LINEAGE_FILE = "past_ray.json"
"""Where a model says what its weights come from."""

COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a model folder holds beside weights and config; copied as far as it exists."""


def load_weights(place: Place) -> dict[str, Tensor]:
    """Return every parameter of a model folder on the CPU, in its stored dtype, sorted by name.

    Raises:
        StorageError: Weights are missing or unreadable.
        SkillVectorError: The config ties the head but the folder holds a different one.
    """
    weights = open_weights(place)
    return {name: weights.tensor(name) for name in weights}


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    like: Path,
    lineage: Mapping[str, Any] | None = None,
) -> None:
    """Write a complete model folder, atomically: an older ``folder`` survives any failure.

    Args:
        folder: Where the model goes; may be ``like`` itself.
        weights: Parameters under Hugging Face names, written in the dtype they have.
        like: Model folder whose config, tokenizer and chat template are copied.
        lineage: Where the weights come from, for ``past_ray.json``; their hash is added.

    Raises:
        StorageError: The disk is full, or ``like`` has no config.
        SkillVectorError: ``weights`` holds a head that differs from the embeddings it is tied to.
    """
    if is_tied(read_config(like)):
        weights = without_tied_head(weights)
    with atomic_directory(folder) as writing:
        write_checkpoint(writing, weights, like=like)
        if lineage is not None:
            record = {"weights_hash": hash_tensors(weights), **lineage}
            write_json(writing / LINEAGE_FILE, record)


def write_checkpoint(folder: Path, weights: Mapping[str, Tensor], *, like: Path) -> None:
    """Write a model folder into the existing directory ``folder``; see ``save_checkpoint``."""
    if is_tied(read_config(like)):
        weights = without_tied_head(weights)
    save_tensors(folder / WEIGHTS_FILE, weights)
    write_companions(folder, like=like, dtype=main_dtype(weights))


def write_companions(folder: Path, *, like: Place, dtype: str) -> None:
    """Write what a model folder holds beside its weights: config, tokenizer and chat template.

    Args:
        folder: Existing directory.
        like: Model folder to copy from.
        dtype: Of the weights, for the config.
    """
    source = open_folder(like)
    config = source.read_json(CONFIG_FILE)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    write_json(folder / CONFIG_FILE, config)
    for name in COMPANION_FILES:
        if source.is_local and source.has(name):
            shutil.copyfile(source.path / name, folder / name)
        elif source.has(name):
            (folder / name).write_bytes(source.read_bytes(name))


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file that transformers and vLLM accept; not atomic by itself."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, file, metadata={"format": "pt"})


def hash_weights(place: Place) -> str:
    """Return the hash of a folder's parameters; the same for every way of sharding them."""
    return hash_stored(open_weights(place), settings=StreamSettings())


def hash_stored(weights: StoredWeights, *, settings: StreamSettings) -> str:
    """Return the hash of stored weights, a few chunks of them in memory at a time."""

    def digest(chunk: Chunk, workspace: Workspace) -> Measures:
        values = workspace.take("values", chunk.numel, weights[chunk.name].torch_dtype)
        weights.read(chunk.name, chunk.start, values)
        return Measures(digests={"weights": block_digests(values)})

    totals = measure(weights.shapes(), digest, settings=settings)
    return weights_hash({name: total.digests["weights"] for name, total in totals.items()})


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return what ``hash_weights`` gives for a folder that holds exactly ``tensors``."""
    return weights_hash({name: digest_of(tensor) for name, tensor in tensors.items()})


def read_config(folder: Place) -> dict[str, Any]:
    """Return ``config.json``.

    Raises:
        StorageError: It is missing or is no JSON object.
    """
    return open_folder(folder).read_json(CONFIG_FILE)


def without_tied_head(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``weights`` without the copy of the embeddings that a tied head is.

    Raises:
        SkillVectorError: The head is not such a copy.
    """
    has_both = HEAD in weights and EMBEDDINGS in weights
    if has_both and not torch.equal(weights[HEAD], weights[EMBEDDINGS]):
        raise different_head()
    return {name: tensor for name, tensor in weights.items() if name != HEAD}


def main_dtype(weights: Mapping[str, Tensor] | StoredWeights) -> str:
    """Return the name of the dtype that most numbers have, such as ``float32``."""
    sizes: dict[str, int] = {}
    for tensor in weights.values():
        dtype = tensor.dtype if isinstance(tensor, Tensor) else tensor.torch_dtype
        name = str(dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + math.prod(tensor.shape)
    return max(sizes, key=lambda name: sizes[name])
