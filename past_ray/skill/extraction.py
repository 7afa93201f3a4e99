"""``v = theta_rl - theta_sft`` from model folders of any size."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from past_ray.errors import SkillVectorError
from past_ray.locations import FolderWriter, Place, open_folder, write_folder
from past_ray.skill.adapter import Adapter, LoraModule, truncated_svd, vllm_rank
from past_ray.skill.adapter_folder import is_adapter, read_adapter
from past_ray.skill.arithmetic import difference, find_corrections
from past_ray.skill.artefact import (
    adapter_hash,
    check_finite,
    vector_sums,
    write_adapter_skill,
    write_dense_skill,
)
from past_ray.skill.blocks import (
    Chunk,
    Measures,
    Workspace,
    block_digests,
    blocks,
    inner_product,
    weights_hash,
)
from past_ray.skill.checkpoint import hash_stored, main_dtype
from past_ray.skill.compatibility import (
    check_compatible_checkpoints,
    check_float_tensors,
    check_has_parameters,
    check_same_fingerprint,
    check_same_parameters,
    fingerprint,
)
from past_ray.skill.lineage import sketch
from past_ray.skill.manifest import MANIFEST_FILE, Provenance, SkillManifest, load_manifest
from past_ray.skill.parameter_names import parse
from past_ray.skill.places import check_places
from past_ray.skill.stream import StreamSettings, in_threads, write_weights
from past_ray.skill.weights import StoredWeights, open_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """Subtracts chunk by chunk, and measures what a reader of the manifest wants to know."""

    rl: StoredWeights
    """Weights after RL."""

    sft: StoredWeights
    """Weights before RL."""

    def __call__(self, chunk: Chunk, workspace: Workspace) -> tuple[list[Tensor], Measures]:
        """Return the ``[n]`` float32 differences, and digests, sums and corrections."""
        measures = Measures()
        rl = self._read(self.rl, "rl", chunk, workspace, measures)
        sft = self._read(self.sft, "sft", chunk, workspace, measures)
        vector = difference(rl, sft, out=workspace.take("vector", chunk.numel, torch.float32))
        if not math.isfinite(float(vector.sum())):
            check_finite(chunk.name, rl=rl, sft=sft, difference=vector)
        back = torch.add(sft, vector, out=workspace.take("back", chunk.numel, torch.float32))
        if (corrections := find_corrections(rl, sft, vector, back)) is not None:
            measures.corrections.append((corrections[0] + chunk.start, corrections[1]))
        measures.digests["vector"] = block_digests(vector)
        measures.sums |= vector_sums(vector)
        measures.sums |= self._bf16_sums(chunk.name, rl, sft, vector, measures.sums)
        return [vector], measures

    def _bf16_sums(
        self, name: str, rl: Tensor, sft: Tensor, vector: Tensor, sums: dict[str, list[float]]
    ) -> dict[str, list[float]]:
        """Compare the vector with the difference of the parents rounded to bfloat16."""
        if self.rl[name].dtype == self.sft[name].dtype == "BF16":
            changed = [
                block.numel() - unchanged
                for block, unchanged in zip(blocks(vector), sums["unchanged"], strict=True)
            ]
            return {
                "bf16_changed": changed,
                "bf16_square": sums["square"],
                "bf16_inner": sums["square"],
            }
        found: dict[str, list[float]] = {"bf16_changed": [], "bf16_square": [], "bf16_inner": []}
        for after, before, exact in zip(blocks(rl), blocks(sft), blocks(vector), strict=True):
            rounded = after.bfloat16().float() - before.bfloat16().float()
            found["bf16_changed"].append(float(torch.count_nonzero(rounded)))
            found["bf16_square"].append(inner_product(rounded, rounded))
            found["bf16_inner"].append(inner_product(rounded, exact))
        return found

    def _read(
        self,
        weights: StoredWeights,
        role: str,
        chunk: Chunk,
        workspace: Workspace,
        measures: Measures,
    ) -> Tensor:
        stored = workspace.take(role, chunk.numel, weights[chunk.name].torch_dtype)
        weights.read(chunk.name, chunk.start, stored)
        measures.digests[role] = block_digests(stored)
        if stored.dtype == torch.float32:
            return stored
        return workspace.take(f"{role} wide", chunk.numel, torch.float32).copy_(stored)


def extract(
    rl: Place,
    sft: Place,
    out: Place,
    *,
    provenance: Provenance | None = None,
    base: Place | None = None,
    parent: Place | None = None,
    rank: int | None = None,
    settings: StreamSettings | None = None,
) -> SkillManifest:
    """Write the skill vector ``rl - sft`` as a folder, atomically, and return its manifest.

    Args:
        rl: Model folder after RL on the source domain, or the PEFT adapter that RL trained on top
            of ``sft``: then the adapter is the vector.
        sft: Model folder of the same round's SFT, which is subtracted.
        out: Where the skill folder goes.
        provenance: Task, round, recipe and so on, for the manifest.
        base: The model that SFT started from; only hashed and compared.
        parent: Skill folder of the previous round, if RL started from ``sft`` plus that vector.
        rank: Write the best adapter of this rank instead of all differences.
        settings: How the work is shared out.

    Raises:
        SkillVectorError: The folders do not fit together, or the difference is not finite.
        StorageError: A folder is unreadable, or the disk is full.

    Reference:
        PaST https://arxiv.org/abs/2601.11258 section 3.
    """
    settings = settings or StreamSettings()
    check_places([out], [rl, sft, base, parent])
    if rank is not None:
        if rank < 1:
            raise SkillVectorError(f"rank must be at least 1, got {rank}.")
        vllm_rank(rank)
    source = _Source.open(rl, sft, provenance or Provenance(), base=base, parent=parent)
    if source.adapter is not None and rank is not None:
        raise SkillVectorError(
            f"rank is for dense vectors, but {rl} is an adapter already. Leave the rank out."
        )
    with write_folder(out, commit=MANIFEST_FILE) as writer:
        if source.adapter is not None:
            return _write_adapter(writer, source, source.adapter, settings)
        if rank is not None:
            return _write_truncated(writer, source, rank, settings)
        return _write_dense(writer, source, settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Checked parents, and what the manifest says regardless of the vector's form."""

    rl: StoredWeights | None
    sft: StoredWeights
    adapter: Adapter | None
    facts: dict[str, Any]

    @classmethod
    def open(
        cls,
        rl: Place,
        sft: Place,
        provenance: Provenance,
        *,
        base: Place | None,
        parent: Place | None,
    ) -> "_Source":
        rl_folder, sft_folder = open_folder(rl), open_folder(sft)
        adapter = read_adapter(rl_folder) if is_adapter(rl_folder) else None
        if adapter is None:
            check_compatible_checkpoints(rl_folder, sft_folder)
        if base is not None:
            check_compatible_checkpoints(base, sft_folder)
        prints = fingerprint(sft_folder)
        parent_hash = None
        if parent is not None:
            earlier = load_manifest(parent)
            check_same_fingerprint("this round", prints, f"parent {parent}", earlier.fingerprint)
            _check_earlier(earlier, provenance.refinement_round, parent)
            parent_hash = earlier.vector_hash
        sft_weights = open_weights(sft_folder)
        if not sft_weights:
            raise SkillVectorError(f"sft {sft_folder} must hold at least one tensor, found none.")
        check_float_tensors(f"sft {sft_folder}", sft_weights)
        _warn_if_rounded(sft_folder, main_dtype(sft_weights))
        rl_weights = None
        if adapter is not None:
            shapes = {name: module.shape for name, module in adapter.modules.items()}
            check_has_parameters("sft", sft_weights.shapes(), f"adapter {rl_folder}", shapes)
        else:
            rl_weights = open_weights(rl_folder)
            check_same_parameters("rl", rl_weights.shapes(), "sft", sft_weights.shapes())
            check_float_tensors(f"rl {rl_folder}", rl_weights)
            _warn_if_rounded(rl_folder, main_dtype(rl_weights))
        base_hash = None
        if base is not None:
            base_hash = hash_stored(open_weights(base), settings=StreamSettings())
        facts = provenance.model_dump() | {
            "base_hash": base_hash,
            "parent_hash": parent_hash,
            "fingerprint": prints,
            "rl_dtype": "float32" if rl_weights is None else main_dtype(rl_weights),
            "sft_dtype": main_dtype(sft_weights),
            "rl_path": str(rl_folder),
            "sft_path": str(sft_folder),
            "base_sketch": sketch(sft_weights),
            "operation": "extract",
        }
        return cls(rl=rl_weights, sft=sft_weights, adapter=adapter, facts=facts)


