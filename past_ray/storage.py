"""Files that are either the old version or the new one, never half of each.

A directory is written under a hidden sibling name, flushed to disk and swapped into place:

    writing   .name.writing.HOST.PID.TOKEN   invisible to readers; deleted on failure
    swap      one system call (RENAME_EXCHANGE), or two renames where the file system has none
    deleting  the older version, now under the hidden name

A process killed at any point leaves ``name`` complete; its hidden sibling is deleted by the next
write to ``name``. Only between the two renames of the second form is ``name`` absent for a moment:
the older version then has the name ``.name.replaced...`` and the next write puts it back first.
"""

import ctypes
import errno
import json
import logging
import math
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from past_ray.errors import DataError, StorageError

logger = logging.getLogger(__name__)

ABANDONED_AFTER_S = 24 * 3600.0
"""A hidden sibling untouched for this long is nobody's, whatever its host and process id say."""

_NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE_TEXTS = ("No space left on device", "Disk quota exceeded")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE_ERRNOS = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


@contextmanager
def atomic_directory(path: Path) -> Generator[Path]:
    """Yield an empty directory that becomes ``path`` when the block ends without an error.

    An older directory at ``path`` is replaced as a whole: files that the block does not write are
    gone afterwards. If the block raises or the process dies, the older one stays as it was.

    Args:
        path: The final place. Missing parents are created.

    Raises:
        StorageError: The disk is full, or ``path`` is a file.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise StorageError(f"{path} must be a directory or absent, found a file. Move it away.")
    with _full_disk_explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageError(
                f"{path.parent} must be a directory or absent, found a file on the way. Choose"
                " another place."
            ) from error
        _clean_up_after_dead_writers(path)
    writing = _sibling(path, "writing")
    try:
        with _full_disk_explained(path):
            writing.mkdir()
            yield writing
            _flush_tree(writing)
            _put_in_place(writing, path)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that a reader sees the older text or the new one.

    Raises:
        StorageError: The disk is full; an older file is intact.
    """
    path = path.resolve()
    writing = _sibling(path, "writing")
    try:
        with _full_disk_explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _clean_up_after_dead_writers(path)
            with writing.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            writing.replace(path)
            _flush_directory(path.parent)
    finally:
        writing.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically.

    JSON has no NaN or infinity, so those become ``null``.

    Raises:
        StorageError: The disk is full; an older file is intact.
        TypeError: ``value`` holds something JSON cannot.
    """
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def append_jsonl(path: Path, value: object) -> None:
    """Append one line of JSON and flush it to disk. Numbers as in ``write_json``.

    A last line that a killed process left unfinished is removed first. One writer per file.

    Raises:
        StorageError: The disk is full; the earlier lines are intact.
    """
    path = path.resolve()
    line = (json.dumps(_finite(value), allow_nan=False) + "\n").encode()
    with _full_disk_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            end = _end_of_complete_lines(path)
            file.truncate(end)
            try:
                _write_all(file.fileno(), line)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def read_jsonl(path: Path) -> list[Any]:
    """Return the values of the complete lines; a missing file has none.

    An unfinished last line, which a killed writer can leave, is ignored with a warning.

    Raises:
        DataError: A complete line is not JSON; the message has its number.
    """
    if not path.exists():
        return []
    *lines, unfinished = path.read_bytes().split(b"\n")
    if unfinished:
        logger.warning("%s: ignoring an unfinished last line of %d bytes", path, len(unfinished))
    values: list[Any] = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path} line {number} must be JSON, got {error}. Remove the line to go on."
            ) from error
    return values


def _finite(value: object) -> object:
    """Copy ``value`` with non-finite floats replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        items = cast(Mapping[object, object], value).items()
        return {key: _finite(entry) for key, entry in items}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in cast(list[object], value)]
    return value


def _write_all(file_descriptor: int, content: bytes) -> None:
    """Write everything; one ``write`` to a nearly full disk may stop short without an error."""
    while content:
        content = content[os.write(file_descriptor, content) :]


