"""``theta_final = theta_target + scale * v`` for targets of any size and form."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from past_ray.config.skill import ScaleConfig
from past_ray.errors import SkillVectorError
from past_ray.locations import Folder, FolderWriter, Place, open_folder, write_folder
from past_ray.skill.adapter_folder import is_adapter
from past_ray.skill.adapter_injection import inject_into_adapter, open_target_adapter
from past_ray.skill.arithmetic import check_scale, correct, scaled_sum
from past_ray.skill.artefact import SkillVector, check_finite
from past_ray.skill.blocks import (
    BLOCK,
    Chunk,
    Measures,
    TensorTotals,
    Workspace,
    block_digests,
    digests_of,
    weights_hash,
)
from past_ray.skill.checkpoint import LINEAGE_FILE, main_dtype, write_companions
from past_ray.skill.compatibility import (
    check_float_tensors,
    check_has_parameters,
    check_same_fingerprint,
    fingerprint,
)
from past_ray.skill.lineage import check_base, injection_lineage
from past_ray.skill.manifest import is_skill
from past_ray.skill.noise import uniform_bits
from past_ray.skill.parameter_names import check_scales_match, scale_of
from past_ray.skill.places import check_places
from past_ray.skill.rounding import round_stochastic
from past_ray.skill.stream import StreamSettings, write_weights
from past_ray.skill.weights import CONFIG_FILE, StoredWeights, open_weights
from past_ray.storage import write_json

Scale = float | ScaleConfig

SUSPICIOUS_SUM = 1e38
"""Of one chunk; weights are at most a few thousand, and float32 ends at 3.4e38."""
DtypeName = Literal["float32", "bfloat16", "float16"]

_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How float32 sums become the dtype of the result."""

    dtype: DtypeName | None = None
    """Of the result; None keeps what each tensor of the target has."""

    seed: int | None = None
    """Round up or down at random, unbiased; None rounds to the nearest, ties to even."""

    @property
    def text(self) -> str:
        """For the lineage."""
        return "nearest" if self.seed is None else f"stochastic, seed {self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """Adds one vector to one target at several scales: everything is read once."""

    target: StoredWeights
    """Weights that the vector is added to."""

    vector: SkillVector
    """What is added."""

    scales: tuple[dict[str, float], ...]
    """For each output, the factor of every parameter of the vector."""

    dtypes: dict[str, torch.dtype]
    """What each tensor is written in."""

    rounding_seed: int | None
    """For stochastic rounding."""

    verify: bool
    """Whether to hash all that is read, instead of the vector's small tensors only."""

    def __call__(self, chunk: Chunk, workspace: Workspace) -> tuple[list[Tensor], Measures]:
        """Return the ``[n]`` sums for each scale, and the digests of what was read."""
        stored = workspace.take("target", chunk.numel, self.target[chunk.name].torch_dtype)
        self.target.read(chunk.name, chunk.start, stored)
        measures = Measures()
        if self.verify:
            measures.digests["target"] = block_digests(stored)
        scales = [factors.get(chunk.name, 0.0) for factors in self.scales]
        if chunk.name not in self.vector.manifest.tensors:
            return [self._converted(chunk, stored, workspace) for _ in scales], measures
        vector = self.vector.read(chunk, workspace)
        is_small = self.target[chunk.name].numel <= BLOCK
        if self.vector.needs_check and (self.verify or is_small):
            measures.digests["vector"] = block_digests(vector)
        wide = stored
        if stored.dtype != torch.float32:
            wide = workspace.take("wide", chunk.numel, torch.float32).copy_(stored)
        corrections = self.vector.corrections(chunk)
        outputs: list[Tensor] = []
        for number, scale in enumerate(scales):
            if scale == 0:
                outputs.append(self._converted(chunk, stored, workspace))
                continue
            # A sum that is rounded is copied at once; one in float32 is the output itself.
            is_output = self.dtypes[chunk.name] == torch.float32
            role = f"sum {number}" if is_output else "sum"
            room = workspace.take(role, chunk.numel, torch.float32)
            total = scaled_sum(wide, vector, scale, out=room)
            if corrections is not None:
                correct(total, wide, vector, scale, corrections)
            output = self._rounded(chunk, total, workspace, role=f"output {number}")
            _check_output(chunk.name, total, output, target=stored, vector=vector)
            outputs.append(output)
        return outputs, measures

    def _converted(self, chunk: Chunk, stored: Tensor, workspace: Workspace) -> Tensor:
        """What is not changed is copied bit for bit, unless another dtype is asked for."""
        output = stored
        if stored.dtype != self.dtypes[chunk.name]:
            output = self._rounded(chunk, stored.float(), workspace, role="converted")
        _check_output(chunk.name, stored, output, target=stored)
        return output

    def _rounded(self, chunk: Chunk, total: Tensor, workspace: Workspace, *, role: str) -> Tensor:
        dtype = self.dtypes[chunk.name]
        if dtype == torch.float32:
            return total
        if self.rounding_seed is None:
            return workspace.take(role, chunk.numel, dtype).copy_(total)
        bits = uniform_bits(
            seed=self.rounding_seed, name=chunk.name, start=chunk.start, count=chunk.numel
        )
        return round_stochastic(total, dtype, bits=bits)


