"""What a skill folder says about itself: ``skill.json`` and the card for human readers.

The format is specified in ``docs/skill-format.md``.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3
from pydantic import Field, ValidationError

import past_ray
from past_ray.build_info import git_commit
from past_ray.config.base import StrictConfig
from past_ray.errors import SkillVectorError, StorageError
from past_ray.locations import Folder, Place, open_folder
from past_ray.skill.compatibility import CheckpointFingerprint

FORMAT_VERSION = 2
MANIFEST_FILE = "skill.json"
CARD_FILE = "README.md"
CORRECTIONS_FILE = "corrections.safetensors"


class TensorRecord(StrictConfig):
    """One parameter of the vector."""

    shape: tuple[int, ...]
    """Of the parameter; of ``B @ A`` in the LoRA form."""

    digest: str
    """BLAKE3 of the stored tensor; of ``A`` and ``B`` together in the LoRA form."""

    norm: float
    """Frobenius norm."""

    num_unchanged: int | None = None
    """Entries that are equal in both parents; None where it was not counted."""

    num_corrections: int = 0
    """Entries that float32 alone would not give back exactly."""

    corrections_digest: str | None = None
    """BLAKE3 of the corrections; None without any."""

    num_bf16_changed: int | None = None
    """Entries that would still differ if both parents were rounded to bfloat16."""

    bf16_norm: float | None = None
    """Frobenius norm of the difference of the parents rounded to bfloat16."""

    bf16_cosine: float | None = None
    """Between that difference and this one; None where one of them is zero."""

    energy_kept: float | None = None
    """Share of the squared norm that a truncated SVD kept."""


class Ingredient(StrictConfig):
    """A vector that this one was made from."""

    vector_hash: str
    """Its ``vector_hash``."""

    weight: float
    """Its factor."""

    task: str
    """Its source task."""


class SkillManifest(StrictConfig):
    """What a skill vector was made from, and what it may be added to."""

    format_version: int
    """Layout of the folder; this code reads version 2."""

    form: Literal["dense", "lora"]
    """Differences entry by entry, or a PEFT adapter."""

    vector_hash: str
    """Hash of all ``tensors``: the vector's identity."""

    rl_hash: str | None
    """Hash of the weights after RL; None for a vector that was put together from others.

    In the LoRA form this is the adapter's own hash.
    """

    sft_hash: str | None
    """Hash of the SFT weights that were subtracted, or under the adapter."""

    base_hash: str | None
    """Hash of the model that SFT started from, if it was given."""

    parent_hash: str | None
    """``vector_hash`` of the previous refinement round, which warmed up this round's RL."""

    fingerprint: CheckpointFingerprint
    """Architecture, tokenizer and chat template that a target must share."""

    dtype: str
    """Of the differences: always ``float32``."""

    rl_dtype: str | None
    """In which the RL masters were stored."""

    sft_dtype: str | None
    """In which the SFT masters were stored."""

    rl_path: str | None
    """Where the RL weights were; a hint for ``verify --parents``."""

    sft_path: str | None
    """Where the SFT weights were."""

    task: str
    """Source task, such as the name of its data set."""

    source_data_hash: str | None
    """BLAKE3 of the files that the source domain was trained on."""

    refinement_round: int = Field(ge=0)
    """The paper's k."""

    rl_recipe: dict[str, Any] | None
    """Settings of the RL run."""

    reward: str | None
    """Name of its reward."""

    seed: int | None
    """Seed of the run that trained the parents."""

    operation: str
    """``extract``, ``combine``, ``select`` or ``truncated_svd``, with its settings."""

    ingredients: tuple[Ingredient, ...] = ()
    """Vectors that were combined, or the one that was selected from."""

    created: str
    """UTC time in ISO 8601."""

    past_ray_version: str
    """Version of this package."""

    git_commit: str | None
    """Commit of the source tree that this package runs from; None if installed without one."""

    base_sketch: dict[str, tuple[float, ...]]
    """A few SFT weights of some matrices; tells whether a target grew from the same base."""

    tensors: dict[str, TensorRecord]
    """Every parameter of the vector, sorted."""

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole vector."""
        return math.sqrt(math.fsum(record.norm**2 for record in self.tensors.values()))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter."""
        return {name: record.shape for name, record in self.tensors.items()}


class Provenance(StrictConfig):
    """What only the one who trained the parents knows; all of it is kept in the manifest."""

    task: str = "unnamed"
    """Source task, such as the name of its data set."""

    refinement_round: int = Field(default=1, ge=0)
    """The paper's k."""

    source_data_hash: str | None = None
    """BLAKE3 of the files that the source domain was trained on."""

    rl_recipe: dict[str, Any] | None = None
    """Settings of the RL run."""

    reward: str | None = None
    """Name of its reward."""

    seed: int | None = None
    """Seed of the run that trained the parents."""


