"""Parents of many dtypes and shapes, and both operations that stream over models."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from past_ray.skill import Rounding, StreamSettings, blocks, extract, inject
from tests.skill_folders import contents, make_checkpoint, random_tensors

SHAPES = {
    "model.embed_tokens.weight": (31, 6),
    "model.layers.0.self_attn.q_proj.bias": (),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (7, 9),
    "model.layers.1.mlp.none.weight": (0, 4),
    "model.norm.weight": (17,),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float32)


@pytest.fixture(name="small_blocks")
def small_blocks_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks so small that every tensor has several."""
    monkeypatch.setattr(blocks, "BLOCK", 8)


@pytest.fixture(name="parents")
def parents_fixture(tmp_path: Path) -> tuple[Path, Path]:
    """Two model folders whose weights have so little in common that there are corrections."""
    sft = {n: w.to(DTYPES[i % 3]) for i, (n, w) in enumerate(random_tensors(0, SHAPES).items())}
    make_checkpoint(tmp_path / "rl", random_tensors(1, SHAPES))
    make_checkpoint(tmp_path / "sft", sft)
    return tmp_path / "rl", tmp_path / "sft"


def python(script: str, *arguments: object, **options: int) -> "subprocess.Popen[str]":
    """Start a script in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def both(folder: Path, options: StreamSettings) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Extract and inject in ``folder``; return the bytes of both results."""
    rl, sft, skill, adapted = (folder / name for name in ("rl", "sft", "skill", "adapted"))
    extract(rl, sft, skill, settings=options)
    rounding = Rounding(dtype="bfloat16", seed=3)
    inject(sft, skill, adapted, scale=0.3, rounding=rounding, settings=options)
    return contents(skill), contents(adapted)
