"""The models that a skill vector is extracted from, checked against each other."""

import logging
from dataclasses import dataclass
from typing import Any

from past_ray.errors import SkillVectorError
from past_ray.locations import Folder, Place, open_folder
from past_ray.skill.adapter import Adapter
from past_ray.skill.adapter_folder import is_adapter, read_adapter
from past_ray.skill.checkpoint import hash_weights, main_dtype
from past_ray.skill.compatibility import (
    CheckpointFingerprint,
    check_compatible_checkpoints,
    check_float_tensors,
    check_has_parameters,
    check_same_fingerprint,
    check_same_parameters,
    fingerprint,
)
from past_ray.skill.lineage import LEAST_BASE_COSINE, cosine_to_base, read_lineage, sketch
from past_ray.skill.manifest import Provenance, load_manifest
from past_ray.skill.weights import StoredWeights, open_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parents:
    """Open parents, and what the manifest says whatever form the vector takes."""

    rl: StoredWeights | None
    """Weights after RL; None where RL trained an adapter."""

    sft: StoredWeights
    """Weights before RL."""

    adapter: Adapter | None
    """What RL trained on top of ``sft``; None where it trained the weights."""

    facts: dict[str, Any]
    """Fields of the manifest."""


def open_parents(
    rl: Place, sft: Place, provenance: Provenance, *, base: Place | None, parent: Place | None
) -> Parents:
    """Open and check everything that is known before the first weight is read.

    Raises:
        SkillVectorError: The folders do not fit together.
        StorageError: A folder is unreadable.
    """
    rl_folder, sft_folder = open_folder(rl), open_folder(sft)
    adapter = read_adapter(rl_folder) if is_adapter(rl_folder) else None
    if adapter is None:
        check_compatible_checkpoints(rl_folder, sft_folder)
    prints = fingerprint(sft_folder)
    parent_hash = None
    if parent is not None:
        parent_hash = _parent_hash(parent, prints, provenance.refinement_round)
    sft_weights = _open("sft", sft_folder)
    rl_weights = None
    if adapter is None:
        rl_weights = _open("rl", rl_folder)
        check_same_parameters("rl", rl_weights.shapes(), "sft", sft_weights.shapes())
    else:
        shapes = {name: module.shape for name, module in adapter.modules.items()}
        check_has_parameters("sft", sft_weights.shapes(), f"adapter {rl_folder}", shapes)
    facts = provenance.model_dump() | {
        "operation": "extract",
        "base_hash": _base_hash(sft_folder, sft_weights, base),
        "parent_hash": parent_hash,
        "fingerprint": prints,
        "rl_dtype": "float32" if rl_weights is None else main_dtype(rl_weights),
        "sft_dtype": main_dtype(sft_weights),
        "rl_path": str(rl_folder),
        "sft_path": str(sft_folder),
        "base_sketch": sketch(sft_weights),
    }
    return Parents(rl=rl_weights, sft=sft_weights, adapter=adapter, facts=facts)


def _open(role: str, folder: Folder) -> StoredWeights:
    weights = open_weights(folder)
    if not weights:
        raise SkillVectorError(f"{role} {folder} must hold at least one tensor, found none.")
    check_float_tensors(f"{role} {folder}", weights)
    dtype = main_dtype(weights)
    if dtype != "float32":
        logger.warning(
            "%s is stored in %s: RL updates smaller than its rounding are lost to the skill vector."
            " Save parents in float32.",
            folder,
            dtype,
        )
    return weights


def _base_hash(sft: Folder, weights: StoredWeights, base: Place | None) -> str | None:
    """Hash the base that was given, or take what the SFT model records of it."""
    recorded = read_lineage(sft).get("base_hash")
    if base is None:
        return recorded
    check_compatible_checkpoints(base, sft)
    base_weights = open_weights(base)
    check_has_parameters(f"base {base}", base_weights.shapes(), f"sft {sft}", weights.shapes())
    if (cosine := cosine_to_base(base_weights, weights)) < LEAST_BASE_COSINE:
        raise SkillVectorError(
            f"{sft} must have been fine-tuned from {base}, but their weights have a cosine of"
            f" {cosine:.2f} (at least {LEAST_BASE_COSINE} expected). Give the base that SFT started"
            " from."
        )
    found = hash_weights(base)
    if recorded not in (None, found):
        raise SkillVectorError(
            f"{sft} must have been fine-tuned from {base}, whose hash is {found}, but it records"
            f" the base {recorded}. Give that base, or leave it out to use the record."
        )
    return found


def _parent_hash(parent: Place, prints: CheckpointFingerprint, refinement_round: int) -> str:
    earlier = load_manifest(parent)
    check_same_fingerprint("this round", prints, f"parent {parent}", earlier.fingerprint)
    if earlier.refinement_round >= refinement_round:
        raise SkillVectorError(
            f"the parent must be of an earlier refinement round, got round"
            f" {earlier.refinement_round} in {parent} for round {refinement_round}."
            " Give the skill folder of the round before."
        )
    return earlier.vector_hash