def _end_of_complete_lines(path: Path) -> int:
    """Return the size of ``path`` up to and including its last newline, reading from the end."""
    block_bytes = 65536
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - block_bytes)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


@contextmanager
def _full_disk_explained(path: Path) -> Generator[None]:
    """Turn a full disk, however a library words it, into a StorageError about ``path``."""
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        raise StorageError(_full_disk_message(path)) from error


def _is_full_disk(error: Exception) -> bool:
    """Recognise a full disk; safetensors raises its own class and only the text tells."""
    if isinstance(error, StorageError):
        return isinstance(error.__cause__, Exception) and _is_full_disk(error.__cause__)
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE_ERRNOS
    return any(text in str(error) for text in _NO_SPACE_TEXTS)


def _full_disk_message(path: Path) -> str:
    """Say what is missing, what to do and what has survived."""
    place = next(parent for parent in path.parents if parent.exists())
    free_bytes = shutil.disk_usage(place).free
    survivor = (
        f"The previous version of {path.name} is intact."
        if path.exists()
        else f"There was no previous version of {path.name}, and no partial one is left behind."
    )
    return (
        f"{path} needs more space than its disk has: {free_bytes} bytes were free when writing "
        f"failed. Free space on the disk of {place} or choose another directory, then run the "
        f"same command again. {survivor}"
    )


def _sibling(path: Path, role: str) -> Path:
    """Return a fresh hidden name next to ``path`` that tells who uses it."""
    host = socket.gethostname().replace(".", "-")
    return path.parent / f".{path.name}.{role}.{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def _clean_up_after_dead_writers(path: Path) -> None:
    """Restore a version left between two renames, then delete what dead writers left."""
    prefix = f".{path.name}."
    siblings = [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]
    for sibling in siblings:
        role, *owner = sibling.name.removeprefix(prefix).split(".")
        if role not in ("writing", "replaced") or len(owner) != 3:
            continue
        if _is_alive(sibling, host=owner[0], process=owner[1]):
            continue
        if role == "replaced" and not path.exists():
            logger.warning("%s: restoring the version that a killed writer had set aside", path)
            sibling.rename(path)
        elif sibling.is_dir():
            shutil.rmtree(sibling, ignore_errors=True)
        else:
            sibling.unlink(missing_ok=True)


def _is_alive(sibling: Path, *, host: str, process: str) -> bool:
    """Tell whether the writer of a hidden sibling may still be at work."""
    try:
        newest = max(entry.stat().st_mtime for entry in (sibling, *sibling.rglob("*")))
    except FileNotFoundError:
        return True
    if time.time() - newest > ABANDONED_AFTER_S:
        return False
    if host != socket.gethostname().replace(".", "-") or not process.isdigit():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush_tree(directory: Path) -> None:
    """Force every file and directory below ``directory`` to disk."""
    for root, _, files in os.walk(directory):
        for file in files:
            _flush(Path(root, file), os.O_RDONLY)
        _flush_directory(Path(root))


def _flush_directory(directory: Path) -> None:
    _flush(directory, os.O_RDONLY | os.O_DIRECTORY)


def _flush(path: Path, flags: int) -> None:
    file_descriptor = os.open(path, flags)
    try:
        os.fsync(file_descriptor)
    finally:
        os.close(file_descriptor)


def _put_in_place(writing: Path, path: Path) -> None:
    """Give ``writing`` the name ``path``; an older ``path`` ends under a hidden name, deleted."""
    if not path.exists() and _renamed(writing, path):
        pass
    elif not _exchange(writing, path):
        replaced = _sibling(path, "replaced")
        path.rename(replaced)
        writing.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    _flush_directory(path.parent)


def _renamed(writing: Path, path: Path) -> bool:
    """Rename; False where another writer has put its version at ``path`` meanwhile."""
    try:
        writing.rename(path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


def _exchange(left: Path, right: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    rename: Callable[..., int] | None = getattr(library, "renameat2", None)
    if rename is None:
        return False
    names = (os.fsencode(left), os.fsencode(right))
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE_ERRNOS:
        return False
    raise OSError(code, os.strerror(code), str(right))
