"""Folders on a local disk, on NFS, in S3 and in Google Cloud Storage, read and written one way.

    /data/skill  ~/skill  file:///data/skill    a local disk, or whatever is mounted there
    s3://bucket/skill                           S3, or a store that speaks its protocol
    gs://bucket/skill                           Google Cloud Storage

A ``Folder`` is only a name: it holds no connection, compares by value and crosses processes. A
local one is written by ``past_ray.storage``, one in a bucket by ``past_ray.object_store``.
"""

# pyarrow's files have no types that pyright can read.
# pyright: reportUnknownParameterType=false

import json
import os
import stat
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

from past_ray import object_store
from past_ray.errors import StorageError
from past_ray.storage import atomic_directory

if TYPE_CHECKING:
    from pyarrow import NativeFile


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder by name; ``open_folder`` makes it.

    Every method raises ``StorageError`` when the store does not answer, refuses these credentials
    or has no such bucket, and when a name leads out of the folder.
    """

    uri: str
    """``/absolute/path`` for a local folder, else ``s3://bucket/key`` or ``gs://bucket/key``."""

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self._uri_of(name))

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on a disk or a mount of this machine."""
        return self.uri.startswith("/")

    @property
    def path(self) -> Path:
        """The path of a local folder."""
        if not self.is_local:
            raise StorageError(f"{self} must be a local folder here. Copy it to a disk first.")
        return Path(self.uri)

    def has(self, name: str) -> bool:
        """Tell whether ``name`` is a file in the folder."""
        uri = self._uri_of(name)
        if not self.is_local:
            return object_store.is_file(uri)
        with object_store.explained(uri):
            return Path(uri).is_file()

    def exists(self) -> bool:
        """Tell whether the folder exists."""
        if not self.is_local:
            return object_store.is_folder(self.uri)
        with object_store.explained(self.uri):
            return self.path.is_dir()

    def names(self) -> list[str]:
        """Return the names of the files directly inside, sorted; none if there is no folder."""
        if not self.is_local:
            return sorted(object_store.file_names(self.uri))
        with object_store.explained(self.uri):
            entries = self.path.iterdir() if self.path.is_dir() else ()
            return sorted(entry.name for entry in entries if entry.is_file())

    def size(self, name: str) -> int:
        """Return the number of bytes in a file."""
        with self.open(name) as file:
            return file.size

    def read_bytes(self, name: str) -> bytes:
        """Return a whole file; meant for small ones."""
        with self.open(name) as file:
            content = bytearray(file.size)
            file.read_into(memoryview(content), 0)
        return bytes(content)

    def read_text(self, name: str) -> str:
        """Return a UTF-8 file."""
        content = self.read_bytes(name)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise StorageError(
                f"{self._uri_of(name)} must be UTF-8 text, got {error.reason} at byte "
                f"{error.start}. Write it again."
            ) from error

    def read_json(self, name: str) -> dict[str, Any]:
        """Return a file that holds one JSON object."""
        text = self.read_text(name)
        must_hold = f"{self._uri_of(name)} must hold a JSON object"
        try:
            value: object = json.loads(text)
        except ValueError as error:
            raise StorageError(f"{must_hold}, got {error}. Write it again.") from error
        if not isinstance(value, dict):
            raise StorageError(f"{must_hold}, got a {type(value).__name__}. Write it again.")
        return cast(dict[str, Any], value)

    def open(self, name: str) -> "RandomAccessFile":
        """Open a file for reading at any offset."""
        uri = self._uri_of(name)
        if not self.is_local:
            return RandomAccessFile(uri, object_store.open_file(uri))
        with object_store.explained(uri):
            return RandomAccessFile(uri, _open_descriptor(uri))

    def _uri_of(self, name: str) -> str:
        """Return the address of ``name``."""
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise StorageError(
                f"A name in {self} must be plain, without '/' and not '..', got {name!r}. "
                f"Go into a subfolder by folder / 'name'."
            )
        return f"{self.uri.rstrip('/')}/{name}"


Place = str | Path | Folder
"""Whatever ``open_folder`` takes."""


def open_folder(place: Place) -> Folder:
    """Return the folder that ``place`` names, whether or not it exists.

    Args:
        place: A path (``~`` is the home directory), ``file:///path``, ``s3://bucket/key`` or
            ``gs://bucket/key``.

    Raises:
        StorageError: ``place`` is none of these.
    """
    if isinstance(place, Folder):
        return place
    if isinstance(place, Path) and place.parts[:1] in (("file:",), ("s3:",), ("gs:",)):
        raise StorageError(f"{place} must be given as text: a Path drops a slash of its scheme.")
    scheme, separator, rest = str(place).partition("://")
    if not separator:
        return Folder(str(Path(place).expanduser().absolute()))
    if scheme == "file" and rest.startswith("/"):
        return Folder(str(Path(unquote(rest))))
    if scheme in object_store.HOW_TO_CONNECT and rest.strip("/"):
        return Folder(f"{scheme}://{rest.strip('/')}")
    raise StorageError(
        f"{place} must be a path, file:///path, s3://bucket/key or gs://bucket/key; the schemes "
        f"are file, s3 and gs. Correct it, or mount the store and give the path."
    )


class RandomAccessFile:
    """A file open for reading. Several threads may read at once, each at an offset of its own."""

    size: int
    """Bytes in the file when it was opened."""

    def __init__(self, uri: str, file: "int | NativeFile") -> None:
        self._uri = uri
        self._file: int | NativeFile | None = file
        self.size = os.fstat(file).st_size if isinstance(file, int) else file.size()

    def __enter__(self) -> "RandomAccessFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        """Let the file go with the last reader; several threads and closures may share one."""
        self.close()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        file, self._file = self._file, None
        if isinstance(file, int):
            os.close(file)
        elif file is not None:
            file.close()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes from ``offset`` on.

        Raises:
            StorageError: The file has fewer bytes, or reading failed.
        """
        end = offset + buffer.nbytes
        if end > self.size:
            raise self._too_short(end, self.size)
        if buffer.nbytes == 0:
            return
        rest = buffer.cast("B")
        while rest:
            with object_store.explained(self._uri):
                count = self._read_some(rest, end - len(rest))
            if count == 0:
                raise self._too_short(end, end - len(rest))
            rest = rest[count:]

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        """Fill the beginning of ``buffer``; return how many bytes of it."""
        if self._file is None:
            raise ValueError("read of closed file")
        if isinstance(self._file, int):
            return os.preadv(self._file, [buffer], offset)
        content: bytes = self._file.read_at(min(len(buffer), object_store.PIECE_BYTES), offset)
        buffer[: len(content)] = content
        return len(content)

    def _too_short(self, needed: int, found: int) -> StorageError:
        return StorageError(
            f"{self._uri} must have at least {needed} bytes, found {found}. It is truncated: write "
            f"or copy it again."
        )


