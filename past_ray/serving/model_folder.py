"""What must be in a model folder before it is served, and what it says about its origin."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from past_ray.errors import ConfigError

RECORD_NAME = "past_ray.json"
"""What injecting a skill vector leaves beside the weights it saves."""

_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """Where a model's weights come from; None is unknown.

    Example of the file: ``{"operation": "inject", "target_hash": "1f..", "skill_hash": "9a..",
    "scale": 1.0, "policy_version": 60}``. Only ``scale`` and ``policy_version`` are interpreted.
    """

    policy_version: int | None
    """Optimizer steps of reinforcement learning behind the skill."""

    skill_scale: float | None
    """Factor of the skill vector that was added; ``scale`` in the file."""

    lineage: dict[str, Any] | None
    """The whole file: the parents' hashes and how they were put together."""


def check_model_folder(folder: Path, *, max_model_len: int | None) -> Path:
    """Return the absolute path of ``folder`` if an engine can load a model from it.

    Args:
        folder: Hugging Face model folder.
        max_model_len: Tokens of prompt plus completion that the model must allow; None to skip.

    Raises:
        ConfigError: The folder or a part of the model is missing, or the model is too short.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"the model must be a Hugging Face folder, found no folder {folder}. "
            "Give the folder that a job saved, for example runs/demo/adapted."
        )
    config = _read_json_object(folder / "config.json")
    for what, patterns in (("weights", _WEIGHT_PATTERNS), ("a tokenizer", _TOKENIZER_NAMES)):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ConfigError(
                f"{folder} must hold {what} ({' or '.join(patterns)}), found none. "
                "Save model and tokenizer with save_pretrained into one folder."
            )
    limit = config.get("max_position_embeddings")
    if max_model_len is not None and isinstance(limit, int) and max_model_len > limit:
        raise ConfigError(
            f"max_model_len must be at most the model's {limit} positions, got {max_model_len}. "
            "Lower it, or leave it out to use the model's limit."
        )
    return folder


def read_model_record(folder: Path) -> ModelRecord:
    """Return what ``past_ray.json`` in ``folder`` says; all unknown when there is none.

    Raises:
        ConfigError: The file is there but is no JSON object, or a value has the wrong type.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return ModelRecord(policy_version=None, skill_scale=None, lineage=None)
    record = _read_json_object(path)
    version, scale = record.get("policy_version"), record.get("scale")
    is_version = version is None or (isinstance(version, int) and not isinstance(version, bool))
    is_scale = scale is None or (isinstance(scale, int | float) and not isinstance(scale, bool))
    if not is_version or not is_scale:
        raise ConfigError(
            f"policy_version (integer) and scale (number) in {path} must be numbers or null, "
            f"got {version!r} and {scale!r}. Correct the file or delete it."
        )
    return ModelRecord(
        policy_version=version,
        skill_scale=None if scale is None else float(scale),
        lineage=record,
    )


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} must be a readable JSON file, found: {type(error).__name__}. "
            "Give a Hugging Face model folder that is complete."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value
