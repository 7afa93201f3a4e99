"""Several skill vectors put together into one."""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from past_ray.errors import SkillVectorError
from past_ray.locations import Place, write_folder
from past_ray.skill import merging
from past_ray.skill.adapter import concatenate
from past_ray.skill.artefact import (
    SkillVector,
    check_finite,
    vector_sums,
    write_adapter_skill,
    write_dense_skill,
)
from past_ray.skill.blocks import (
    BLOCK,
    Chunk,
    Measures,
    Workspace,
    block_digests,
    blocks,
    digests_of,
)
from past_ray.skill.compatibility import check_same_fingerprint, check_same_parameters
from past_ray.skill.lineage import check_relatives
from past_ray.skill.manifest import MANIFEST_FILE, Ingredient, SkillManifest
from past_ray.skill.noise import uniform_bits
from past_ray.skill.places import check_places
from past_ray.skill.stream import StreamSettings, measure, write_weights

Method = Literal["linear", "ties", "dare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRule:
    """How vectors become one; the defaults are the papers' settings."""

    method: Method = "linear"
    """``linear`` sums; ``ties`` trims and takes the mean of those that agree on a sign; ``dare``
    drops entries at random, rescales the others and sums."""

    density: float = 0.2
    """TIES: share of each vector's entries that is kept."""

    drop_rate: float = 0.9
    """DARE: share of each vector's entries that is dropped."""

    seed: int = 0
    """DARE: decides which ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """Merges chunk by chunk; a vector without a parameter counts as zero there."""

    vectors: tuple[SkillVector, ...]
    """What is merged."""

    weights: tuple[float, ...]
    """Their factors."""

    rule: MergeRule
    """How."""

    thresholds: tuple[float, ...]
    """TIES: the least magnitude that is kept, for each vector."""

    def __call__(self, chunk: Chunk, workspace: Workspace) -> tuple[list[Tensor], Measures]:
        """Return the ``[n]`` merged entries, and digests and sums."""
        measures = Measures()
        parts = [blocks(values) for values in self._read(chunk, workspace, measures)]
        merged = torch.cat(
            [
                self._merge(list(part), chunk.name, chunk.start + number * BLOCK)
                for number, part in enumerate(zip(*parts, strict=True))
            ]
            or [torch.empty(0)]
        )
        check_finite(chunk.name, combination=merged)
        measures.digests["vector"] = block_digests(merged)
        measures.sums |= vector_sums(merged)
        return [merged], measures

    def _merge(self, chunks: list[Tensor], name: str, start: int) -> Tensor:
        if self.rule.method == "ties":
            return merging.ties(chunks, weights=self.weights, thresholds=self.thresholds)
        if self.rule.method == "dare":
            chunks = [
                merging.drop_and_rescale(
                    values,
                    drop_rate=self.rule.drop_rate,
                    bits=uniform_bits(
                        seed=self.rule.seed,
                        name=f"dare {number} {name}",
                        start=start,
                        count=values.numel(),
                    ),
                )
                for number, values in enumerate(chunks)
            ]
        return merging.linear(chunks, weights=self.weights)

    def _read(self, chunk: Chunk, workspace: Workspace, measures: Measures) -> list[Tensor]:
        """Read every vector's entries; -0.0, which changes no sum, where it has no parameter."""
        chunks: list[Tensor] = []
        for number, vector in enumerate(self.vectors):
            if chunk.name not in vector.manifest.tensors:
                chunks.append(torch.full((chunk.numel,), -0.0))
                continue
            chunks.append(vector.read(chunk, workspace, role=f"vector {number}"))
            if vector.needs_check:
                measures.digests[f"vector {number}"] = block_digests(chunks[-1])
        return chunks


def combine(
    skills: Sequence[Place],
    out: Place,
    *,
    weights: Sequence[float] | None = None,
    rule: MergeRule | None = None,
    settings: StreamSettings | None = None,
) -> SkillManifest:
    """Write the combination of skill vectors as a skill folder, atomically.

    Vectors in the LoRA form that are summed give an adapter, whose rank is the sum of theirs; in
    all other cases the result is dense.

    Args:
        skills: Skill folders of one architecture.
        out: Where the result goes.
        weights: Their factors; None is 1 for each.
        rule: Linear by default.
        settings: How the work is shared out.

    Raises:
        SkillVectorError: The vectors do not fit together, or a setting is out of range.
        StorageError: A folder is unreadable, or the disk is full.

    Reference:
        Task Arithmetic https://arxiv.org/abs/2212.04089; TIES https://arxiv.org/abs/2306.01708
        section 4; DARE https://arxiv.org/abs/2311.03099 section 3.
    """
    rule, settings = rule or MergeRule(), settings or StreamSettings()
    check_places([out], skills)
    vectors = tuple(SkillVector(place) for place in skills)
    factors = tuple(weights) if weights is not None else (1.0,) * len(vectors)
    if not vectors or len(factors) != len(vectors):
        raise SkillVectorError(
            f"there must be one weight for each vector, got {len(factors)} weights for"
            f" {len(vectors)} vectors."
        )
    if not all(math.isfinite(factor) for factor in factors):
        raise SkillVectorError(f"weights must be finite numbers, got {list(factors)}.")
    _check_same_kind(vectors)
    facts = _facts(vectors, factors, rule)
    adapters = [vector.adapter for vector in vectors if vector.adapter is not None]
    with write_folder(out, commit=MANIFEST_FILE) as writer:
        if rule.method == "linear" and len(adapters) == len(vectors):
            adapter = concatenate(list(zip(factors, adapters, strict=True)))
            return write_adapter_skill(writer, adapter, facts)
        shapes: dict[str, tuple[int, ...]] = {}
        for vector in vectors:
            shapes |= vector.manifest.shapes
        shapes = {name: shapes[name] for name in sorted(shapes)}
        thresholds = tuple(
            _threshold(vector, rule.density, settings) if rule.method == "ties" else 0.0
            for vector in vectors
        )
        totals = write_weights(
            [writer],
            Combination(vectors=vectors, weights=factors, rule=rule, thresholds=thresholds),
            shapes=shapes,
            dtypes=dict.fromkeys(shapes, torch.float32),
            settings=settings,
        )
        for number, vector in enumerate(vectors):
            vector.check_digests(digests_of(totals, f"vector {number}"))
        return write_dense_skill(writer, shapes, totals, facts)


def _check_same_kind(vectors: Sequence[SkillVector]) -> None:
    first = vectors[0]
    for other in vectors[1:]:
        check_same_fingerprint(
            str(first.folder),
            first.manifest.fingerprint,
            str(other.folder),
            other.manifest.fingerprint,
        )
        shared = first.manifest.shapes.keys() & other.manifest.shapes.keys()
        check_same_parameters(
            str(first.folder),
            {name: first.manifest.shapes[name] for name in shared},
            str(other.folder),
            {name: other.manifest.shapes[name] for name in shared},
        )
    bases = {vector.manifest.base_hash for vector in vectors} - {None}
    if len(bases) > 1:
        raise SkillVectorError(
            f"vectors must come from one base, got {len(bases)}:"
            f" {', '.join(sorted(map(str, bases)))}."
            " Extract them from models that were fine-tuned from the same base."
        )
    for other in vectors[1:]:
        check_relatives(first, other)


def _facts(
    vectors: Sequence[SkillVector], weights: Sequence[float], rule: MergeRule
) -> dict[str, Any]:
    manifests = [vector.manifest for vector in vectors]
    settings = {
        "linear": "",
        "ties": f" density {rule.density}",
        "dare": f" drop_rate {rule.drop_rate} seed {rule.seed}",
    }[rule.method]
    return {
        "operation": f"combine {rule.method}{settings}",
        "ingredients": [
            Ingredient(vector_hash=m.vector_hash, weight=weight, task=m.task)
            for m, weight in zip(manifests, weights, strict=True)
        ],
        "task": "+".join(dict.fromkeys(m.task for m in manifests)),
        "refinement_round": max(m.refinement_round for m in manifests),
        "fingerprint": manifests[0].fingerprint,
        "base_hash": next((m.base_hash for m in manifests if m.base_hash), None),
        "base_sketch": manifests[0].base_sketch,
        "parent_hash": None,
        "rl_hash": None,
        "sft_hash": None,
        "rl_dtype": None,
        "sft_dtype": None,
        "rl_path": None,
        "sft_path": None,
        "source_data_hash": None,
        "rl_recipe": None,
        "reward": None,
        "seed": None,
    }


def _threshold(vector: SkillVector, density: float, settings: StreamSettings) -> float:
    """Return the magnitude that the kept share of a whole vector reaches: two passes over it."""
    shapes = vector.manifest.shapes
    numel = sum(math.prod(shape) for shape in shapes.values())
    rank = merging.num_kept(density, num_entries=numel)
    lock = threading.Lock()

    def count(bins: int, count_bits: Callable[[Tensor], Tensor]) -> Tensor:
        counts = torch.zeros(bins, dtype=torch.int64)

        def handle(chunk: Chunk, workspace: Workspace) -> Measures:
            found = count_bits(vector.read(chunk, workspace))
            with lock:
                counts.add_(found)
            return Measures()

        measure(shapes, handle, settings=settings)
        return counts

    high, rank = merging.find_high_bits(
        count(merging.NUM_HIGH_BINS, merging.count_high_bits), rank=rank
    )
    low_counts = count(
        merging.NUM_LOW_BINS, lambda values: merging.count_low_bits(values, high=high)
    )
    return merging.find_threshold(low_counts, high=high, rank=rank)
