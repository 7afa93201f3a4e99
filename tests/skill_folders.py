"""Small model folders for tests of skill vectors: any tensors in any files, without transformers.

The weights are written by the safetensors library, so that what our code reads was not written by
our code.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 13,
    "tie_word_embeddings": False,
}
TOKENIZER = {"model": {"vocab": {"anna": 0, "ben": 1}}, "added_tokens": []}
CHAT_TEMPLATE = "{{ messages }}"

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (13, 6),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.self_attn.q_proj.bias": (6,),
    "model.layers.0.mlp.up_proj.weight": (11, 6),
    "model.layers.1.self_attn.q_proj.weight": (6, 6),
    "model.layers.1.mlp.up_proj.weight": (11, 6),
    "model.norm.weight": (6,),
    "lm_head.weight": (13, 6),
}
"""A model of two layers; names are Qwen2's, sizes are odd."""


def random_tensors(
    seed: int,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return normally distributed weights."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}


def nudged(tensors: Mapping[str, Tensor], seed: int, *, by: float = 0.01) -> dict[str, Tensor]:
    """Return the tensors after noise was added: what fine-tuning does, with a few sign changes."""
    noise = random_tensors(seed, {name: tuple(t.shape) for name, t in tensors.items()})
    return {n: (t.float() + by * noise[n]).to(t.dtype) for n, t in tensors.items()}


def make_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    shard_bytes: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder, or replace the weights of one.

    Args:
        folder: Created if it is missing.
        tensors: Weights.
        shard_bytes: Start another file when one has this many bytes; None writes one file and no
            index.
        config: Entries of config.json that differ from ``CONFIG``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if shard_bytes is None:
        save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    else:
        _save_shards(folder, tensors, shard_bytes)
    write_json(folder / "config.json", CONFIG | dict(config or {}))
    write_json(folder / "tokenizer.json", TOKENIZER)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def edit_json(file: Path, **changes: object) -> None:
    """Set keys of a JSON file."""
    write_json(file, json.loads(file.read_text()) | changes)


def write_json(file: Path, value: object) -> None:
    """Write JSON."""
    file.write_text(json.dumps(value))


def flip_byte(file: Path, position: int) -> None:
    """Invert the lowest bit of one byte; negative positions count from the end."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bit patterns, in which 0.0 and -0.0 differ."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert found[name].shape == expected[name].shape, name
        assert torch.equal(bits(found[name]), bits(expected[name])), name


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of a folder's files without the time at which they were made."""
    stamp = re.compile(rb'"created": "[^"]*"|\| made \| [^|]*\|')
    return {file.name: stamp.sub(b"", file.read_bytes()) for file in folder.iterdir()}


def names(folder: Path) -> list[str]:
    """Return what lies in a folder, hidden entries too."""
    return sorted(entry.name for entry in folder.iterdir())


def _save_shards(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and _num_bytes(shards[-1].values()) + _num_bytes([tensor]) > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
