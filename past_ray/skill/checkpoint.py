"""Hugging Face model folders as state dicts: read, written and hashed.

Every parameter counts once. Where the config ties the output head to the embeddings, the head is
neither returned nor hashed nor written, even if a folder or a state dict holds a copy of it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from past_ray.errors import SkillVectorError, StorageError
from past_ray.storage import atomic_directory, write_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"

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


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return every parameter of a model folder on the CPU, in its stored dtype, sorted by name.

    Reads ``model.safetensors`` or the shards that ``model.safetensors.index.json`` lists.

    Raises:
        StorageError: Weights are missing or unreadable.
        SkillVectorError: The config ties the head but the folder holds a different one.
    """
    return dict(iterate_weights(folder))


def iterate_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` sorted by name, one tensor in memory at a time.

    Raises:
        StorageError: Weights are missing or unreadable.
        SkillVectorError: The config ties the head but the folder holds a different one.
    """
    files = _weight_files(folder)
    with ExitStack() as open_files:
        shards = {file: open_files.enter_context(_open(file)) for file in set(files.values())}
        for name in sorted(files):
            tensor = _read_tensor(shards[files[name]], name, files[name])
            if name == HEAD and EMBEDDINGS in files and is_tied(read_config(folder)):
                embeddings = _read_tensor(shards[files[EMBEDDINGS]], EMBEDDINGS, files[EMBEDDINGS])
                _check_head_is_a_copy(tensor, embeddings)
                continue
            yield name, tensor


def save_checkpoint(folder: Path, weights: Mapping[str, Tensor], *, like: Path) -> None:
    """Write a complete model folder, atomically: an older ``folder`` survives any failure.

    Args:
        folder: Where the model goes; may be ``like`` itself.
        weights: Parameters under Hugging Face names, written in the dtype they have.
        like: Model folder whose config, tokenizer and chat template are copied.

    Raises:
        StorageError: The disk is full, or ``like`` has no config.
        SkillVectorError: ``weights`` holds a head that differs from the embeddings it is tied to.
    """
    with atomic_directory(folder) as writing:
        write_checkpoint(writing, weights, like=like)


def write_checkpoint(folder: Path, weights: Mapping[str, Tensor], *, like: Path) -> None:
    """Write a model folder into the existing directory ``folder``; see ``save_checkpoint``."""
    config = read_config(like)
    if is_tied(config):
        weights = without_tied_head(weights)
    config.pop("torch_dtype", None)
    config["dtype"] = main_dtype(weights)
    save_tensors(folder / WEIGHTS_FILE, weights)
    write_json(folder / CONFIG_FILE, config)
    for name in COMPANION_FILES:
        if (like / name).is_file():
            shutil.copyfile(like / name, folder / name)


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file that transformers and vLLM accept; not atomic by itself."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, file, metadata={"format": "pt"})


def hash_weights(folder: Path) -> str:
    """Return the SHA-256 of a folder's parameters; the same for every way of sharding them."""
    return _hash(iterate_weights(folder))


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return what ``hash_weights`` gives for a folder that holds exactly ``tensors``."""
    return _hash((name, tensors[name]) for name in sorted(tensors))


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json``.

    Raises:
        StorageError: It is missing or is no JSON object.
    """
    return read_json_object(folder / CONFIG_FILE)


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in ``file``.

    Raises:
        StorageError: It is missing or is no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(
            f"{file.parent} must be a Hugging Face model folder, found no {file.name}."
            " Give the folder that save_pretrained or past_ray wrote."
        ) from error
    except ValueError as error:
        raise StorageError(
            f"{file} must hold JSON, got {error}. Write the folder again."
        ) from error
    if not isinstance(value, dict):
        raise StorageError(f"{file} must hold a JSON object, got a {type(value).__name__}.")
    return value


def is_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether the config makes the output head the embedding matrix."""
    return bool(config.get("tie_word_embeddings", False))


def without_tied_head(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``weights`` without the copy of the embeddings that a tied head is.

    Raises:
        SkillVectorError: The head is not such a copy.
    """
    if HEAD in weights and EMBEDDINGS in weights:
        _check_head_is_a_copy(weights[HEAD], weights[EMBEDDINGS])
    return {name: tensor for name, tensor in weights.items() if name != HEAD}


def main_dtype(weights: Mapping[str, Tensor]) -> str:
    """Return the name of the dtype that most numbers have, such as ``float32``."""
    sizes: dict[str, int] = {}
    for tensor in weights.values():
        name = str(tensor.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + tensor.numel()
    return max(sizes, key=lambda name: sizes[name])


def _weight_files(folder: Path) -> dict[str, Path]:
    """Map every stored tensor name to its safetensors file."""
    if (folder / WEIGHTS_FILE).is_file():
        with _open(folder / WEIGHTS_FILE) as file:
            return dict.fromkeys(file.keys(), folder / WEIGHTS_FILE)
    if (folder / INDEX_FILE).is_file():
        weight_map: dict[str, str] = read_json_object(folder / INDEX_FILE)["weight_map"]
        return {name: folder / shard for name, shard in weight_map.items()}
    raise StorageError(
        f"{folder} must hold {WEIGHTS_FILE} or {INDEX_FILE}, found neither."
        " Save the model as safetensors (save_pretrained does)."
    )


def _open(file: Path) -> Any:  # noqa: ANN401 - safetensors types its reader as a factory
    """Open a safetensors file for reading."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error


def _read_tensor(shard: Any, name: str, file: Path) -> Tensor:  # noqa: ANN401 - as in _open
    try:
        return shard.get_tensor(name)
    except SafetensorError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> StorageError:
    return StorageError(
        f"{file} must be a complete safetensors file, got: {error}."
        " Copy or train the checkpoint again."
    )


def _check_head_is_a_copy(head: Tensor, embeddings: Tensor) -> None:
    if not torch.equal(head, embeddings):
        raise SkillVectorError(
            f"{HEAD} must equal {EMBEDDINGS} because the config has tie_word_embeddings=true,"
            " found different values. Set tie_word_embeddings=false in config.json, or drop the"
            " head."
        )


def _hash(tensors: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor in the given order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()