def _check_output(name: str, exact: Tensor, output: Tensor, **inputs: Tensor) -> None:
    """A sum is a cheap test that every entry is finite; only a suspicious one looks closer.

    Before rounding, which is faster to add up, except for float16: there rounding itself makes
    infinities. Those of bfloat16 come from numbers that alone make the sum suspicious.
    """
    probe = output if output.dtype == torch.float16 else exact
    if not abs(float(probe.sum(dtype=torch.float32))) < SUSPICIOUS_SUM:
        check_finite(name, **inputs, **{"adapted model": output})


def inject(
    target: Place,
    skill: Place,
    out: Place,
    *,
    scale: Scale = 1.0,
    rounding: Rounding | None = None,
    allow_other_base: bool = False,
    verify: bool = False,
    settings: StreamSettings | None = None,
) -> None:
    """Write the adapted model ``target + scale * skill`` as a folder, atomically.

    A dense target gives a model folder with the target's config, tokenizer and chat template. A
    target that is a PEFT adapter takes a vector in the LoRA form and gives an adapter: the ranks
    add up exactly, filled with zeros to one that vLLM accepts. ``past_ray.json`` says what the
    result is made of. Everything is checked before a byte is written.

    Args:
        target: The target domain's SFT model, or its adapter.
        skill: Skill folder.
        out: Where the adapted model goes.
        scale: The paper's lambda, or one for each layer and module.
        rounding: How sums are rounded to the result's dtype.
        allow_other_base: Accept a target that was not fine-tuned from the vector's base.
        verify: Hash every byte that is read: the vector's must be those that were saved, the
            target's hash is recorded. Without it only the vector's small tensors are checked,
            which finds a mix-up but not a flipped bit.
        settings: How the work is shared out.

    Raises:
        SkillVectorError: Target and skill do not fit together, or hold NaN or infinity.
        StorageError: A folder is unreadable, or the disk is full.

    Reference:
        PaST https://arxiv.org/abs/2601.11258 section 3: theta_final = theta_sft + lambda * v.
    """
    options = _Options(rounding or Rounding(), allow_other_base, verify)
    _inject(target, skill, [(scale, out)], options, settings or StreamSettings())


def sweep(
    target: Place,
    skill: Place,
    outs: Mapping[float, Place],
    *,
    rounding: Rounding | None = None,
    allow_other_base: bool = False,
    verify: bool = False,
    settings: StreamSettings | None = None,
) -> None:
    """Write one adapted model for each scale; target and vector are read once.

    Args:
        target: The target domain's SFT model.
        skill: Skill folder.
        outs: Folder of the result by scale.
        rounding: As for ``inject``.
        allow_other_base: As for ``inject``.
        verify: As for ``inject``.
        settings: As for ``inject``.

    Raises:
        SkillVectorError: As for ``inject``.
        StorageError: As for ``inject``.
    """
    if not outs:
        raise SkillVectorError("a sweep needs at least one scale, got none. Give 0,0.5,1.")
    options = _Options(rounding or Rounding(), allow_other_base, verify)
    _inject(target, skill, list(outs.items()), options, settings or StreamSettings())


def check_target(target: Place, skill: Place, *, allow_other_base: bool = False) -> None:
    """Refuse a target that ``inject`` would refuse, reading headers and a few weights only.

    Args:
        target: The target domain's SFT model, or its adapter.
        skill: Skill folder.
        allow_other_base: As for ``inject``.

    Raises:
        SkillVectorError: Target and skill do not fit together.
        StorageError: A folder is unreadable.
    """
    folder, vector = _open_both(target, skill)
    if is_adapter(folder):
        open_target_adapter(folder, vector, allow_other_base=allow_other_base)
    else:
        _open_target(folder, vector, allow_other_base=allow_other_base)


