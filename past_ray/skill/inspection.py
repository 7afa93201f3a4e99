"""What is in a skill vector, and what rounding leaves of it in a target."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from past_ray.errors import SkillVectorError
from past_ray.locations import Place, open_folder
from past_ray.skill.arithmetic import check_scale, scaled_sum
from past_ray.skill.artefact import SkillVector
from past_ray.skill.blocks import (
    Chunk,
    Measures,
    TensorTotals,
    Workspace,
    block_digests,
    blocks,
    digests_of,
    inner_product,
)
from past_ray.skill.compatibility import check_float_tensors, check_has_parameters
from past_ray.skill.manifest import SkillManifest, bf16_cost, is_skill
from past_ray.skill.parameter_names import ParameterPlace, parse
from past_ray.skill.stream import StreamSettings, measure
from past_ray.skill.weights import open_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingCost:
    """What is left of a vector after sums are rounded to a narrow dtype."""

    dtype: str
    """What is rounded to."""

    share_changed: float
    """Entries that still differ from what they were added to."""

    cosine: float
    """Between what was changed and what should have been; NaN if nothing was."""

    noise_to_signal: float
    """Norm of what they differ by over the norm of the vector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormRow:
    """A part of the vector."""

    part: str
    """``layer 3``, ``outside layers``, or the name of a module."""

    norm: float
    """Frobenius norm."""

    share: float
    """Of the vector's squared norm."""

    num_entries: int
    """Entries of the part."""

    share_bf16_changed: float | None
    """Entries that survive rounding both parents to bfloat16; None where it was not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A skill vector at a glance."""

    manifest: SkillManifest
    """What the folder says about itself."""

    by_layer: list[NormRow]
    """Norms by layer, and of what is outside of the layers."""

    by_module: list[NormRow]
    """Norms by module, largest first."""

    parents_in_bf16: RoundingCost | None
    """What parents stored in bfloat16 would give; None where it was not measured."""

    in_target: RoundingCost | None
    """What injecting gives in the target that was named."""


def inspect(
    skill: Place,
    *,
    target: Place | None = None,
    scale: float = 1.0,
    settings: StreamSettings | None = None,
) -> Inspection:
    """Return norms by layer and module, and what rounding to bfloat16 costs.

    Without a target nothing but the manifest is read.

    Args:
        skill: Skill folder.
        target: Measure the rounding of ``target + scale * v`` too: to the target's dtype, or to
            bfloat16 for a float32 target.
        scale: The paper's lambda.
        settings: How the work is shared out.

    Raises:
        SkillVectorError: It is no skill folder, or the target lacks a parameter.
        StorageError: A folder is unreadable.
    """
    vector = SkillVector(skill)
    cost = bf16_cost(vector.manifest.tensors)
    return Inspection(
        manifest=vector.manifest,
        by_layer=_group(vector.manifest, _layer_label),
        by_module=sorted(
            _group(vector.manifest, lambda place: place.module), key=lambda row: -row.norm
        ),
        parents_in_bf16=None if cost is None else RoundingCost(dtype="bfloat16", **cost),
        in_target=None
        if target is None
        else _measure_target(vector, target, scale, settings or StreamSettings()),
    )


def _measure_target(
    vector: SkillVector, target: Place, scale: float, settings: StreamSettings
) -> RoundingCost:
    check_scale(scale)
    folder = open_folder(target)
    if is_skill(folder):
        raise SkillVectorError(f"the target must be a model, but {folder} is a skill vector.")
    weights = open_weights(folder)
    check_float_tensors(f"target {folder}", weights)
    check_has_parameters(f"target {folder}", weights.shapes(), "skill", vector.manifest.shapes)
    is_half = all(tensor.torch_dtype == torch.float16 for tensor in weights.values())
    dtype = torch.float16 if is_half else torch.bfloat16

    def handle(chunk: Chunk, workspace: Workspace) -> Measures:
        stored = workspace.take("target", chunk.numel, weights[chunk.name].torch_dtype)
        weights.read(chunk.name, chunk.start, stored)
        before = stored.float()
        values = vector.read(chunk, workspace)
        after = scaled_sum(before, values, scale).to(dtype)
        change = after.float() - before.to(dtype).float()
        sums: dict[str, list[float]] = {}
        for moved, wanted in zip(blocks(change), blocks(values * scale), strict=True):
            noise = moved - wanted
            for key, value in {
                "changed": float(torch.count_nonzero(moved)),
                "moved": inner_product(moved, moved),
                "wanted": inner_product(wanted, wanted),
                "inner": inner_product(moved, wanted),
                "noise": inner_product(noise, noise),
            }.items():
                sums.setdefault(key, []).append(value)
        digests = {"vector": block_digests(values)} if vector.needs_check else {}
        return Measures(sums=sums, digests=digests)

    totals = measure(vector.manifest.shapes, handle, settings=settings)
    vector.check_digests(digests_of(totals, "vector"))
    return _rounding_cost(totals, vector.manifest, str(dtype).removeprefix("torch."))


def _rounding_cost(
    totals: dict[str, TensorTotals], manifest: SkillManifest, dtype: str
) -> RoundingCost:
    def total(key: str) -> float:
        return math.fsum(t.sums.get(key, 0.0) for t in totals.values())

    norms = math.sqrt(total("moved") * total("wanted"))
    return RoundingCost(
        dtype=dtype,
        share_changed=total("changed") / max(1, _numel(manifest)),
        cosine=total("inner") / norms if norms else math.nan,
        noise_to_signal=math.sqrt(total("noise") / total("wanted"))
        if total("wanted")
        else math.nan,
    )


def _group(manifest: SkillManifest, label: Callable[[ParameterPlace], str]) -> list[NormRow]:
    groups: dict[str, list[str]] = {}
    for name in sorted(manifest.tensors, key=_layer_order):
        groups.setdefault(label(parse(name)), []).append(name)
    return [_row(part, names, manifest) for part, names in groups.items()]


def _row(part: str, names: list[str], manifest: SkillManifest) -> NormRow:
    records = [manifest.tensors[name] for name in names]
    square = math.fsum(record.norm**2 for record in records)
    numel = sum(math.prod(record.shape) for record in records)
    changed = [record.num_bf16_changed for record in records]
    return NormRow(
        part=part,
        norm=math.sqrt(square),
        share=square / manifest.norm**2 if manifest.norm else 0.0,
        num_entries=numel,
        share_bf16_changed=sum(c or 0 for c in changed) / numel
        if numel and None not in changed
        else None,
    )


def _layer_label(place: ParameterPlace) -> str:
    return "outside layers" if place.layer is None else f"layer {place.layer}"


def _layer_order(name: str) -> tuple[float, str]:
    layer = parse(name).layer
    return (math.inf if layer is None else layer, name)


def _numel(manifest: SkillManifest) -> int:
    return sum(math.prod(shape) for shape in manifest.shapes.values())
