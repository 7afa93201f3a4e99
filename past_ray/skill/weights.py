"""The weights of a model folder or a dense skill folder, read piece by piece from any storage.

Every parameter counts once. Where the config ties the output head to the embeddings, a stored copy
of the head is checked against them and then left out.
"""

import threading
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from past_ray.errors import SkillVectorError, StorageError
from past_ray.locations import Folder, Place, RandomAccessFile, open_folder
from past_ray.skill.safetensors_file import StoredTensor, read_header

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"

_COMPARED_AT_ONCE = 1 << 20


class StoredWeights(Mapping[str, StoredTensor]):
    """Names, dtypes and shapes of stored tensors, sorted by name; ``read`` gets their numbers.

    Several threads may read at once. It pickles without its open files, so it can be sent to
    another process that sees the same storage.
    """

    def __init__(self, folder: Folder, files: Mapping[str, str]) -> None:
        """Use ``open_weights``, which finds out ``files``: the file of each tensor."""
        self.folder = folder
        self._files = dict(files)
        self._open_files: dict[str, RandomAccessFile] = {}
        self._lock = threading.Lock()
        headers = {
            file: read_header(self._open(file), f"{folder}/{file}")
            for file in sorted(set(files.values()))
        }
        _check_index(folder, files, headers)
        self._tensors = {name: headers[files[name]][name] for name in sorted(files)}

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_files": self._files, "_tensors": self._tensors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open_files={}, _lock=threading.Lock())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of every tensor."""
        return {name: tensor.torch_dtype for name, tensor in self._tensors.items()}

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` with the entries of a flattened tensor from ``start`` on.

        Args:
            name: Which tensor.
            start: First entry.
            out: ``[n]`` contiguous CPU tensor of the stored dtype.

        Raises:
            StorageError: The file cannot be read or is shorter than it was.
        """
        stored = self._tensors[name]
        assert out.dtype == stored.torch_dtype
        if out.numel():
            buffer = out.view(torch.uint8).numpy().data
            offset = stored.offset + start * out.element_size()
            self._open(self._files[name]).read_into(buffer, offset)

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor in its stored dtype."""
        stored = self._tensors[name]
        out = torch.empty(stored.numel, dtype=stored.torch_dtype)
        self.read(name, 0, out)
        return out.view(stored.shape)

    def without(self, name: str) -> "StoredWeights":
        """Return the same weights with one tensor left out."""
        other = StoredWeights.__new__(StoredWeights)
        other.__setstate__(self.__getstate__())
        other._tensors = {key: value for key, value in self._tensors.items() if key != name}
        return other

    def _open(self, file: str) -> RandomAccessFile:
        with self._lock:
            if file not in self._open_files:
                self._open_files[file] = self.folder.open(file)
            return self._open_files[file]


def open_weights(place: Place) -> StoredWeights:
    """Return the weights of a model folder or a dense skill folder.

    Raises:
        StorageError: Weights are missing, truncated or damaged, or the index disagrees with them.
        SkillVectorError: The config ties the head but the folder holds a different one.
    """
    folder = open_folder(place)
    weights = StoredWeights(folder, _files_by_tensor(folder))
    has_both = HEAD in weights and EMBEDDINGS in weights and folder.has(CONFIG_FILE)
    if has_both and is_tied(folder.read_json(CONFIG_FILE)):
        _check_head_is_a_copy(weights)
        return weights.without(HEAD)
    return weights


def different_head() -> SkillVectorError:
    """Say that a head which the config ties to the embeddings is another matrix."""
    return SkillVectorError(
        f"{HEAD} must equal {EMBEDDINGS} because the config has tie_word_embeddings=true, found"
        " different values. Set tie_word_embeddings=false in config.json, or drop the head."
    )


def is_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether a config ties the output head to the embeddings."""
    return bool(config.get("tie_word_embeddings", False))


def _files_by_tensor(folder: Folder) -> dict[str, str]:
    """Map every tensor to the file that holds it; the index wins where there are both."""
    if folder.has(INDEX_FILE):
        weight_map = folder.read_json(INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise StorageError(
                f"{folder}/{INDEX_FILE} must have a weight_map from tensor to file, found none."
                " Save the model again."
            )
        _check_plain_names(folder, weight_map)
        missing = sorted(file for file in set(weight_map.values()) if not folder.has(file))
        if missing:
            raise StorageError(
                f"{folder} must hold every file of its index; {len(missing)} are missing (first:"
                f" {', '.join(missing[:5])}). Download or copy the checkpoint again."
            )
        if folder.has(WEIGHTS_FILE) and WEIGHTS_FILE not in weight_map.values():
            raise StorageError(
                f"{folder} must hold one checkpoint, found {WEIGHTS_FILE} beside an {INDEX_FILE}"
                " that does not list it. Remove the one that is out of date."
            )
        return weight_map
    if folder.has(WEIGHTS_FILE):
        with folder.open(WEIGHTS_FILE) as file:
            return dict.fromkeys(read_header(file, f"{folder}/{WEIGHTS_FILE}"), WEIGHTS_FILE)
    raise StorageError(
        f"{folder} must hold {WEIGHTS_FILE} or {INDEX_FILE}, found neither."
        " Save the model as safetensors (save_pretrained does)."
    )


def _check_plain_names(folder: Folder, weight_map: Mapping[str, Any]) -> None:
    """Refuse an index that points outside of its folder."""
    outside = sorted(
        {
            str(file)
            for file in weight_map.values()
            if not isinstance(file, str) or PurePosixPath(file).name != file or file in ("", "..")
        }
    )
    if outside:
        raise StorageError(
            f"{folder}/{INDEX_FILE} must name files beside it, found {', '.join(outside[:5])}."
            " Do not use a checkpoint whose index points elsewhere."
        )


def _check_index(
    folder: Folder, files: Mapping[str, str], headers: Mapping[str, Mapping[str, StoredTensor]]
) -> None:
    absent = sorted(name for name, file in files.items() if name not in headers[file])
    unlisted = sorted(
        name for file, header in headers.items() for name in header if files.get(name) != file
    )
    if absent or unlisted:
        raise StorageError(
            f"{folder}/{INDEX_FILE} must agree with its files; {len(absent)} tensors are not where"
            f" it says (first: {', '.join(absent[:5])}), {len(unlisted)} are stored but not listed"
            f" (first: {', '.join(unlisted[:5])}). Save the checkpoint again."
        )


def _check_head_is_a_copy(weights: StoredWeights) -> None:
    head, embeddings = weights[HEAD], weights[EMBEDDINGS]
    is_same = (head.dtype, head.shape) == (embeddings.dtype, embeddings.shape)
    for start in range(0, head.numel if is_same else 0, _COMPARED_AT_ONCE):
        size = min(_COMPARED_AT_ONCE, head.numel - start)
        left, right = (torch.empty(size, dtype=head.torch_dtype) for _ in range(2))
        weights.read(HEAD, start, left)
        weights.read(EMBEDDINGS, start, right)
        is_same = is_same and torch.equal(left, right)
    if not is_same:
        raise different_head()
