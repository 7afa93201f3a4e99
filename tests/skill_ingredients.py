"""Skill vectors that tests combine, and the model that they all fit."""

from pathlib import Path

import pytest
from torch import Tensor

from past_ray.skill import load_skill
from tests.skill_models import make_model, make_skill

CUTS = [(1, 1), (2, 1), (1, 5), (2, 4), (3, 3), (4, 2)]
"""Numbers of workers and of blocks in a chunk, none of which may change a byte."""


@pytest.fixture(name="one")
def one_fixture(tmp_path: Path) -> Path:
    """Write a vector."""
    make_skill(tmp_path / "one", seed=1)
    return tmp_path / "one"


@pytest.fixture(name="two")
def two_fixture(tmp_path: Path) -> Path:
    """Write a vector that is twice as long."""
    make_skill(tmp_path / "two", seed=2, by=0.02)
    return tmp_path / "two"


@pytest.fixture(name="sft")
def sft_fixture(tmp_path: Path) -> Path:
    """Write a model."""
    return make_model(tmp_path / "sft", seed=0)


def vector(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a skill vector, of an adapter the dense ones."""
    return load_skill(folder).vector
