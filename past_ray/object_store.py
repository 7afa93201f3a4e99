"""Files in S3 and Google Cloud Storage: look, open, and upload a folder that commits as a whole.

A bucket has no rename, so one file, the *commit* file, tells a reader that a folder is complete:

    enter     the store answers and the bucket exists               nothing has changed
    upload    older commit file deleted, then file after file       no commit file: not complete
    commit    the commit file uploaded, the last one                complete
    tidy      older files that were not written again are deleted   complete

A writer that fails deletes what it uploaded. One that is killed leaves files without a commit
file; the next write to the same folder overwrites or deletes them. Credentials and addresses come
from the environment, as for every other client of these stores.
"""

# pyarrow's file systems have no types that pyright can read.
# pyright: reportUnknownParameterType=false

import contextlib
import functools
import logging
import os
import tempfile
import textwrap
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from past_ray.errors import StorageError

if TYPE_CHECKING:  # Importing pyarrow takes 0.2 s, and local folders do without it.
    from pyarrow import NativeFile
    from pyarrow.fs import FileInfo, FileSystem

logger = logging.getLogger(__name__)

PIECE_BYTES = 16 * 2**20
"""Bytes of one write to a store."""

PIECES_IN_FLIGHT = 4
"""Pieces of a file uploaded at the same time. Without a limit pyarrow queues the whole file."""

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 10.0
"""An S3 request that moves no byte for this long has failed."""

S3_ATTEMPTS = 3
GS_RETRY_S = 5.0
"""For how long Google's client tries again; with its pauses it takes up to twice as long.

A server that accepts a request and says nothing holds it for 120 s; pyarrow has no setting for it.
"""

SAID_CHARACTERS = 500
"""Of a store's own message; Google's names its reason near the 450th."""

HOW_TO_CONNECT = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine an "
    "instance role; for a store other than AWS set AWS_ENDPOINT_URL.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`, or "
    "give the machine a service account.",
}
"""What a person does about a store that refuses or does not answer, by scheme."""


def is_file(uri: str) -> bool:
    """Tell whether there is a file of this name."""
    return _info(uri).is_file


def is_folder(uri: str) -> bool:
    """Tell whether anything lies under this name."""
    from pyarrow.fs import FileType

    return _info(uri).type == FileType.Directory


def file_names(uri: str) -> list[str]:
    """Return the names of the files directly in a folder; none if there is no folder."""
    from pyarrow.fs import FileSelector

    filesystem, key = _connect(uri)
    with explained(uri):
        infos = filesystem.get_file_info(FileSelector(key, allow_not_found=True))
    if not infos:
        _require_bucket(uri)
    return [info.base_name for info in infos if info.is_file]


def open_file(uri: str) -> "NativeFile":
    """Open a file for reading; its ``read_at`` may be called by several threads at once."""
    filesystem, key = _connect(uri)
    with explained(uri):
        try:
            return filesystem.open_input_file(key)
        except FileNotFoundError:
            _require_bucket(uri)
            raise


@contextmanager
def upload_folder(uri: str, *, commit: str) -> Generator["Upload"]:
    """Yield an ``Upload``; when the block ends without an error the folder is complete.

    Raises:
        StorageError: The folder is a whole bucket or cannot be written, or the block wrote no file
            ``commit``.
    """
    with tempfile.TemporaryDirectory(prefix="past_ray.", ignore_cleanup_errors=True) as path:
        upload = Upload(uri, path=Path(path), commit=commit)
        try:
            yield upload
            upload.complete()
        except BaseException:
            upload.undo()
            raise


class Upload:
    """Takes files from ``path`` to a folder in a bucket, in the order given at the top."""

    path: Path
    """A local directory for the files in progress."""

    def __init__(self, uri: str, *, path: Path, commit: str) -> None:
        self.path = path
        self.uri = uri
        self._commit = commit
        self._filesystem, self._key = _connect(uri)
        if "/" not in self._key:
            raise StorageError(
                f"{uri} must name a folder to replace, found a whole bucket. Write to {uri}/NAME."
            )
        self._existed = is_folder(uri)
        self._older = file_names(uri)
        self._uploaded: list[str] = []

    def finished(self, name: str) -> None:
        """Upload a file and delete it from ``path``; the commit file waits for ``complete``."""
        if name != self._commit:
            self._upload(name)

    def expect(self, names: Iterable[str]) -> None:
        """Note files before they are uploaded, here or by a ``DetachedUpload`` elsewhere.

        An upload that fails can leave a shortened file behind; what is noted can be undone.
        """
        if not self._uploaded and self._commit in self._older:
            with explained(self.uri):
                self._delete(self._commit)
        self._uploaded.extend(names)

    def complete(self) -> None:
        """Upload what is left, commit, and delete what only the older version had."""
        for file in sorted(file for file in self.path.rglob("*") if file.is_file()):
            self.finished(file.relative_to(self.path).as_posix())
        self._upload(self._commit)
        with self._best_effort():
            for name in set(self._older) - set(self._uploaded):
                self._delete(name)

    def undo(self) -> None:
        """Delete what was uploaded, the commit file first, as far as the store lets us."""
        with self._best_effort():
            for name in sorted(set(self._uploaded), key=lambda name: name != self._commit):
                self._delete(name)
            if self._uploaded and not self._existed:
                self._delete_folder_if_empty()

    def _upload(self, name: str) -> None:
        file = self.path / name
        if not file.is_file():
            raise StorageError(f"{file} must be written before it is finished, found no file.")
        self.expect([name])
        upload_file(file, f"{self.uri}/{name}")
        file.unlink()

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(f"{self._key}/{name}")

    def _delete_folder_if_empty(self) -> None:
        """Delete the empty object that pyarrow leaves in S3 in place of a last file."""
        from pyarrow.fs import FileSelector

        everything = FileSelector(self._key, recursive=True, allow_not_found=True)
        if not any(info.is_file for info in self._filesystem.get_file_info(everything)):
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.delete_dir(self._key)

    @contextmanager
    def _best_effort(self) -> Generator[None]:
        """Log what the store refuses, and do not ask it for the rest: each wait takes seconds."""
        try:
            yield
        except _failures(self.uri) as error:
            logger.warning("%s: could not delete all that is not needed: %s", self.uri, error)


