"""theta_base: a model that others trained, or the world's own, trained here and cached."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from past_ray.config.model import ModelConfig, ScratchModelConfig
from past_ray.config.runtime import RuntimeConfig
from past_ray.engine.model_cache import cached_base
from past_ray.engine.model_sources import obtain_model
from past_ray.engine.models import check_model_folder, init_scratch_model
from past_ray.runtime.sft_trainer import train_sft
from past_ray.sft.examples import SFTExample, chat_example, document_examples
from past_ray.tasks import world

OnStep = Callable[[Mapping[str, float]], None]


def prepare_base(model: ModelConfig, runtime: RuntimeConfig, *, on_step: OnStep) -> Path:
    """Return the folder of theta_base, making it first where the cache has none.

    Raises:
        ConfigError: If there is no such model, or it is unfit for training and serving.
    """
    if not isinstance(model, ScratchModelConfig):
        return obtain_model(model)
    folder = cached_base(model)
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
