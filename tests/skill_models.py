"""Skill vectors and adapters for tests, with one weight that is large enough to be cut into chunks.

All of them grew from one base, so any of them may be added to any of their models.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from past_ray.skill import SkillManifest, extract
from past_ray.skill.adapter import Adapter, LoraModule
from past_ray.skill.adapter_folder import write_adapter
from tests.skill_folders import bits, make_checkpoint, nudged, random_tensors

WIDE = "model.layers.0.mlp.down_proj.weight"
"""Six blocks, the last one short: chunks of 1 to 5 blocks are all different."""

SMALL = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.self_attn.q_proj.bias": (24,),
    "model.layers.0.self_attn.q_proj.weight": (24, 16),
    "model.layers.1.mlp.down_proj.weight": (16, 32),
    "model.layers.1.self_attn.q_proj.weight": (24, 16),
    "model.norm.weight": (16,),
}
SHAPES = dict(sorted((SMALL | {WIDE: (1400, 1001)}).items()))

Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
D1 = "model.layers.1.mlp.down_proj.weight"


def make_model(
    folder: Path, *, seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, **config: object
) -> Path:
    """Write a relative of the base."""
    weights = nudged(random_tensors(0, shapes), seed=1000 + seed)
    return make_checkpoint(folder, weights, config=config)


def make_skill(
    folder: Path,
    *,
    seed: int,
    by: float = 0.01,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> SkillManifest:
    """Write ``folder`` and its parents ``folder.rl`` and ``folder.sft``."""
    sft = nudged(random_tensors(0, shapes), seed=2000 + seed)
    rl = nudged(sft, seed=3000 + seed, by=by)
    return make_skill_of(folder, rl=rl, sft=sft)


def make_skill_of(
    folder: Path, *, rl: Mapping[str, Tensor], sft: Mapping[str, Tensor]
) -> SkillManifest:
    """Write the skill vector of given parents."""
    parents = [
        make_checkpoint(folder.with_suffix(suffix), tensors)
        for suffix, tensors in ((".rl", rl), (".sft", sft))
    ]
    return extract(*parents, folder)


def unruly(weights: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """Return weights that moved so far that float32 differences are not exact.

    Every third entry becomes tiny and changes its sign.
    """
    moved = nudged(weights, seed=seed)
    for tensor in moved.values():
        tensor.view(-1)[::3] *= -1e-5
    return moved


def make_adapter(
    folder: Path,
    *names: str,
    seed: int,
    rank: int = 3,
    scaling: float = 0.5,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> Path:
    """Write a PEFT adapter that changes the weights called ``names``."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: LoraModule(
            a=torch.randn(rank, shapes[name][1], generator=generator),
            b=0.01 * torch.randn(shapes[name][0], rank, generator=generator),
            scaling=scaling,
        )
        for name in names
    }
    write_adapter(folder, Adapter(modules=modules, config={}), base_model=None)
    return folder


def is_absent(folder: Path) -> bool:
    """Tell whether neither the folder nor what is left of writing it is there."""
    return not [entry for entry in folder.parent.iterdir() if folder.name in entry.name]


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors are equal bit for bit, signs of zeros included."""
    return left.keys() == right.keys() and all(
        torch.equal(bits(left[name]), bits(right[name])) for name in left
    )


def distance(found: Tensor, expected: Tensor) -> float:
    """Return how far tensors are apart relative to the second, in the Frobenius norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