@dataclass(frozen=True, slots=True)
class _Options:
    """What ``inject`` and ``sweep`` have in common."""

    rounding: Rounding
    allow_other_base: bool
    verify: bool


def _inject(
    target: Place,
    skill: Place,
    outputs: Sequence[tuple[Scale, Place]],
    options: _Options,
    settings: StreamSettings,
) -> None:
    """Check everything, then write one result for each scale."""
    folder, vector = _open_both(target, skill)
    check_places([place for _, place in outputs], [target, skill])
    configs = [_scale_config(scale) for scale, _ in outputs]
    if is_adapter(folder):
        if options.rounding != Rounding():
            raise SkillVectorError(
                f"an adapted adapter is written in float32, got rounding {options.rounding} for"
                f" {folder}. Leave dtype and seed out."
            )
        for config, (_, place) in zip(configs, outputs, strict=True):
            inject_into_adapter(
                folder, vector, place, config, allow_other_base=options.allow_other_base
            )
        return
    target_weights, is_relative = _open_target(
        folder, vector, allow_other_base=options.allow_other_base
    )
    for config in configs:
        check_scales_match(target_weights, config)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(write_folder(place, commit=CONFIG_FILE)) for _, place in outputs
        ]
        totals = _write_models(writers, target_weights, vector, configs, options, settings)
        vector.check_digests(digests_of(totals, "vector"))
        dtype = options.rounding.dtype or main_dtype(target_weights)
        for writer, config in zip(writers, configs, strict=True):
            write_companions(writer.path, like=folder, dtype=dtype)
            lineage = injection_lineage(folder, vector, config, is_relative=is_relative)
            lineage["rounding"] = options.rounding.text
            if options.verify:
                lineage["target_hash"] = weights_hash(digests_of(totals, "target"))
            write_json(writer.path / LINEAGE_FILE, lineage)


def _open_both(target: Place, skill: Place) -> tuple[Folder, SkillVector]:
    folder = open_folder(target)
    if is_skill(folder):
        raise SkillVectorError(
            f"the target must be a model, but {folder} is a skill vector. Swap the two, or use"
            " combine to add vectors."
        )
    return folder, SkillVector(skill)


def _open_target(
    folder: Folder, vector: SkillVector, *, allow_other_base: bool
) -> tuple[StoredWeights, bool]:
    """Return the target's weights, and whether they grew from the vector's base."""
    check_same_fingerprint(
        f"target {folder}",
        fingerprint(folder),
        f"skill {vector.folder}",
        vector.manifest.fingerprint,
    )
    target = open_weights(folder)
    check_float_tensors(f"target {folder}", target)
    check_has_parameters(
        f"target {folder}", target.shapes(), f"skill {vector.folder}", vector.manifest.shapes
    )
    is_relative = check_base(folder, target, vector.manifest, allow_other_base=allow_other_base)
    return target, is_relative


def _write_models(
    writers: Sequence[FolderWriter],
    target: StoredWeights,
    vector: SkillVector,
    configs: Sequence[ScaleConfig],
    options: _Options,
    settings: StreamSettings,
) -> dict[str, TensorTotals]:
    dtypes = target.dtypes()
    if options.rounding.dtype is not None:
        dtypes = dict.fromkeys(dtypes, _DTYPES[options.rounding.dtype])
    names = vector.manifest.tensors
    injection = Injection(
        target=target,
        vector=vector,
        scales=tuple(_factors(names, config) for config in configs),
        dtypes=dtypes,
        rounding_seed=options.rounding.seed,
        verify=options.verify,
    )
    return write_weights(
        writers, injection, shapes=target.shapes(), dtypes=dtypes, settings=settings
    )


def _factors(names: Iterable[str], config: ScaleConfig) -> dict[str, float]:
    factors = {name: scale_of(name, config) for name in names}
    for name, factor in factors.items():
        check_scale(factor, of=f" of {name}")
    return factors


def _scale_config(scale: Scale) -> ScaleConfig:
    if isinstance(scale, ScaleConfig):
        return scale
    check_scale(scale)
    return ScaleConfig(scale=scale)
