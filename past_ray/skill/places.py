"""Where a result may go: not over what it is made from, and not over something else."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from past_ray.errors import SkillVectorError
from past_ray.locations import Folder, Place, open_folder

MARKERS = ("skill.json", "config.json", "adapter_config.json")
"""What a folder that an earlier result left has one of."""

LEFTOVERS = (".safetensors", ".json", ".jinja", ".txt", ".md", ".model")
"""What a writer that was killed may leave in a bucket, where nothing is hidden until the end."""


def check_places(outs: Sequence[Place], inputs: Sequence[Place | None]) -> None:
    """Refuse results that would replace an input, each other, or a folder of other things.

    Args:
        outs: Folders of the results.
        inputs: Folders that are read; None is left out.

    Raises:
        SkillVectorError: Two of them are one folder, a result would hold an input, or something
            that is neither a model nor a vector is in its place.
    """
    sources = [_true_name(open_folder(place)) for place in inputs if place is not None]
    results = [_true_name(open_folder(place)) for place in outs]
    for number, result in enumerate(results):
        others = (*sources, *results[:number])
        hit = next((o for o in others if o == result or o.startswith(f"{result}/")), None)
        if hit is not None:
            raise SkillVectorError(
                f"inputs and results must be different folders, but writing {result} would replace"
                f" {hit}. Choose another folder for the result."
            )
    for place in outs:
        _check_replaceable(open_folder(place))


def _true_name(folder: Folder) -> str:
    """Resolve dots and links, so that two spellings of one folder are seen as one."""
    return os.path.realpath(folder.path) if folder.is_local else folder.uri.rstrip("/")


def _check_replaceable(folder: Folder) -> None:
    if folder.is_local:
        path = Path(os.path.realpath(folder.path))
        if not path.is_dir():
            return
        found = sorted(entry.name for entry in path.iterdir())
        # A trainer keeps its checkpoints in folders beside the model; no result of ours has any.
        others = found
        if any(name in MARKERS for name in found):
            others = [name for name in found if (path / name).is_dir()]
    else:
        found = folder.names()
        others = [name for name in found if PurePosixPath(name).suffix not in LEFTOVERS]
    if others:
        raise SkillVectorError(
            f"{folder} must be absent, empty, or nothing but a model or a vector, found"
            f" {', '.join(others[:5])} in it. Give a new folder, such as {folder}/result."
        )
