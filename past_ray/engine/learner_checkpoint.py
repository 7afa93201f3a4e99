"""Checkpoints of a learner that can prove they are whole.

The last file written is a list of all others with their sizes and hashes. ``verify_checkpoint``
compares, before an older checkpoint is dropped and before a run goes on from one. Nothing here
needs torch.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from past_ray.errors import StorageError
from past_ray.locations import open_folder
from past_ray.storage import write_json

MANIFEST_FILE = "checkpoint.json"
STATE_FILE = "learner.json"
OPTIMIZER_FILE = "optimizer.pt"
RANDOM_FILE = "random.pt"
ADAPTER_FILE = "adapter.pt"

HASH_THREADS = 4
"""Files hashed at once; hashing runs outside of Python's lock."""


def write_extra_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put a run's own files beside the learner's.

    Raises:
        StorageError: If a name is not plain or belongs to the learner.
    """
    for name, content in files.items():
        if Path(name).name != name or name == MANIFEST_FILE or (folder / name).exists():
            raise StorageError(
                f"Extra files of a checkpoint need plain names that are free, got {name!r}. Choose "
                "another name."
            )
        (folder / name).write_bytes(content)


def write_manifest(folder: Path) -> None:
    """List every file of ``folder`` with its size and SHA-256; call it last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        digests = list(pool.map(_sha256, files))
    entries = {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for name, path, digest in zip(names, files, digests, strict=True)
    }
    write_json(folder / MANIFEST_FILE, {"files": entries})


def verify_checkpoint(folder: Path) -> None:
    """Read a checkpoint and compare every file with the list written at its end.

    Raises:
        StorageError: The list or a file is missing, cut short or changed; the message names it.
    """
    files = _listed_files(folder)
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise _invalid(folder, f"{name} is missing")
        size = path.stat().st_size
        if size != entry.get("bytes"):
            raise _invalid(folder, f"{name} has {size} bytes instead of {entry.get('bytes')}")
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        digests = pool.map(_sha256, (folder / name for name in files))
        for (name, entry), digest in zip(files.items(), digests, strict=True):
            if digest != entry.get("sha256"):
                raise _invalid(folder, f"{name} has changed: its SHA-256 is {digest[:12]}...")


def _listed_files(folder: Path) -> dict[str, dict[str, Any]]:
    if not (folder / MANIFEST_FILE).is_file():
        raise _invalid(folder, f"{MANIFEST_FILE}, which is written last, is missing")
    files = open_folder(folder).read_json(MANIFEST_FILE).get("files")
    entries = cast("dict[str, Any]", files if isinstance(files, dict) else {"": files})
    if not all(isinstance(entry, dict) for entry in entries.values()):
        raise _invalid(folder, f"{MANIFEST_FILE} is no list of files")
    return entries


def _invalid(folder: Path, found: str) -> StorageError:
    return StorageError(
        f"{folder} must be a complete checkpoint, but {found}. Delete the folder and continue from "
        "an older checkpoint."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
