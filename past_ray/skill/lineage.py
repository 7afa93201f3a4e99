"""Whether a target grew from the model that a skill vector's parents grew from.

A model folder that past_ray wrote names its base in ``past_ray.json``. For any other folder the
weights tell: fine-tuning moves a matrix by a small part of its norm, while two models trained
independently have matrices that are orthogonal.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from past_ray.config.skill import ScaleConfig
from past_ray.errors import SkillVectorError
from past_ray.locations import Folder
from past_ray.skill.artefact import SkillVector
from past_ray.skill.checkpoint import LINEAGE_FILE
from past_ray.skill.manifest import SkillManifest, stamp
from past_ray.skill.weights import StoredWeights

logger = logging.getLogger(__name__)

NUM_SKETCHED_MATRICES = 64
NUM_SKETCHED_WEIGHTS = 16
LEAST_BASE_COSINE = 0.5
"""Of sketches. Independent models give 0 within 1/sqrt(1024) = 0.03; fine-tuned ones above 0.9."""


def read_lineage(folder: Folder) -> dict[str, Any]:
    """Return what ``past_ray.json`` says of a model's origin; empty without one."""
    return folder.read_json(LINEAGE_FILE) if folder.has(LINEAGE_FILE) else {}


def injection_lineage(
    target: Folder, vector: SkillVector, config: ScaleConfig, *, is_relative: bool
) -> dict[str, Any]:
    """Return what ``past_ray.json`` of an adapted model says.

    Args:
        target: What the vector is added to.
        vector: What is added.
        config: How much of it.
        is_relative: What ``check_base`` found: then the vector's base is the model's.
    """
    recorded, manifest = read_lineage(target), vector.manifest
    return {
        "operation": "inject",
        "target": str(target),
        "target_hash": recorded.get("weights_hash"),
        "base_hash": recorded.get("base_hash") or (manifest.base_hash if is_relative else None),
        "skill_hash": manifest.vector_hash,
        **config.model_dump(),
        "task": manifest.task,
        "refinement_round": manifest.refinement_round,
        **stamp(),
    }


def sketch(weights: StoredWeights) -> dict[str, tuple[float, ...]]:
    """Return a few weights from the middle of evenly chosen matrices.

    Only matrices: norms and biases are alike in unrelated models.
    """
    matrices = [name for name, tensor in weights.items() if len(tensor.shape) == 2]
    count = min(len(matrices), NUM_SKETCHED_MATRICES)
    chosen = [matrices[number * len(matrices) // count] for number in range(count)]
    return {name: _few(weights, name) for name in chosen if weights[name].numel}


def check_base(
    folder: Folder, weights: StoredWeights, manifest: SkillManifest, *, allow_other_base: bool
) -> bool:
    """Refuse a target that was not fine-tuned from the vector's base; tell whether it was.

    Args:
        folder: The target.
        weights: Its weights.
        manifest: Of the vector.
        allow_other_base: Warn instead.

    Raises:
        SkillVectorError: The target names another base, or its weights are no relatives.
    """
    found = _reason_against(read_lineage(folder), weights, manifest)
    if found is None:
        return True
    message = (
        f"target {folder} must be fine-tuned from the base of the vector's parents"
        f" ({manifest.base_hash or 'not recorded'}), but {found}."
    )
    if not allow_other_base:
        raise SkillVectorError(
            f"{message} Fine-tune the target from that base, or allow another one with"
            " --allow-other-base (allow_other_base=True)."
        )
    logger.warning("%s Injecting all the same.", message)
    return False


def check_relatives(first: SkillVector, second: SkillVector) -> None:
    """Refuse two vectors whose parents did not grow from one base, as far as it can be told.

    Raises:
        SkillVectorError: They record no common base, and their sketches are no relatives.
    """
    left, right = first.manifest, second.manifest
    shared = left.base_sketch.keys() & right.base_sketch.keys()
    if not shared or (left.base_hash is not None and left.base_hash == right.base_hash):
        return
    cosine = _mean_cosine(
        {name: left.base_sketch[name] for name in shared},
        {name: right.base_sketch[name] for name in shared},
    )
    if cosine < LEAST_BASE_COSINE:
        raise SkillVectorError(
            f"{first.folder} and {second.folder} must come from one base, but their SFT parents'"
            f" weights have a cosine of {cosine:.2f} (at least {LEAST_BASE_COSINE} expected of"
            " relatives). Extract them from models that were fine-tuned from the same base."
        )


def cosine_to_base(base: StoredWeights, sft: StoredWeights) -> float:
    """Return how alike a base and what is said to be fine-tuned from it are, 1 at most."""
    theirs = {name: values for name, values in sketch(sft).items() if name in base}
    return _mean_cosine({name: _few(base, name) for name in theirs}, theirs)


def _reason_against(
    lineage: Mapping[str, Any], weights: StoredWeights, manifest: SkillManifest
) -> str | None:
    recorded = lineage.get("base_hash")
    # The base itself may record what it grew from; so may the parents.
    if lineage.get("weights_hash", "") in (manifest.base_hash, manifest.sft_hash, manifest.rl_hash):
        return None
    if recorded and manifest.base_hash:
        return None if recorded == manifest.base_hash else f"it records the base {recorded}"
    theirs = {n: v for n, v in manifest.base_sketch.items() if n in weights}
    if not theirs:
        return None
    cosine = _mean_cosine({name: _few(weights, name) for name in theirs}, theirs)
    if cosine < LEAST_BASE_COSINE:
        return (
            f"its weights have a cosine of {cosine:.2f} to the vector's SFT parent (at least"
            f" {LEAST_BASE_COSINE} expected of relatives)"
        )
    return None


def _mean_cosine(
    ours: Mapping[str, tuple[float, ...]], theirs: Mapping[str, tuple[float, ...]]
) -> float:
    """Over matrices, so that one with large weights does not decide alone.

    Matrices of zeros, as some are before training, have no direction; 1 if there are no others.
    """
    cosines = [_cosine(ours[name], theirs[name]) for name in theirs if any(theirs[name])]
    return math.fsum(cosines) / len(cosines) if cosines else 1.0


def _cosine(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    norms = math.hypot(*left) * math.hypot(*right)
    return math.fsum(a * b for a, b in zip(left, right, strict=True)) / norms if norms else 0.0


def _few(weights: StoredWeights, name: str) -> tuple[float, ...]:
    stored = weights[name]
    count = min(stored.numel, NUM_SKETCHED_WEIGHTS)
    values = torch.empty(count, dtype=stored.torch_dtype)
    weights.read(name, (stored.numel - count) // 2, values)
    return tuple(values.tolist())
