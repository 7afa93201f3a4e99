"""Whether a skill folder still holds what it was written with, and whether its parents agree."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from past_ray.errors import SkillVectorError, StorageError
from past_ray.locations import Place, open_folder
from past_ray.skill.adapter_folder import is_adapter, read_adapter
from past_ray.skill.artefact import (
    SkillVector,
    adapter_hash,
    check_finite,
    tensor_record,
    vector_sums,
)
from past_ray.skill.blocks import (
    Chunk,
    Measures,
    TensorTotals,
    Workspace,
    block_digests,
    digests_of,
    weights_hash,
)
from past_ray.skill.checkpoint import hash_stored
from past_ray.skill.compatibility import check_same_parameters
from past_ray.skill.extraction import Extraction
from past_ray.skill.stream import StreamSettings, measure
from past_ray.skill.weights import StoredWeights, open_weights

NORM_TOLERANCE = 1e-9
"""Relative; a sum of float64 squares is right to better than this in any order."""


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
        measures = Measures(digests={"vector": block_digests(values)}, sums=vector_sums(values))
        if (found := vector.corrections(chunk)) is not None:
            measures.corrections.append(found)
        return measures

    totals = measure(manifest.shapes, read, settings=settings)
    if vector.needs_check:
        vector.check_digests(digests_of(totals, "vector"))
        _check_records(vector, totals)
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
    sft_weights = _open_parent("sft", sft_place)
    if is_adapter(open_folder(rl_place)):
        found = adapter_hash(read_adapter(open_folder(rl_place)))
        _check_hash(f"rl {rl_place}", "rl_hash", manifest.rl_hash, found)
        sft_hash = hash_stored(sft_weights, settings=settings)
        _check_hash(f"sft {sft_place}", "sft_hash", manifest.sft_hash, sft_hash)
        if manifest.operation == "extract":
            _check_hash(str(vector.folder), "rl_hash", manifest.rl_hash, manifest.vector_hash)
        return ("rl", "sft")
    rl_weights = _open_parent("rl", rl_place)
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


def _open_parent(role: str, place: Place) -> StoredWeights:
    try:
        return open_weights(place)
    except StorageError as error:
        raise StorageError(
            f"the {role} parent must be readable at {place}: {error} If it was moved, say where it"
            f" is now with --{role} ({role}=...)."
        ) from error


def _check_records(vector: SkillVector, totals: Mapping[str, TensorTotals]) -> None:
    """Compare what the manifest says of each dense tensor with the tensor."""
    for name, total in totals.items():
        recorded = vector.manifest.tensors[name]
        found = tensor_record(recorded.shape, total)
        for key in ("norm", "num_unchanged", "num_corrections"):
            said, is_now = getattr(recorded, key), getattr(found, key)
            # Another processor may add in another order, which moves the last digits of a norm.
            if said is not None and not math.isclose(said, is_now, rel_tol=NORM_TOLERANCE):
                raise SkillVectorError(
                    f"{vector.folder} must agree with its manifest, but {key} of {name} is recorded"
                    f" as {said} and is {is_now}. The manifest was changed: copy or extract it"
                    " again."
                )


def _hash(totals: Mapping[str, TensorTotals], role: str) -> str:
    return weights_hash(digests_of(totals, role))


def _check_hash(label: str, key: str, recorded: str | None, found: str) -> None:
    if recorded != found:
        raise SkillVectorError(
            f"{label} must have the recorded {key} {recorded}, found {found}. It is another"
            " checkpoint, or it was changed: find the one the vector was extracted from."
        )
