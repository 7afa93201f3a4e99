"""What may be subtracted from what, and added to what.

Two checkpoints fit when a number at the same place means the same in both: same architecture and
sizes, same tying of the head, same token ids and same chat template.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from past_ray.config.base import StrictConfig
from past_ray.errors import SkillVectorError
from past_ray.skill.checkpoint import is_tied, read_config, read_json_object

NUM_NAMES_SHOWN = 3
"""Names listed per kind of mismatch; the counts tell the rest."""

SIZE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


class CheckpointFingerprint(StrictConfig):
    """What a checkpoint must share with another one; no weights."""

    model_type: str
    """Architecture family, such as ``qwen2``."""

    architectures: tuple[str, ...]
    """Model classes that the config names."""

    sizes: dict[str, int]
    """Widths and counts from the config."""

    tied_embeddings: bool
    """Whether the output head is the embedding matrix."""

    tokenizer: str
    """SHA-256 of the map from token to id, or ``none``."""

    chat_template: str
    """SHA-256 of the chat template, or ``none``."""


def check_same_parameters(
    left_name: str, left: Mapping[str, Tensor], right_name: str, right: Mapping[str, Tensor]
) -> None:
    """Refuse state dicts that differ in names or shapes, or that hold quantised numbers.

    Args:
        left_name: What the message calls ``left``.
        left: One state dict.
        right_name: What the message calls ``right``.
        right: The other state dict.

    Raises:
        SkillVectorError: With the counts and the first names of each kind of mismatch.
    """
    only_left = sorted(left.keys() - right.keys())
    only_right = sorted(right.keys() - left.keys())
    shared = sorted(left.keys() & right.keys())
    reshaped = [
        f"{name} {tuple(left[name].shape)} and {tuple(right[name].shape)}"
        for name in shared
        if left[name].shape != right[name].shape
    ]
    if only_left or only_right or reshaped:
        raise SkillVectorError(
            f"{left_name} and {right_name} must have the same parameters;"
            f" {len(only_left)} only in {left_name} (first: {_first(only_left)}),"
            f" {len(only_right)} only in {right_name} (first: {_first(only_right)}),"
            f" {len(reshaped)} with other shapes (first: {_first(reshaped)})."
            " Merge LoRA adapters, untie shared weights and resize embeddings the same way on both"
            " sides first."
        )
    quantised = [
        f"{name} {left[name].dtype} and {right[name].dtype}"
        for name in shared
        if not (left[name].is_floating_point() and right[name].is_floating_point())
    ]
    if quantised:
        raise SkillVectorError(
            f"{left_name} and {right_name} must hold floating point numbers;"
            f" {len(quantised)} do not (first: {_first(quantised)})."
            " Use the checkpoints from before quantisation."
        )


def check_compatible_checkpoints(left_folder: Path, right_folder: Path) -> None:
    """Refuse model folders whose weights do not mean the same, without reading the weights.

    Raises:
        SkillVectorError: With each property that differs and both its values.
        StorageError: A folder has no readable config.
    """
    check_same_fingerprint(
        str(left_folder), fingerprint(left_folder), str(right_folder), fingerprint(right_folder)
    )


def check_same_fingerprint(
    left_name: str, left: CheckpointFingerprint, right_name: str, right: CheckpointFingerprint
) -> None:
    """Refuse fingerprints that differ.

    Raises:
        SkillVectorError: With each property that differs and both its values.
    """
    left_values, right_values = _flat(left), _flat(right)
    keys = dict.fromkeys((*left_values, *right_values))
    differences = [
        f"{key} is {left_values.get(key)} and {right_values.get(key)}"
        for key in keys
        if left_values.get(key) != right_values.get(key)
    ]
    if differences:
        raise SkillVectorError(
            f"{left_name} and {right_name} must come from the same base model and tokenizer, but"
            f" {'; '.join(differences)}. Train both from one base with one recipe."
        )


def fingerprint(folder: Path) -> CheckpointFingerprint:
    """Read what ``check_compatible_checkpoints`` compares from a model folder.

    Raises:
        StorageError: The folder has no readable config.
    """
    config = read_config(folder)
    return CheckpointFingerprint(
        model_type=str(config.get("model_type", "none")),
        architectures=tuple(config.get("architectures") or ()),
        sizes=_sizes(config),
        tied_embeddings=is_tied(config),
        tokenizer=_digest(_token_ids(folder)),
        chat_template=_digest(_chat_template(folder)),
    )


def _first(names: list[str]) -> str:
    more = ", ..." if len(names) > NUM_NAMES_SHOWN else ""
    return f"[{', '.join(names[:NUM_NAMES_SHOWN])}{more}]"


def _flat(fingerprint: CheckpointFingerprint) -> dict[str, object]:
    """One level of keys, in the words of config.json."""
    values = fingerprint.model_dump()
    sizes: dict[str, int] = values.pop("sizes")
    return {**values, **sizes}


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Sizes that the config gives, and the two that it may leave to be derived from others."""
    sizes = {key: int(config[key]) for key in SIZE_KEYS if config.get(key) is not None}
    if "num_attention_heads" in sizes:
        sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
        if "hidden_size" in sizes:
            sizes.setdefault("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    return sizes


def _digest(text: str | None) -> str:
    return "none" if text is None else hashlib.sha256(text.encode()).hexdigest()


def _token_ids(folder: Path) -> str | None:
    """The map from token to id in a form that does not depend on who saved the tokenizer."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_json_object(folder / "tokenizer.json")
        vocabulary: Any = (tokenizer.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):
            vocabulary = {entry[0]: token_id for token_id, entry in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
        return json.dumps({**vocabulary, **added}, sort_keys=True)
    readers: tuple[tuple[str, Callable[[Path], str]], ...] = (
        ("vocab.json", lambda file: json.dumps(read_json_object(file), sort_keys=True)),
        ("vocab.txt", lambda file: file.read_text(encoding="utf-8")),
        ("tokenizer.model", lambda file: file.read_bytes().hex()),
    )
    return next((read(folder / name) for name, read in readers if (folder / name).is_file()), None)


def _chat_template(folder: Path) -> str | None:
    """The chat template from wherever this version of the tokenizer keeps it."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8").strip()
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json_object(folder / name).get("chat_template")
            if template is not None:
                return template.strip() if isinstance(template, str) else json.dumps(template)
    return None
