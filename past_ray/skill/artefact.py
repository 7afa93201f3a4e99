"""Skill folders: written, opened and read, in both forms.

The dense form holds differences entry by entry::

    model.safetensors, or shards          float32, under the parameters' names
    model.safetensors.index.json          which file has which parameter
    corrections.safetensors               what float32 could not hold; only where there is something
    skill.json, README.md                 SkillManifest and its card

The LoRA form is a PEFT adapter (``adapter_model.safetensors``, ``adapter_config.json``) with the
same manifest and card. ``docs/skill-format.md`` specifies both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from past_ray.errors import SkillVectorError
from past_ray.locations import FolderWriter, Place, open_folder
from past_ray.skill.adapter import Adapter, LoraModule, concatenate, lora_delta
from past_ray.skill.adapter_folder import read_adapter, write_adapter
from past_ray.skill.arithmetic import Corrections
from past_ray.skill.blocks import (
    Chunk,
    TensorTotals,
    Workspace,
    blocks,
    digest_of,
    inner_product,
    weights_hash,
)
from past_ray.skill.checkpoint import save_tensors
from past_ray.skill.compatibility import check_same_parameters
from past_ray.skill.corrections import StoredCorrections, corrections_digest
from past_ray.skill.manifest import (
    CARD_FILE,
    CORRECTIONS_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    SkillManifest,
    TensorRecord,
    card,
    load_manifest,
    stamp,
)
from past_ray.skill.weights import StoredWeights, open_weights
from past_ray.storage import write_json, write_text

_ADVICE = {
    "difference": "RL and SFT are further apart than float32 reaches: check that one grew from the"
    " other.",
    "combination": "The sum is larger than float32 reaches: use smaller weights.",
    "adapted model": "The sum does not fit the dtype: use a smaller scale or another dtype.",
}
"""What to do about numbers that are not finite, where training is not to blame."""


class SkillVector:
    """An open skill folder of either form, read chunk by chunk as float32 differences.

    Several threads may read at once; it pickles without its open files.
    """

    def __init__(self, place: Place) -> None:
        """Open the folder and check it against its manifest, all but the dense numbers.

        Raises:
            SkillVectorError: It is no skill folder, or does not hold what its manifest says.
            StorageError: A file is missing, truncated or damaged.
        """
        self.folder = open_folder(place)
        self.manifest = load_manifest(self.folder)
        if not self.manifest.tensors:
            raise SkillVectorError(
                f"{self.folder} must hold at least one parameter, found none. Select less strictly,"
                " or extract it again."
            )
        self._weights: StoredWeights | None = None
        self._corrections: StoredCorrections | None = None
        self._adapter: Adapter | None = None
        if self.manifest.form == "lora":
            self._adapter = read_adapter(self.folder)
            shapes = {name: module.shape for name, module in self._adapter.modules.items()}
            digests = {n: _adapter_digest(m) for n, m in self._adapter.modules.items()}
        else:
            self._weights = open_weights(self.folder)
            shapes, digests = self._weights.shapes(), {}
            if any(record.corrections_digest for record in self.manifest.tensors.values()):
                self._corrections = StoredCorrections(self.folder, self.manifest)
        check_same_parameters(
            f"{self.folder}", shapes, f"its {MANIFEST_FILE}", self.manifest.shapes
        )
        self.check_digests(digests)
        self._check_own_hash()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_adapter": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come back in another process, where factors are read again instead of sent."""
        self.__dict__.update(state)
        if self.manifest.form == "lora":
            self._adapter = read_adapter(self.folder)

    @property
    def adapter(self) -> Adapter | None:
        """The factors, in the LoRA form."""
        return self._adapter

    def read(self, chunk: Chunk, workspace: Workspace, *, role: str = "vector") -> Tensor:
        """Return the ``[n]`` float32 differences of a chunk, in a buffer named ``role``."""
        if self._weights is not None:
            out = workspace.take(role, chunk.numel, torch.float32)
            self._weights.read(chunk.name, chunk.start, out)
            return out
        assert self._adapter is not None
        module = self._adapter.modules[chunk.name]
        width = module.shape[1]
        first, last = chunk.start // width, -(-chunk.stop // width)
        delta = lora_delta(module, rows=slice(first, last)).reshape(-1)
        return delta[chunk.start - first * width : chunk.stop - first * width]

    def corrections(self, chunk: Chunk) -> Corrections | None:
        """Return the corrections within a chunk, numbered from its start; None without any."""
        return None if self._corrections is None else self._corrections.within(chunk)

    @property
    def needs_check(self) -> bool:
        """Whether the differences' digests are still to be compared with the manifest."""
        return self._weights is not None

    def _check_own_hash(self) -> None:
        found = vector_hash(self.manifest.tensors)
        if found != self.manifest.vector_hash:
            raise SkillVectorError(
                f"{self.folder} must have the recorded vector_hash {self.manifest.vector_hash},"
                f" found {found} from its tensors and corrections. The {MANIFEST_FILE} was changed:"
                " copy or extract it again."
            )

    def check_digests(self, found: Mapping[str, str]) -> None:
        """Refuse numbers that are not those that were saved.

        Args:
            found: Digests of what was read, by parameter.

        Raises:
            SkillVectorError: With the first five damaged parameters.
        """
        damaged = [n for n, digest in found.items() if self.manifest.tensors[n].digest != digest]
        if damaged:
            raise SkillVectorError(
                f"{self.folder} must hold the numbers that its {MANIFEST_FILE} was written for;"
                f" {len(damaged)} tensors differ (first: {', '.join(damaged[:5])}). The folder was"
                " changed or damaged: copy or extract it again."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSkill:
    """A whole skill vector in memory."""

    vector: dict[str, Tensor]
    """Float32 differences by parameter."""

    corrections: dict[str, Corrections]
    """What float32 could not hold, by parameter; see ``arithmetic.correct``."""

    manifest: SkillManifest
    """What the folder says about itself."""


def load_skill(place: Place) -> LoadedSkill:
    """Return a skill vector of either form as float32 differences in memory, checked.

    Raises:
        SkillVectorError: It is no skill folder, or its numbers are not the ones it was saved with.
        StorageError: A file is missing, truncated or damaged.
    """
    skill, workspace = SkillVector(place), Workspace()
    vector: dict[str, Tensor] = {}
    corrections: dict[str, Corrections] = {}
    for name, shape in skill.manifest.shapes.items():
        whole = Chunk(name=name, start=0, stop=math.prod(shape))
        vector[name] = skill.read(whole, workspace).clone().view(shape)
        if (found := skill.corrections(whole)) is not None:
            corrections[name] = found
    if skill.needs_check:
        skill.check_digests({name: digest_of(tensor) for name, tensor in vector.items()})
    return LoadedSkill(vector=vector, corrections=corrections, manifest=skill.manifest)


def write_dense_skill(
    writer: FolderWriter,
    shapes: Mapping[str, tuple[int, ...]],
    totals: Mapping[str, TensorTotals],
    facts: Mapping[str, Any],
    *,
    records: Mapping[str, TensorRecord] | None = None,
) -> SkillManifest:
    """Write what a dense skill folder holds beside its differences; return the manifest.

    Args:
        writer: The folder, with its weights.
        shapes: Of the parameters.
        totals: What was measured while they were written.
        facts: Everything else that the manifest says.
        records: What is known of the parameters already; None takes it from ``totals``.
    """
    corrections = {
        f"{name}.{key}": value
        for name, total in totals.items()
        if total.corrections is not None
        for key, value in zip(("entries", "values"), total.corrections, strict=True)
    }
    if corrections:
        save_tensors(writer.path / CORRECTIONS_FILE, corrections)
    if records is None:
        records = {name: tensor_record(shapes[name], total) for name, total in totals.items()}
    return _write_manifest(writer, form="dense", records=records, facts=facts)


def write_adapter_skill(
    writer: FolderWriter,
    adapter: Adapter,
    facts: Mapping[str, Any],
    *,
    energy_kept: Mapping[str, float | None] | None = None,
) -> SkillManifest:
    """Write an adapter as a skill folder; return the manifest."""
    adapter = concatenate([(1.0, adapter)])
    write_adapter(writer.path, adapter, base_model=facts.get("sft_path"))
    records: dict[str, TensorRecord] = {}
    for name, module in adapter.modules.items():
        delta = lora_delta(module)
        records[name] = TensorRecord(
            shape=module.shape,
            digest=_adapter_digest(module),
            norm=math.sqrt(inner_product(delta, delta)),
            energy_kept=None if energy_kept is None else energy_kept[name],
        )
    return _write_manifest(writer, form="lora", records=records, facts=facts)


def adapter_hash(adapter: Adapter) -> str:
    """Return the hash of an adapter, as it would be stored in a skill folder."""
    stored = concatenate([(1.0, adapter)])
    return weights_hash({name: _adapter_digest(m) for name, m in stored.modules.items()})


def _adapter_digest(module: LoraModule) -> str:
    """Return the digest of both factors and their scaling."""
    scaling = torch.tensor(module.scaling, dtype=torch.float64)
    return weights_hash(
        {"A": digest_of(module.a), "B": digest_of(module.b), "scaling": digest_of(scaling)}
    )


def _write_manifest(
    writer: FolderWriter,
    *,
    form: str,
    records: Mapping[str, TensorRecord],
    facts: Mapping[str, Any],
) -> SkillManifest:
    """Write ``skill.json`` and the card; return the manifest."""
    own_hash = vector_hash(records)
    values = {**facts, "form": form, "vector_hash": own_hash}
    manifest = SkillManifest.model_validate(
        values
        | stamp()
        | {"format_version": FORMAT_VERSION, "dtype": "float32", "tensors": records}
    )
    write_text(writer.path / CARD_FILE, card(manifest))
    write_json(writer.path / MANIFEST_FILE, manifest.model_dump(mode="json"))
    return manifest


def check_finite(name: str, **values: Tensor) -> None:
    """Refuse NaN and infinity, and say in what they are.

    Raises:
        SkillVectorError: The first of ``values`` that is not finite.
    """
    for role, tensor in values.items():
        broken = int((~torch.isfinite(tensor)).sum())
        if broken:
            advice = _ADVICE.get(
                role, "Training diverged (lower the learning rate), or the file is damaged."
            )
            raise SkillVectorError(
                f"{role} must be finite, found {broken} NaN or infinite entries in {name}. {advice}"
            )


def vector_sums(vector: Tensor) -> dict[str, list[float]]:
    """Return what every dense vector's manifest needs, block by block, in float64."""
    sums: dict[str, list[float]] = {"square": [], "unchanged": []}
    for block in blocks(vector):
        sums["square"].append(inner_product(block, block))
        sums["unchanged"].append(float(block.numel() - torch.count_nonzero(block)))
    return sums


def tensor_record(shape: tuple[int, ...], total: TensorTotals) -> TensorRecord:
    """Return what the manifest says of a dense parameter."""
    sums = total.sums
    norm = math.sqrt(sums["square"])
    record = TensorRecord(
        shape=shape,
        digest=total.digests["vector"],
        norm=norm,
        num_unchanged=int(sums["unchanged"]),
        num_corrections=0 if total.corrections is None else len(total.corrections[0]),
        corrections_digest=corrections_digest(total.corrections),
    )
    # The largest float32 numbers are infinite in bfloat16.
    if not math.isfinite(sums.get("bf16_square", math.nan)):
        return record
    bf16_norm = math.sqrt(sums["bf16_square"])
    return record.model_copy(
        update={
            "num_bf16_changed": int(sums["bf16_changed"]),
            "bf16_norm": bf16_norm,
            "bf16_cosine": sums["bf16_inner"] / (norm * bf16_norm) if norm * bf16_norm else None,
        }
    )


def vector_hash(records: Mapping[str, TensorRecord]) -> str:
    """Return the hash of a vector's tensors and corrections."""
    digests = {name: record.digest for name, record in records.items()}
    for name, record in records.items():
        if record.corrections_digest is not None:
            digests[f"{name}.corrections"] = record.corrections_digest
    return weights_hash(digests)
