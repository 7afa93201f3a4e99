"""Skill vectors on disk.

A skill folder holds::

    model.safetensors   the differences, float32, under the parameters' names
    skill.json          SkillManifest: what it was made from, and its own hash
    README.md           the same for a human reader

and injecting one gives a plain Hugging Face model folder plus ``past_ray.json`` with its lineage.
"""

import logging
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import past_ray
from past_ray.build_info import git_commit
from past_ray.config.base import StrictConfig
from past_ray.errors import SkillVectorError, StorageError
from past_ray.skill.arithmetic import extract_skill_vector, inject_skill_vector
from past_ray.skill.checkpoint import (
    WEIGHTS_FILE,
    hash_tensors,
    hash_weights,
    load_weights,
    main_dtype,
    read_json_object,
    save_tensors,
    write_checkpoint,
)
from past_ray.skill.compatibility import (
    CheckpointFingerprint,
    check_compatible_checkpoints,
    check_same_fingerprint,
    fingerprint,
)
from past_ray.skill.geometry import frobenius_norm
from past_ray.storage import atomic_directory, write_json, write_text

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST_FILE = "skill.json"
CARD_FILE = "README.md"
LINEAGE_FILE = "past_ray.json"


class SkillManifest(StrictConfig):
    """What a skill vector was made from, and what it may be added to."""

    format_version: int
    """Layout of the folder; this code reads version 1."""

    vector_hash: str
    """SHA-256 of the differences themselves; checked on loading."""

    rl_hash: str
    """SHA-256 of the weights after RL."""

    sft_hash: str
    """SHA-256 of the SFT weights that were subtracted."""

    base_hash: str | None
    """SHA-256 of the model that SFT started from, if it was given."""

    parent_hash: str | None
    """``vector_hash`` of the previous refinement round, which warmed up this round's RL."""

    fingerprint: CheckpointFingerprint
    """Architecture, tokenizer and chat template that a target must share."""

    dtype: str
    """Of the differences: always ``float32``."""

    rl_dtype: str
    """In which the RL weights were stored."""

    sft_dtype: str
    """In which the SFT weights were stored."""

    task: str
    """Source task, such as the name of its data set."""

    refinement_round: int = Field(ge=0)
    """The paper's k."""

    seed: int
    """Seed of the run that trained the parents."""

    created: str
    """UTC time in ISO 8601."""

    past_ray_version: str
    """Version of this package."""

    git_commit: str | None
    """Commit of the source tree that this package runs from; None if installed without one."""

    norms: dict[str, float]
    """Frobenius norm of each tensor."""


def extract_to_folder(
    rl_folder: Path,
    sft_folder: Path,
    out: Path,
    *,
    task: str,
    refinement_round: int,
    seed: int,
    base_folder: Path | None = None,
    parent: Path | None = None,
) -> SkillManifest:
    """Write the skill vector ``rl - sft`` as a folder, atomically, and return its manifest.

    Args:
        rl_folder: Model folder after RL on the source domain.
        sft_folder: Model folder of the same round's SFT, which is subtracted.
        out: Where the skill folder goes.
        task: Source task, for the manifest.
        refinement_round: The paper's k, for the manifest.
        seed: Seed of the run, for the manifest.
        base_folder: The model that SFT started from; only hashed and compared.
        parent: Skill folder of the previous round, if RL started from ``sft`` plus that vector.

    Raises:
        SkillVectorError: The folders do not fit together, or the difference is not finite.
        StorageError: A folder is unreadable, or the disk is full.
    """
    check_compatible_checkpoints(rl_folder, sft_folder)
    if base_folder is not None:
        check_compatible_checkpoints(base_folder, sft_folder)
    prints = fingerprint(sft_folder)
    parent_hash = None if parent is None else _parent_hash(parent, prints, refinement_round)
    rl, sft = load_weights(rl_folder), load_weights(sft_folder)
    _warn_if_rounded(rl_folder, rl)
    _warn_if_rounded(sft_folder, sft)
    vector = extract_skill_vector(rl=rl, sft=sft)
    manifest = SkillManifest(
        format_version=FORMAT_VERSION,
        vector_hash=hash_tensors(vector),
        rl_hash=hash_tensors(rl),
        sft_hash=hash_tensors(sft),
        base_hash=None if base_folder is None else hash_weights(base_folder),
        parent_hash=parent_hash,
        fingerprint=prints,
        dtype="float32",
        rl_dtype=main_dtype(rl),
        sft_dtype=main_dtype(sft),
        task=task,
        refinement_round=refinement_round,
        seed=seed,
        created=_now(),
        past_ray_version=past_ray.__version__,
        git_commit=git_commit(),
        norms=_finite_norms(vector),
    )
    if manifest.rl_hash == manifest.sft_hash:
        logger.warning("%s and %s hold the same weights: zero vector", rl_folder, sft_folder)
    _write_skill(out, vector, manifest)
    return manifest


def load_skill(folder: Path) -> tuple[dict[str, Tensor], SkillManifest]:
    """Return the differences and the manifest of a skill folder.

    Raises:
        SkillVectorError: It is no skill folder, or its weights are not the ones it was saved with.
    """
    manifest = load_manifest(folder)
    try:
        vector = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise SkillVectorError(
            f"{folder} must hold a readable {WEIGHTS_FILE}, got: {error}. Extract the skill again."
        ) from error
    found = hash_tensors(vector)
    if found != manifest.vector_hash:
        raise SkillVectorError(
            f"the weights in {folder} must hash to the manifest's {manifest.vector_hash}, got"
            f" {found}. The folder was changed or damaged: extract the skill again."
        )
    return vector, manifest


