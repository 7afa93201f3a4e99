"""``v = theta_rl - theta_sft`` from model folders of any size."""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from past_ray.errors import SkillVectorError
from past_ray.locations import FolderWriter, Place, write_folder
from past_ray.skill.adapter import Adapter, LoraModule, truncated_svd, vllm_rank
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
    digests_of,
    inner_product,
    weights_hash,
)
from past_ray.skill.checkpoint import hash_stored
from past_ray.skill.manifest import MANIFEST_FILE, Provenance, SkillManifest
from past_ray.skill.parameter_names import parse
from past_ray.skill.parents import Parents, open_parents
from past_ray.skill.places import check_places
from past_ray.skill.stream import StreamSettings, in_threads, write_weights
from past_ray.skill.weights import StoredWeights

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
    parents = open_parents(rl, sft, provenance or Provenance(), base=base, parent=parent)
    if parents.adapter is not None and rank is not None:
        raise SkillVectorError(
            f"rank is for dense vectors, but {rl} is an adapter already. Leave the rank out."
        )
    with write_folder(out, commit=MANIFEST_FILE) as writer:
        if parents.adapter is not None:
            return _write_adapter(writer, parents, parents.adapter, settings)
        if rank is not None:
            return _write_truncated(writer, parents, rank, settings)
        return _write_dense(writer, parents, settings)


def _write_dense(writer: FolderWriter, parents: Parents, settings: StreamSettings) -> SkillManifest:
    assert parents.rl is not None
    shapes = parents.sft.shapes()
    totals = write_weights(
        [writer],
        Extraction(rl=parents.rl, sft=parents.sft),
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, torch.float32),
        settings=settings,
    )
    facts = parents.facts | {
        "rl_hash": weights_hash(digests_of(totals, "rl")),
        "sft_hash": weights_hash(digests_of(totals, "sft")),
    }
    if facts["rl_hash"] == facts["sft_hash"]:
        logger.warning("RL and SFT hold the same weights: the vector is zero")
    return write_dense_skill(writer, shapes, totals, facts)


def _write_adapter(
    writer: FolderWriter, parents: Parents, adapter: Adapter, settings: StreamSettings
) -> SkillManifest:
    facts = parents.facts | {
        "rl_hash": adapter_hash(adapter),
        "sft_hash": hash_stored(parents.sft, settings=settings),
    }
    return write_adapter_skill(writer, adapter, facts)


def _write_truncated(
    writer: FolderWriter, parents: Parents, rank: int, settings: StreamSettings
) -> SkillManifest:
    """Write the best adapter of ``rank``: one matrix in memory at a time."""
    assert parents.rl is not None
    rl, sft = parents.rl, parents.sft
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
    facts = parents.facts | {
        "operation": f"truncated_svd rank {rank}",
        "rl_hash": hash_stored(parents.rl, settings=StreamSettings(workers=settings.workers)),
        "sft_hash": hash_stored(parents.sft, settings=StreamSettings(workers=settings.workers)),
    }
    adapter = Adapter(modules={name: modules[name] for name in sorted(modules)}, config={})
    return write_adapter_skill(writer, adapter, facts, energy_kept=kept)
