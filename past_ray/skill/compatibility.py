"""What may be subtracted from what, and added to what.

Two checkpoints fit when a number at the same place means the same in both: same architecture and
sizes, same tying of the head, same token ids and same chat template.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from past_ray.config.base import StrictConfig
from past_ray.errors import SkillVectorError
from past_ray.locations import Folder, Place, open_folder
from past_ray.skill.safetensors_file import FLOAT_DTYPES
from past_ray.skill.weights import CONFIG_FILE, is_tied

NUM_NAMES_SHOWN = 5
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


class HasDtype(Protocol):
    """A tensor in memory (``torch.float32``) or in a file (``F32``)."""

    @property
    def dtype(self) -> object:
        """What its numbers are stored in."""
        ...


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
    left_name: str,
    left: Mapping[str, tuple[int, ...]],
    right_name: str,
    right: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse parameters that differ in names or shapes.

    Args:
        left_name: What the message calls ``left``.
        left: Shapes by name.
        right_name: What the message calls ``right``.
        right: Shapes by name.

    Raises:
        SkillVectorError: With the counts and the first names of each kind of mismatch.
    """
    only_left = sorted(left.keys() - right.keys())
    only_right = sorted(right.keys() - left.keys())
    reshaped = _reshaped(left, right)
    if only_left or only_right or reshaped:
        raise SkillVectorError(
            f"{left_name} and {right_name} must have the same parameters;"
            f" {len(only_left)} only in {left_name} (first: {_first(only_left)}),"
            f" {len(only_right)} only in {right_name} (first: {_first(only_right)}),"
            f" {len(reshaped)} with other shapes (first: {_first(reshaped)})."
            " Merge LoRA adapters, untie shared weights and resize embeddings the same way on both"
            " sides first."
        )


def check_has_parameters(
    model_name: str,
    model: Mapping[str, tuple[int, ...]],
    vector_name: str,
    vector: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse a vector with a parameter that the model does not have in the same shape.

    Raises:
        SkillVectorError: With the counts and the first names of each kind of mismatch.
    """
    absent = sorted(vector.keys() - model.keys())
    reshaped = _reshaped(model, vector)
    if absent or reshaped or not vector:
        raise SkillVectorError(
            f"{model_name} must have every parameter of {vector_name}, which has {len(vector)};"
            f" {len(absent)} are absent (first: {_first(absent)}), {len(reshaped)} have other"
            f" shapes (first: {_first(reshaped)}). Use a model of the vector's architecture with"
            " the same vocabulary."
        )


def check_float_tensors(label: str, tensors: Mapping[str, HasDtype]) -> None:
    """Refuse numbers that are quantised, integer, or wider than float32.

    Args:
        label: What the message calls them.
        tensors: Tensors in memory or in files, by name.

    Raises:
        SkillVectorError: With the count and the first names.
    """
    allowed = {*FLOAT_DTYPES, *FLOAT_DTYPES.values()}
    others = sorted(f"{n} {t.dtype}" for n, t in tensors.items() if t.dtype not in allowed)
    if others:
        raise SkillVectorError(
            f"{label} must hold floating point numbers in {', '.join(FLOAT_DTYPES)};"
            f" {len(others)} tensors do not (first: {_first(others)})."
            " Use the checkpoint from before quantisation, or convert float64 to float32."
        )


def check_compatible_checkpoints(left: Place, right: Place) -> None:
    """Refuse model folders whose weights do not mean the same, without reading the weights.

    Raises:
        SkillVectorError: With each property that differs and both its values.
        StorageError: A folder has no readable config.
    """
    check_same_fingerprint(str(left), fingerprint(left), str(right), fingerprint(right))


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


def fingerprint(place: Place) -> CheckpointFingerprint:
    """Read what ``check_compatible_checkpoints`` compares from a model folder.

    Raises:
        StorageError: The folder has no readable config.
        SkillVectorError: The model is quantised.
    """
    folder = open_folder(place)
    config = folder.read_json(CONFIG_FILE)
    if config.get("quantization_config"):
        raise SkillVectorError(
            f"{folder} must not be quantised, found quantization_config"
            f" {config['quantization_config'].get('quant_method', '')} in its {CONFIG_FILE}."
            " Use the checkpoint from before quantisation."
        )
    return CheckpointFingerprint(
        model_type=str(config.get("model_type", "none")),
        architectures=tuple(config.get("architectures") or ()),
        sizes=_sizes(config),
        tied_embeddings=is_tied(config),
        tokenizer=_digest(_token_ids(folder)),
        chat_template=_digest(_chat_template(folder)),
    )


def _reshaped(
    left: Mapping[str, tuple[int, ...]], right: Mapping[str, tuple[int, ...]]
) -> list[str]:
    return [
        f"{name} {tuple(left[name])} and {tuple(right[name])}"
        for name in sorted(left.keys() & right.keys())
        if tuple(left[name]) != tuple(right[name])
    ]


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


def _token_ids(folder: Folder) -> str | None:
    """The map from token to id in a form that does not depend on who saved the tokenizer."""
    if folder.has("tokenizer.json"):
        tokenizer = folder.read_json("tokenizer.json")
        vocabulary: Any = (tokenizer.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):
            vocabulary = {entry[0]: token_id for token_id, entry in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
        return json.dumps({**vocabulary, **added}, sort_keys=True)
    readers: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("vocab.json", lambda file: json.dumps(folder.read_json(file), sort_keys=True)),
        ("vocab.txt", folder.read_text),
        ("tokenizer.model", lambda file: folder.read_bytes(file).hex()),
    )
    return next((read(name) for name, read in readers if folder.has(name)), None)


def _chat_template(folder: Folder) -> str | None:
    """The chat template from wherever this version of the tokenizer keeps it."""
    if folder.has("chat_template.jinja"):
        return folder.read_text("chat_template.jinja").strip()
    for name in ("chat_template.json", "tokenizer_config.json"):
        if folder.has(name):
            template = folder.read_json(name).get("chat_template")
            if template is not None:
                return template.strip() if isinstance(template, str) else json.dumps(template)
    return None
