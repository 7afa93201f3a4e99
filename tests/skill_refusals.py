"""Models and a vector that fit together, to be damaged by tests, and how operations refuse them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from past_ray.errors import PastRayError, SkillVectorError
from past_ray.skill import extract, inject
from past_ray.skill.checkpoint import load_weights
from tests.skill_folders import make_checkpoint, names, nudged, random_tensors

NORM = "model.norm.weight"
ROLES = ("rl", "sft", "target")


@pytest.fixture(name="folder", autouse=True)
def folder_fixture(tmp_path: Path) -> Path:
    """Folders that fit together: rl, sft and target, the parents' vector, and a base."""
    weights = random_tensors(0)
    make_checkpoint(tmp_path / "base", weights, shard_bytes=300)
    make_checkpoint(tmp_path / "sft", nudged(weights, 1), shard_bytes=300)
    make_checkpoint(tmp_path / "rl", nudged(weights, 2), shard_bytes=300)
    make_checkpoint(tmp_path / "target", nudged(weights, 3), shard_bytes=300)
    extract(tmp_path / "rl", tmp_path / "sft", tmp_path / "skill")
    return tmp_path


def use(folder: Path, role: str) -> None:
    """Run the operation that reads the model called ``role``."""
    if role == "target":
        inject(folder / "target", folder / "skill", folder / "out")
    else:
        extract(folder / "rl", folder / "sft", folder / "out", base=folder / "base")


def refusal(
    run: Callable[..., object],
    *arguments: object,
    error: type[PastRayError] = SkillVectorError,
    **options: object,
) -> str:
    """Return the message with which ``run`` refuses its arguments; nothing may be written."""
    with pytest.raises(error) as caught:
        run(*arguments, **options)
    return str(caught.value)


def refused(folder: Path, role: str, *, error: type[PastRayError] = SkillVectorError) -> str:
    """Return the message with which the model called ``role`` is refused."""
    before = names(folder)
    message = refusal(use, folder, role, error=error)
    assert names(folder) == before
    assert message.endswith(".")
    return message


def change(folder: Path, role: str, **tensors: Tensor) -> None:
    """Replace weights of a model; dots in names are written as double underscores."""
    weights = load_weights(folder / role)
    weights |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    make_checkpoint(folder / role, weights)