def _open_descriptor(path: str) -> int:
    """Open a file as a number: a file object would complain of garbage that holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(path)
    return descriptor


class FolderWriter:
    """What a ``write_folder`` block writes to."""

    path: Path
    """A local directory; the files written into it become the folder."""

    def __init__(self, path: Path, upload: object_store.Upload | None = None) -> None:
        self.path = path
        self._upload: object_store.Upload | object_store.DetachedUpload | None = upload

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "uri": None if self._upload is None else self._upload.uri}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy in another process: on shared storage the same path, else an own one."""
        self.path, self._upload = state["path"], None
        if state["uri"] is not None:
            self._upload = object_store.DetachedUpload(state["uri"])
            self.path = self._upload.path

    def expect(self, names: Iterable[str]) -> None:
        """Say which files copies of this writer in other processes will finish."""
        if isinstance(self._upload, object_store.Upload):
            self._upload.expect(names)

    def finished(self, name: str) -> None:
        """Say that file ``name`` in ``path`` is complete.

        A bucket takes it at once and it leaves ``path``, so that a folder larger than the local
        disk can be written. The commit file stays until the end all the same.
        """
        if self._upload is not None:
            self._upload.finished(name)


@contextmanager
def write_folder(place: Place, *, commit: str) -> Generator[FolderWriter]:
    """Write a folder that is complete, for readers, once it has its commit file.

    An older version is replaced: files that the block does not write are gone afterwards, in a
    bucket those directly in the folder. If the block raises, a local folder stays as it was, and
    one in a bucket has no commit file any more if ``finished`` was called.

    Args:
        place: Where to write.
        commit: Name of the file, written by the block, whose presence means "complete".

    Raises:
        StorageError: ``place`` cannot be written, or the block wrote no file ``commit``.
    """
    folder = open_folder(place)
    if not folder.is_local:
        with object_store.upload_folder(folder.uri, commit=commit) as upload:
            yield FolderWriter(upload.path, upload)
        return
    with atomic_directory(folder.path) as path:
        yield FolderWriter(path)
        if not (path / commit).is_file():
            raise StorageError(f"{folder} must get a file {commit!r} from its writer, found none.")
