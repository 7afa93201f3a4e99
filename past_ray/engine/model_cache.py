"""Where base models are kept: ``$PAST_RAY_CACHE``, or ``~/.cache/past_ray``, by recipe."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from past_ray.config.model import CheckpointModelConfig, HubModelConfig, ModelConfig

RECIPE_VERSION = 1
"""Raised when code changes what a recipe produces; older cache entries are then ignored."""


def cached_base(model: ModelConfig) -> Path:
    """Folder of theta_base, which may not exist yet."""
    if isinstance(model, CheckpointModelConfig):
        return model.path
    name = model.kind
    if isinstance(model, HubModelConfig):
        name += f"-{model.name.replace('/', '--')}"
    return _cache() / f"{name}-{_digest(model.model_dump(mode='json'))}"


def cached_folders() -> list[Path]:
    """Every model in the cache, sorted by name."""
    return sorted(config.parent for config in _cache().glob("[!.]*/config.json"))


def cache_folder(name: str) -> Path:
    """Part ``name`` of the cache; it may not exist yet."""
    default = Path.home() / ".cache" / "past_ray"
    return Path(os.environ.get("PAST_RAY_CACHE", default)) / name


def _cache() -> Path:
    return cache_folder("base")


def _digest(recipe: Mapping[str, Any]) -> str:
    text = json.dumps({"version": RECIPE_VERSION, **recipe}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
