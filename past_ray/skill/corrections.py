"""Corrections of a dense skill folder: what float32 differences could not hold, kept sparsely."""

import threading
from typing import Any

import torch

from past_ray.errors import StorageError
from past_ray.locations import Folder
from past_ray.skill.arithmetic import Corrections
from past_ray.skill.blocks import Chunk, digest_of, weights_hash
from past_ray.skill.manifest import CORRECTIONS_FILE, SkillManifest
from past_ray.skill.weights import StoredWeights


def corrections_digest(corrections: Corrections | None) -> str | None:
    """Return the digest of a tensor's corrections; None without any."""
    if corrections is None:
        return None
    entries, values = corrections
    return weights_hash({"entries": digest_of(entries), "values": digest_of(values)})


class StoredCorrections:
    """Corrections of a dense skill folder; sparse, so those of a few tensors are kept in memory."""

    NUM_KEPT = 8

    def __init__(self, folder: Folder, manifest: SkillManifest) -> None:
        corrected = [name for name, r in manifest.tensors.items() if r.corrections_digest]
        names = [f"{name}.{key}" for name in corrected for key in ("entries", "values")]
        self._stored = StoredWeights(folder, dict.fromkeys(names, CORRECTIONS_FILE))
        self._folder = folder
        self._digests = {name: manifest.tensors[name].corrections_digest for name in corrected}
        self._kept: dict[str, Corrections] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_stored": self._stored, "_folder": self._folder, "_digests": self._digests}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept={}, _lock=threading.Lock())

    def within(self, chunk: Chunk) -> Corrections | None:
        """Return the corrections of a chunk, numbered from its start; None without any."""
        if chunk.name not in self._digests:
            return None
        entries, values = self._of(chunk.name)
        bounds = torch.tensor([chunk.start, chunk.stop])
        first, last = torch.searchsorted(entries, bounds).tolist()
        if first == last:
            return None
        return entries[first:last] - chunk.start, values[first:last]

    def _of(self, name: str) -> Corrections:
        with self._lock:
            if name not in self._kept:
                found = (
                    self._stored.tensor(f"{name}.entries"),
                    self._stored.tensor(f"{name}.values"),
                )
                if corrections_digest(found) != self._digests[name]:
                    raise StorageError(
                        f"the corrections of {name} must be those that were saved, found others in"
                        f" {self._folder}. It was changed or damaged: copy or extract it again."
                    )
                if len(self._kept) >= self.NUM_KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[name] = found
            return self._kept[name]
