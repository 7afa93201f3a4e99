"""A part of a skill vector as a vector of its own: chosen layers and modules."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from past_ray.errors import SkillVectorError
from past_ray.locations import Place, write_folder
from past_ray.skill.adapter import Adapter
from past_ray.skill.artefact import (
    SkillVector,
    vector_sums,
    write_adapter_skill,
    write_dense_skill,
)
from past_ray.skill.blocks import Chunk, Measures, Workspace, block_digests, digests_of
from past_ray.skill.manifest import MANIFEST_FILE, Ingredient, SkillManifest
from past_ray.skill.parameter_names import select_names
from past_ray.skill.places import check_places
from past_ray.skill.stream import StreamSettings, write_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Copying:
    """Copies a vector's entries and corrections as they are."""

    vector: SkillVector
    """What is copied."""

    def __call__(self, chunk: Chunk, workspace: Workspace) -> tuple[list[Tensor], Measures]:
        """Return the ``[n]`` entries, and digests, sums and corrections."""
        values = self.vector.read(chunk, workspace)
        measures = Measures(digests={"vector": block_digests(values)}, sums=vector_sums(values))
        if (found := self.vector.corrections(chunk)) is not None:
            measures.corrections.append((found[0] + chunk.start, found[1]))
        return [values], measures


def select(
    skill: Place,
    out: Place,
    *,
    layers: str | None = None,
    modules: Sequence[str] | None = None,
    settings: StreamSettings | None = None,
) -> SkillManifest:
    """Write the chosen parameters of a skill vector as a skill folder, atomically.

    Injecting it leaves every other parameter of the target as it is.

    Args:
        skill: Skill folder.
        out: Where the part goes.
        layers: Such as ``8-20`` or ``0,3,8-20``; None is all.
        modules: Names of modules (``q_proj``) or blocks (``attn``, ``mlp``); None is all.
        settings: How the work is shared out.

    Raises:
        ConfigError: ``layers`` has another form.
        SkillVectorError: Nothing is selected, or a range or a module is unknown.
        StorageError: A folder is unreadable, or the disk is full.
    """
    check_places([out], [skill])
    vector = SkillVector(skill)
    manifest = vector.manifest
    names = select_names(manifest.tensors, layers=layers, modules=modules)
    if not names:
        raise SkillVectorError(
            f"layers {layers} and modules {modules} must select a parameter of {vector.folder},"
            " found none that is in both. Select less strictly."
        )
    facts = {key: getattr(manifest, key) for key in _KEPT_FACTS} | {
        "operation": f"select layers {layers or 'all'} modules {','.join(modules or ['all'])}",
        "ingredients": [
            Ingredient(vector_hash=manifest.vector_hash, weight=1.0, task=manifest.task)
        ],
    }
    with write_folder(out, commit=MANIFEST_FILE) as writer:
        if vector.adapter is not None:
            chosen = {name: vector.adapter.modules[name] for name in names}
            return write_adapter_skill(
                writer,
                Adapter(modules=chosen, config={}),
                facts,
                energy_kept={name: manifest.tensors[name].energy_kept for name in names},
            )
        shapes = {name: manifest.shapes[name] for name in names}
        totals = write_weights(
            [writer],
            Copying(vector=vector),
            shapes=shapes,
            dtypes=dict.fromkeys(shapes, torch.float32),
            settings=settings or StreamSettings(),
        )
        vector.check_digests(digests_of(totals, "vector"))
        records = {name: manifest.tensors[name] for name in names}
        return write_dense_skill(writer, shapes, totals, facts, records=records)


_KEPT_FACTS = (
    "rl_hash",
    "sft_hash",
    "base_hash",
    "parent_hash",
    "fingerprint",
    "rl_dtype",
    "sft_dtype",
    "rl_path",
    "sft_path",
    "task",
    "source_data_hash",
    "refinement_round",
    "rl_recipe",
    "reward",
    "seed",
    "base_sketch",
)
"""What a part has in common with its whole."""
