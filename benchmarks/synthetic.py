"""Checkpoints of a real shape with random numbers in them: SFT, RL and target.

The shape is that of Qwen3-0.6B (about 596M parameters). RL and target are SFT plus Gaussian updates
of 1e-4 and 1e-2 of its scale, rounded to the stored dtype: as in real RL runs that are saved in
bfloat16, only some of RL's update survives. Every tensor is made, written and dropped before the
next one, so a checkpoint of any size needs little memory.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
RL_UPDATE = 1e-4
"""Standard deviation of what RL changes, relative to that of the weights."""

TARGET_UPDATE = 1e-2
"""The same for the target; large enough that sums of target and vector have to be rounded."""

WORDS = ("<pad>", "<eos>", "<unk>", "a", "skill", "is", "vector")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Qwen3 model with tied embeddings."""

    layers: int
    """Number of decoder layers."""

    vocabulary: int = 151_936
    """Rows of the embedding matrix."""

    hidden: int = 1024
    """Width of the residual stream."""

    intermediate: int = 3072
    """Width of the MLP."""

    heads: int = 16
    """Query heads."""

    kv_heads: int = 8
    """Key and value heads."""

    head_dim: int = 128
    """Width of one head."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter by name, sorted by name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm": (self.hidden,),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "self_attn.k_norm": (self.head_dim,),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        shapes["model.embed_tokens.weight"] = (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}.weight": s for name, s in block.items()}
        shapes["model.norm.weight"] = (self.hidden,)
        return dict(sorted(shapes.items()))

    def parameters(self) -> int:
        """Return how many numbers a checkpoint holds."""
        return sum(math.prod(shape) for shape in self.tensors().values())


def write_family(
    shape: Shape,
    *,
    sft: Path,
    updates: Mapping[Path, float],
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> float:
    """Write SFT's folder and one for each update; return the fraction of weights that differ.

    The folder of an update u gets ``w + u * std(w) * noise``, w being SFT's weights. The fraction
    is that of the first update: how much of it survived the rounding to ``dtype``.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    with ExitStack() as stack:
        files = [stack.enter_context(_start(folder, shape, dtype)) for folder in (sft, *updates)]
        for name, size in shape.tensors().items():
            weights, *updated = _variants(name, size, updates.values(), dtype, generator)
            for file, tensor in zip(files, (weights, *updated), strict=True):
                file.write(tensor.view(torch.uint8).numpy().data)
            changed += int(torch.count_nonzero(weights != updated[0]))
    return changed / shape.parameters()


def _variants(
    name: str,
    size: tuple[int, ...],
    updates: Iterable[float],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    noise = torch.randn(size, generator=generator)
    std = 0.1 if len(size) == 1 else 0.02
    weights = (noise * std + (1.0 if len(size) == 1 else 0.0)).to(dtype)
    yield weights
    for update in updates:
        noise.normal_(generator=generator)
        yield noise.mul_(update * std).add_(weights).to(dtype)


def _start(folder: Path, shape: Shape, dtype: torch.dtype) -> BinaryIO:
    """Write all of a model folder but the numbers, and return the open weights file."""
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", _config(shape, dtype))
    _write_json(folder / "tokenizer.json", _tokenizer())
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "chat_template": CHAT_TEMPLATE,
        },
    )
    file = (folder / WEIGHTS_FILE).open("wb")
    file.write(_safetensors_header(shape, dtype))
    return file


def _safetensors_header(shape: Shape, dtype: torch.dtype) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, size in shape.tensors().items():
        end = start + math.prod(size) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": size,
            "data_offsets": (start, end),
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _config(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def _tokenizer() -> dict[str, Any]:
    vocabulary = {word: token_id for token_id, word in enumerate(WORDS)}
    special = [
        {"id": vocabulary[word], "content": word, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False, "special": True}
        for word in ("<pad>", "<eos>", "<unk>")
    ]
    return {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
