"""Generated texts on disk, so that no text is generated twice.

::

    CACHE_DIR/<weights>/<batch>.jsonl    one line per text, one file per batch, written atomically

Files only ever appear. A job that was killed leaves the batches that it finished; two jobs on the
same folder do not disturb each other.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from past_ray.storage import read_jsonl, write_text


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedText:
    """One generated text under its key."""

    key: str
    """From ``text_key``."""

    text: str
    """Without special tokens and without white space at its ends."""

    is_truncated: bool
    """It reached its length limit."""

    num_prompt_tokens: int
    """Tokens of its prompt."""

    num_tokens: int
    """Tokens that were sampled."""


def text_key(
    prompt_ids: Sequence[int],
    *,
    weights_hash: str,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> str:
    """Return the name of a text: all that decides how it reads, hashed."""
    parts = [weights_hash, list(prompt_ids), temperature, max_new_tokens, seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class TextCache:
    """The texts of one model."""

    def __init__(self, cache_dir: Path, weights_hash: str) -> None:
        """Choose the folder; nothing is written yet.

        Args:
            cache_dir: Common to all models; on storage that all nodes share.
            weights_hash: From ``skill.checkpoint.hash_weights``.
        """
        self._folder = cache_dir.resolve() / hashlib.sha256(weights_hash.encode()).hexdigest()[:16]

    def read(self) -> dict[str, CachedText]:
        """Return all texts by key.

        Raises:
            DataError: A line is not JSON.
        """
        records = [
            record for path in sorted(self._folder.glob("*.jsonl")) for record in read_jsonl(path)
        ]
        return {record["key"]: CachedText(**record) for record in records}

    def write(self, texts: Sequence[CachedText]) -> None:
        """Add a batch; the same batch again replaces its file.

        Raises:
            StorageError: The disk is full; earlier batches are intact.
        """
        keys = "".join(text.key for text in texts)
        name = f"{hashlib.sha256(keys.encode()).hexdigest()[:16]}.jsonl"
        lines = [json.dumps(asdict(text)) + "\n" for text in texts]
        write_text(self._folder / name, "".join(lines))
