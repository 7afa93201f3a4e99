"""What an endpoint said, on disk: one file per request, so any number of judges can share it."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from past_ray.errors import StorageError
from past_ray.storage import write_json

logger = logging.getLogger(__name__)


class VerdictCache:
    """Replies by request. A file that cannot be read counts as missing and is written again."""

    def __init__(self, folder: Path | None) -> None:
        """Use ``folder``, created when needed; None remembers nothing."""
        self._folder = folder

    def get(self, request: dict[str, Any]) -> str | None:
        """Return the reply to an equal request, or None."""
        if self._folder is None:
            return None
        path = _place(self._folder, request)
        try:
            reply = json.loads(path.read_text(encoding="utf-8"))["reply"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: ignoring a cached verdict: %s", path, type(error).__name__)
            return None
        return reply if isinstance(reply, str) else None

    def put(self, request: dict[str, Any], reply: str) -> None:
        """Keep a reply, with its request beside it for the reader.

        Raises:
            StorageError: The disk is full, or the folder cannot be written.
        """
        if self._folder is None:
            return
        try:
            write_json(_place(self._folder, request), {"request": request, "reply": reply})
        except OSError as error:
            raise StorageError(
                f"cache_dir {self._folder} must be a folder that can be written, got "
                f"{type(error).__name__}. Choose another place."
            ) from error


def _place(folder: Path, request: dict[str, Any]) -> Path:
    text = json.dumps(request, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()
    return folder / name[:2] / f"{name}.json"
