"""Rows of a data set on the Hugging Face hub, where the package ``datasets`` is installed.

A name is ``hf:<data set>:<split>`` or ``hf:<data set>:<configuration>:<split>``, for example
``hf:rajpurkar/squad:train`` and ``hf:bigai-nlco/LooGLE:shortdep_qa:test``.
"""

import importlib
import re
from types import ModuleType
from typing import cast

from past_ray.errors import DataError

PREFIX = "hf:"


def is_hub_name(path: str) -> bool:
    """Tell a name on the hub from the path of a file."""
    return path.startswith(PREFIX)


def file_name(name: str) -> str:
    """Return what the ids of the passages start with: ``squad-train`` for ``hf:x/squad:train``."""
    return re.sub(r"\W+", "-", name.removeprefix(PREFIX).rpartition("/")[2])


def load_rows(name: str) -> list[object]:
    """Return all rows of one split, in its order; the first call downloads it.

    Raises:
        DataError: A malformed name, no package ``datasets``, or no such data set within reach.
    """
    data_set, *configuration, split = _name_parts(name)
    datasets = _import_datasets(name)
    try:
        rows = datasets.load_dataset(data_set, *configuration, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name} must be within reach on the Hugging Face hub, got {type(error).__name__}:"
            f" {error}. Check the name and the network, or pass the path of a local file instead."
        ) from error
    return cast(list[object], rows.to_list())


def _name_parts(name: str) -> list[str]:
    """Return the data set, at times its configuration, and the split."""
    parts = name.removeprefix(PREFIX).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(
            f"{name} must have the form hf:<data set>:<split> or"
            " hf:<data set>:<configuration>:<split>, as hf:rajpurkar/squad:train. Complete it."
        )
    return parts


def _import_datasets(name: str) -> ModuleType:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{name} needs the package datasets, found none. Run 'pip install datasets', or pass"
            " the path of a local file instead."
        ) from error
