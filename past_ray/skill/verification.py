"""Whether a skill folder still holds what it was written with, and whether its parents agree."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from past_ray.errors import SkillVectorError
from past_ray.locations import Place, open_folder
from past_ray.skill.adapter_folder import is_adapter, read_adapter
from past_ray.skill.artefact import SkillVector, adapter_hash, check_finite, vector_hash
from past_ray.skill.blocks import (
    Chunk,
    Measures,
    TensorTotals,
    Workspace,
    block_digests,
    weights_hash,
)
from past_ray.skill.checkpoint import hash_stored
from past_ray.skill.compatibility import check_same_parameters
from past_ray.skill.extraction import Extraction
from past_ray.skill.stream import StreamSettings, measure
from past_ray.skill.weights import open_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was checked and found to be right; anything wrong is an error."""

    vector_hash: str
    """The vector's identity."""

    num_tensors: int
    """Tensors whose digests, shapes and finiteness were checked."""

    num_entries: int
    """Their entries."""

    parents: tuple[str, ...]
    """Parents that were read and agreed: ``rl``, ``sft``; empty if none were asked for."""


def verify(
    skill: Place,
    *,
    parents: bool = False,
    rl: Place | None = None,
    sft: Place | None = None,
    settings: StreamSettings | None = None,
) -> Verification:
    """Read a skill folder completely and compare it with its manifest.

    Files, index, shapes, digests, NaN and infinity are checked. With ``parents``, both parents are
    read too: their hashes must be the recorded ones, and their difference this vector.

    Args:
        skill: Skill folder.
        parents: Also check the parents, where the manifest says they were.
        rl: Where the RL weights are now, if they were moved; implies ``parents``.
        sft: Where the SFT weights are now, if they were moved; implies ``parents``.
        settings: How the work is shared out.

    Raises:
        SkillVectorError: Something is not as recorded; the message names the first five tensors.
        StorageError: A file is missing, truncated or damaged.
    """
    settings = settings or StreamSettings()
    vector = SkillVector(skill)
    manifest = vector.manifest

    def read(chunk: Chunk, workspace: Workspace) -> Measures:
        values = vector.read(chunk, workspace)
        check_finite(chunk.name, vector=values)
        vector.corrections(chunk)
        return Measures(digests={"vector": block_digests(values)})

    totals = measure(manifest.shapes, read, settings=settings)
    if vector.needs_check:
        vector.check_digests({name: total.digests["vector"] for name, total in totals.items()})
    _check_hash(
        f"{vector.folder}", "vector_hash", manifest.vector_hash, vector_hash(manifest.tensors)
    )
    checked: tuple[str, ...] = ()
    if parents or rl is not None or sft is not None:
        checked = _verify_parents(vector, rl, sft, settings)
    return Verification(
        vector_hash=manifest.vector_hash,
        num_tensors=len(manifest.tensors),
        num_entries=sum(torch.Size(shape).numel() for shape in manifest.shapes.values()),
        parents=checked,
    )


def _verify_parents(
    vector: SkillVector, rl: Place | None, sft: Place | None, settings: StreamSettings
) -> tuple[str, ...]:
    manifest = vector.manifest
    rl_place, sft_place = rl or manifest.rl_path, sft or manifest.sft_path
    if rl_place is None or sft_place is None or manifest.sft_hash is None:
        raise SkillVectorError(
            f"{vector.folder} must have been extracted from two parents, but it was made by"
            f" {manifest.operation!r}. Verify its ingredients instead."
        )
    sft_weights = open_weights(sft_place)
    if is_adapter(open_folder(rl_place)):
        found = adapter_hash(read_adapter(open_folder(rl_place)))
        _check_hash(f"rl {rl_place}", "rl_hash", manifest.rl_hash, found)
        sft_hash = hash_stored(sft_weights, settings=settings)
        _check_hash(f"sft {sft_place}", "sft_hash", manifest.sft_hash, sft_hash)
        return ("rl", "sft")
    rl_weights = open_weights(rl_place)
    check_same_parameters("rl", rl_weights.shapes(), "sft", sft_weights.shapes())
    extraction = Extraction(rl=rl_weights, sft=sft_weights)
    totals = measure(
        sft_weights.shapes(),
        lambda chunk, workspace: extraction(chunk, workspace)[1],
        settings=settings,
    )
    _check_hash(f"rl {rl_place}", "rl_hash", manifest.rl_hash, _hash(totals, "rl"))
    _check_hash(f"sft {sft_place}", "sft_hash", manifest.sft_hash, _hash(totals, "sft"))
    if vector.needs_check:
        vector.check_digests(
            {n: t.digests["vector"] for n, t in totals.items() if n in manifest.tensors}
        )
    return ("rl", "sft")


def _hash(totals: Mapping[str, TensorTotals], role: str) -> str:
    return weights_hash({name: total.digests[role] for name, total in totals.items()})


def _check_hash(label: str, key: str, recorded: str | None, found: str) -> None:
    if recorded != found:
        raise SkillVectorError(
            f"{label} must have the recorded {key} {recorded}, found {found}. It is another"
            " checkpoint, or it was changed: find the one the vector was extracted from."
        )