class DetachedUpload:
    """Uploads some files of a folder from another process than the one with the ``Upload``."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._directory = tempfile.TemporaryDirectory(
            prefix="past_ray.", ignore_cleanup_errors=True
        )
        self.path = Path(self._directory.name)
        """A local directory for the files in progress; it goes with this object."""

    def finished(self, name: str) -> None:
        """Upload a file and delete it from ``path``."""
        upload_file(self.path / name, f"{self.uri}/{name}")
        (self.path / name).unlink()


def upload_file(file: Path, uri: str) -> None:
    """Write a local file to a store, a few pieces in memory at a time."""
    filesystem, key = _connect(uri)
    with (
        explained(uri),
        file.open("rb") as source,
        filesystem.open_output_stream(key) as target,
    ):
        for number, piece in enumerate(iter(lambda: source.read(PIECE_BYTES), b""), start=1):
            target.write(piece)
            if number % PIECES_IN_FLIGHT == 0:
                target.flush()


@contextmanager
def explained(uri: str) -> Generator[None]:
    """Turn an error of a store or a disk into a StorageError that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(
            f"{uri} must be a file, found none. Check the name, and that its writer has finished."
        ) from error
    except _failures(uri) as error:
        scheme, separator, _ = uri.partition("://")
        said = textwrap.shorten(str(error), SAID_CHARACTERS, placeholder=" ...")
        if not separator:
            message = f"{uri} must be readable, got: {said}. Check its name and its permissions."
        else:
            message = (
                f"{uri} must lie in a store that answers and grants access. {_store(scheme)} "
                f"said: {said.rstrip('.')}. {HOW_TO_CONNECT[scheme]}"
            )
        raise StorageError(message) from error


def _failures(uri: str) -> tuple[type[Exception], ...]:
    """Return what a disk or pyarrow raises when an operation on ``uri`` fails."""
    if "://" not in uri:
        return OSError, ValueError
    from pyarrow import ArrowException

    return OSError, ValueError, ArrowException


def _require_bucket(uri: str) -> None:
    """Raise a StorageError if the bucket of ``uri`` does not exist."""
    from pyarrow.fs import FileType

    scheme, _, path = uri.partition("://")
    bucket = path.partition("/")[0]
    filesystem, _ = _connect(uri)
    try:
        found = filesystem.get_file_info(bucket).type != FileType.NotFound
    except _failures(uri):
        return  # Access to some keys of a bucket does not include a look at the bucket.
    if not found:
        raise StorageError(
            f"{uri} must lie in an existing bucket, but {_store(scheme)} has no bucket {bucket!r}. "
            f"Create it or correct the name. {HOW_TO_CONNECT[scheme]}"
        )


def _info(uri: str) -> "FileInfo":
    from pyarrow.fs import FileType

    filesystem, key = _connect(uri)
    with explained(uri):
        info = filesystem.get_file_info(key)
    if info.type == FileType.NotFound:
        _require_bucket(uri)
    return info


def _store(scheme: str) -> str:
    """Name the store for a message; an address may hold a password, which is left out."""
    name = {"s3": "S3", "gs": "Google Cloud Storage"}[scheme]
    address = _endpoint(scheme).rpartition("@")[2].rpartition("://")[2]
    return f"{name} at {address}" if address else name


def _endpoint(scheme: str) -> str:
    """Return the address of a store that is not the public one, else an empty string."""
    variables = {
        "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "gs": ("STORAGE_EMULATOR_HOST",),
    }
    return next((os.environ[name] for name in variables[scheme] if os.environ.get(name)), "")


def _connect(uri: str) -> "tuple[FileSystem, str]":
    """Return the connection for ``uri`` and the name there, ``bucket/key``."""
    scheme, _, key = uri.partition("://")
    return _filesystem(scheme, _endpoint(scheme)), key


@functools.cache
def _filesystem(scheme: str, endpoint: str) -> "FileSystem":
    """Return one connection pool per store and process; it does not survive pickling or a fork."""
    from pyarrow import fs

    protocol, _, host = endpoint.rstrip("/").rpartition("://")
    if scheme == "s3":
        return fs.S3FileSystem(
            scheme=protocol or None,
            endpoint_override=host or None,
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=SILENCE_TIMEOUT_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
            # A small file is then one request instead of three.
            allow_delayed_open=True,
        )
    return fs.GcsFileSystem(
        anonymous=bool(host),
        scheme=(protocol or "http") if host else None,
        endpoint_override=host or None,
        retry_time_limit=timedelta(seconds=GS_RETRY_S),
    )