def _write_dense(writer: FolderWriter, source: _Source, settings: StreamSettings) -> SkillManifest:
    assert source.rl is not None
    shapes = source.sft.shapes()
    totals = write_weights(
        [writer],
        Extraction(rl=source.rl, sft=source.sft),
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, torch.float32),
        settings=settings,
    )
    facts = source.facts | {
        "rl_hash": weights_hash({name: t.digests["rl"] for name, t in totals.items()}),
        "sft_hash": weights_hash({name: t.digests["sft"] for name, t in totals.items()}),
    }
    if facts["rl_hash"] == facts["sft_hash"]:
        logger.warning("RL and SFT hold the same weights: the vector is zero")
    return write_dense_skill(writer, shapes, totals, facts)


def _write_adapter(
    writer: FolderWriter, source: _Source, adapter: Adapter, settings: StreamSettings
) -> SkillManifest:
    facts = source.facts | {
        "rl_hash": adapter_hash(adapter),
        "sft_hash": hash_stored(source.sft, settings=settings),
    }
    return write_adapter_skill(writer, adapter, facts)


def _write_truncated(
    writer: FolderWriter, source: _Source, rank: int, settings: StreamSettings
) -> SkillManifest:
    """Write the best adapter of ``rank``: one matrix in memory at a time."""
    assert source.rl is not None
    rl, sft = source.rl, source.sft
    modules: dict[str, LoraModule] = {}
    kept: dict[str, float] = {}
    lost: list[str] = []

    def decompose(name: str, _: Workspace) -> None:
        vector = difference(rl.tensor(name).float(), sft.tensor(name).float())
        check_finite(name, difference=vector)
        if vector.dim() == 2 and parse(name).layer is not None and name.endswith(".weight"):
            modules[name], kept[name] = truncated_svd(vector, rank=rank)
        elif vector.any():
            lost.append(name)
        if settings.on_progress:
            settings.on_progress(len(kept), len(sft))

    in_threads(sft, decompose, workers=settings.workers)
    if lost:
        logger.warning(
            "an adapter changes the matrices of layers only: the differences of %d other tensors"
            " are left out (first: %s)",
            len(lost),
            ", ".join(sorted(lost)[:5]),
        )
    facts = source.facts | {
        "operation": f"truncated_svd rank {rank}",
        "rl_hash": hash_stored(source.rl, settings=StreamSettings(workers=settings.workers)),
        "sft_hash": hash_stored(source.sft, settings=StreamSettings(workers=settings.workers)),
    }
    adapter = Adapter(modules={name: modules[name] for name in sorted(modules)}, config={})
    return write_adapter_skill(writer, adapter, facts, energy_kept=kept)


def _check_earlier(parent: SkillManifest, refinement_round: int, place: Place) -> None:
    if parent.refinement_round >= refinement_round:
        raise SkillVectorError(
            f"the parent must be of an earlier refinement round, got round"
            f" {parent.refinement_round} in {place} for round {refinement_round}."
            " Give the skill folder of the round before."
        )


def _warn_if_rounded(folder: object, dtype: str) -> None:
    if dtype != "float32":
        logger.warning(
            "%s is stored in %s: RL updates smaller than its rounding are lost to the skill vector."
            " Save parents in float32.",
            folder,
            dtype,
        )
