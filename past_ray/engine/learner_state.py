"""What a learner keeps beside its weights: files of tensors, the state of its random numbers."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from past_ray.errors import StorageError


def write_state(file: Path, value: object) -> None:
    """Write what ``read_state`` returns.

    Raises:
        OSError: If the disk is full, which PyTorch hides in an error about positions.
    """
    with file.open("wb") as opened:
        try:
            torch.save(value, opened)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def read_state(file: Path) -> object:
    """Return what ``write_state`` wrote.

    Raises:
        StorageError: If there is no such file.
    """
    if not file.is_file():
        raise StorageError(
            f"{file.parent} must be a checkpoint of the same kind of run, found no {file.name}. "
            "Use the rl.lora settings of the run that saved it, or start the run anew."
        )
    return torch.load(file, map_location="cpu", weights_only=True)


def random_state(device: str) -> dict[str, Tensor]:
    """Return the state of PyTorch's random numbers on the CPU and on ``device``."""
    states = {"cpu": torch.get_rng_state()}
    if device != "cpu":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor], *, device: str) -> None:
    """Go on drawing where ``random_state`` was taken."""
    torch.set_rng_state(states["cpu"])
    if device != "cpu" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