def stamp() -> dict[str, str | None]:
    """Return when and by what something is being written."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "past_ray_version": past_ray.__version__,
        "git_commit": git_commit(),
    }


def hash_files(paths: Sequence[Path]) -> str:
    """Return the BLAKE3 of files' names and contents, wherever they are, for ``source_data_hash``.

    Raises:
        StorageError: A file cannot be read.
    """
    lines: list[str] = []
    for path in paths:
        try:
            lines.append(f"{path.name}\0{blake3().update_mmap(path).hexdigest()}\n")
        except OSError as error:
            raise StorageError(f"{path} must be a readable file, got: {error}.") from error
    return blake3("".join(sorted(lines)).encode()).hexdigest()


def load_manifest(place: Place) -> SkillManifest:
    """Return the manifest of a skill folder without reading its weights.

    Raises:
        SkillVectorError: It is no skill folder, or one of another format version.
    """
    folder = open_folder(place)
    try:
        values = folder.read_json(MANIFEST_FILE)
    except StorageError as error:
        raise SkillVectorError(
            f"{folder} must be a skill folder with a {MANIFEST_FILE}: {error}"
        ) from error
    if values.get("format_version") != FORMAT_VERSION:
        raise SkillVectorError(
            f"{folder} must have format_version {FORMAT_VERSION}, got"
            f" {values.get('format_version')}. Read it with the past_ray that wrote it, version"
            f" {values.get('past_ray_version')}, or extract it again."
        )
    try:
        return SkillManifest.model_validate(values)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors()[:5]
        )
        raise SkillVectorError(
            f"{folder}/{MANIFEST_FILE} must be a skill manifest, got: {found}. Extract it again."
        ) from error


def is_skill(folder: Folder) -> bool:
    """Tell whether a folder holds a skill vector."""
    return folder.has(MANIFEST_FILE)


def bf16_cost(tensors: Mapping[str, TensorRecord]) -> dict[str, float] | None:
    """Return what rounding the parents to bfloat16 costs the vector; None if it was not measured.

    ``share_changed`` of all entries still differ after rounding; ``cosine`` is between the
    difference of the rounded parents and the vector; ``noise_to_signal`` is the norm of what they
    differ by over the norm of the vector.
    """
    records = [record for record in tensors.values() if record.bf16_norm is not None]
    numel = sum(math.prod(record.shape) for record in records)
    square = math.fsum(record.norm**2 for record in records)
    if not numel or square == 0:
        return None
    rounded = math.fsum((r.bf16_norm or 0.0) ** 2 for r in records)
    inner = math.fsum((r.bf16_cosine or 0.0) * (r.bf16_norm or 0.0) * r.norm for r in records)
    noise = max(rounded - 2 * inner + square, 0.0)
    return {
        "share_changed": sum(record.num_bf16_changed or 0 for record in records) / numel,
        "cosine": inner / math.sqrt(rounded * square) if rounded else math.nan,
        "noise_to_signal": math.sqrt(noise / square),
    }


def energy_kept(tensors: Mapping[str, TensorRecord]) -> float | None:
    """Return the share of the matrices' squared norm that a truncated SVD kept; None without one.

    The norm of what was kept is recorded, so the whole's is ``norm**2 / energy_kept``.
    """
    records = [record for record in tensors.values() if record.energy_kept]
    if not records:
        return None
    whole = math.fsum(r.norm**2 / r.energy_kept for r in records if r.energy_kept)
    return math.fsum(record.norm**2 for record in records) / whole if whole else None


def card(manifest: SkillManifest) -> str:
    """Render the folder's README."""
    rows = {
        "form": manifest.form,
        "made by": manifest.operation,
        "architecture": manifest.fingerprint.model_type,
        "tensors": f"{len(manifest.tensors)} in {manifest.dtype}",
        "Frobenius norm": f"{manifest.norm:.6g}",
        "masters": f"RL {manifest.rl_dtype}, SFT {manifest.sft_dtype}",
        "RL weights": manifest.rl_hash,
        "SFT weights": manifest.sft_hash,
        "base weights": manifest.base_hash,
        "previous round's vector": manifest.parent_hash,
        "this vector": manifest.vector_hash,
        "source data": manifest.source_data_hash,
        "reward": manifest.reward,
        "seed": manifest.seed,
        "made": f"{manifest.created} with past_ray {manifest.past_ray_version}",
    }
    if (energy := energy_kept(manifest.tensors)) is not None:
        rows["energy kept by the rank"] = f"{energy:.1%} of the matrices in layers"
    rows |= {
        f"ingredient {number}, {part.task}": f"{part.vector_hash} * {part.weight}"
        for number, part in enumerate(manifest.ingredients, start=1)
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    return f"""# Skill vector: {manifest.task}, refinement round {manifest.refinement_round}

This folder holds differences of weights, not a model: what RL on the source task changed in a
checkpoint that had been fine-tuned on the source documents.

| | |
| --- | --- |
{table}
{_bf16_sentence(manifest)}
Add it to a model that was fine-tuned on other documents from the same base, and check it:

```bash
past-ray skill inject TARGET THIS_FOLDER --scale 1 -o ADAPTED
past-ray skill verify THIS_FOLDER
```
"""


def _bf16_sentence(manifest: SkillManifest) -> str:
    cost = bf16_cost(manifest.tensors)
    if cost is None:
        return ""
    return f"""
Parents stored in bfloat16 would leave {cost["share_changed"]:.2%} of the entries different and a
vector of cosine {cost["cosine"]:.4f} to this one (noise {cost["noise_to_signal"]:.3g} of the
signal).
"""