def load_manifest(folder: Path) -> SkillManifest:
    """Return the manifest of a skill folder without reading its weights.

    Raises:
        SkillVectorError: It is no skill folder, or one of another format version.
    """
    try:
        values = read_json_object(folder / MANIFEST_FILE)
    except StorageError as error:
        raise SkillVectorError(
            f"{folder} must be a skill folder with a {MANIFEST_FILE}: {error}"
        ) from error
    if values.get("format_version") != FORMAT_VERSION:
        raise SkillVectorError(
            f"{folder} must have format_version {FORMAT_VERSION}, got"
            f" {values.get('format_version')}. Read it with the past_ray that wrote it, version"
            f" {values.get('past_ray_version')}."
        )
    try:
        return SkillManifest.model_validate(values)
    except ValidationError as error:
        raise SkillVectorError(
            f"{folder / MANIFEST_FILE} must be a skill manifest, got: {error}. Extract it again."
        ) from error


def inject_to_folder(target_folder: Path, skill_folder: Path, out: Path, *, scale: float) -> None:
    """Write ``target + scale * skill`` as a model folder, atomically.

    The result has the target's dtype, config, tokenizer and chat template. ``past_ray.json`` in
    it records the hashes of target and skill and the scale.

    Raises:
        SkillVectorError: Target and skill do not fit together, or the skill folder is damaged.
        StorageError: A folder is unreadable, or the disk is full.
    """
    vector, manifest = load_skill(skill_folder)
    check_same_fingerprint(
        f"target {target_folder}",
        fingerprint(target_folder),
        f"skill {skill_folder}",
        manifest.fingerprint,
    )
    target = load_weights(target_folder)
    adapted = inject_skill_vector(target=target, skill_vector=vector, scale=scale)
    with atomic_directory(out) as writing:
        write_checkpoint(writing, adapted, like=target_folder)
        lineage = {
            "operation": "inject",
            "target_hash": hash_tensors(target),
            "skill_hash": manifest.vector_hash,
            "scale": scale,
            "task": manifest.task,
            "refinement_round": manifest.refinement_round,
            "created": _now(),
            "past_ray_version": past_ray.__version__,
        }
        write_json(writing / LINEAGE_FILE, lineage)


def _parent_hash(parent: Path, prints: CheckpointFingerprint, refinement_round: int) -> str:
    """Check that ``parent`` is an earlier round of the same model and return its hash."""
    manifest = load_manifest(parent)
    check_same_fingerprint("this round", prints, f"parent {parent}", manifest.fingerprint)
    if manifest.refinement_round >= refinement_round:
        raise SkillVectorError(
            f"the parent must be of an earlier refinement round, got round"
            f" {manifest.refinement_round} in {parent} for round {refinement_round}."
            " Give the skill folder of the round before."
        )
    return manifest.vector_hash


def _warn_if_rounded(folder: Path, weights: Mapping[str, Tensor]) -> None:
    dtype = main_dtype(weights)
    if dtype not in ("float32", "float64"):
        logger.warning(
            "%s is stored in %s: RL updates smaller than its rounding are lost to the skill vector."
            " Save parents in float32.",
            folder,
            dtype,
        )


def _finite_norms(vector: Mapping[str, Tensor]) -> dict[str, float]:
    norms = {name: frobenius_norm(tensor) for name, tensor in vector.items()}
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        raise SkillVectorError(
            f"a skill vector must be finite; {len(broken)} tensors are not (first:"
            f" {broken[:3]}). Training diverged: look at the loss and lower the learning rate."
        )
    return norms


def _write_skill(out: Path, vector: Mapping[str, Tensor], manifest: SkillManifest) -> None:
    with atomic_directory(out) as writing:
        save_tensors(writing / WEIGHTS_FILE, vector)
        write_json(writing / MANIFEST_FILE, manifest.model_dump(mode="json"))
        write_text(writing / CARD_FILE, _card(manifest))


def _card(manifest: SkillManifest) -> str:
    """Render the folder's README."""
    norm = math.sqrt(math.fsum(value * value for value in manifest.norms.values()))
    return f"""# Skill vector: {manifest.task}, refinement round {manifest.refinement_round}

`{WEIGHTS_FILE}` holds differences of weights, not a model: what RL on the source task changed
in a checkpoint that had been fine-tuned on the source documents.

| | |
| --- | --- |
| architecture | {manifest.fingerprint.model_type} |
| tensors | {len(manifest.norms)} in {manifest.dtype} |
| Frobenius norm | {norm:.6g} |
| RL weights | `{manifest.rl_hash}` |
| SFT weights | `{manifest.sft_hash}` |
| base weights | `{manifest.base_hash}` |
| previous round's vector | `{manifest.parent_hash}` |
| this vector | `{manifest.vector_hash}` |
| seed | {manifest.seed} |
| made | {manifest.created} with past_ray {manifest.past_ray_version} |

Add it to a model that was fine-tuned on other documents from the same base:

```python
from pathlib import Path

from past_ray.skill.artefact import inject_to_folder

inject_to_folder(Path("target_sft"), Path("this_folder"), Path("adapted"), scale=1.0)
```
"""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
