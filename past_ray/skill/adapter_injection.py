"""A skill vector in the LoRA form added to a target that is a LoRA adapter itself."""

import logging
from dataclasses import replace

from past_ray.config.skill import ScaleConfig
from past_ray.errors import SkillVectorError
from past_ray.locations import Folder, Place, open_folder, write_folder
from past_ray.skill.adapter import Adapter, concatenate
from past_ray.skill.adapter_folder import CONFIG_FILE, read_adapter, write_adapter
from past_ray.skill.artefact import SkillVector, adapter_hash
from past_ray.skill.checkpoint import LINEAGE_FILE
from past_ray.skill.compatibility import check_has_parameters, check_same_fingerprint, fingerprint
from past_ray.skill.lineage import check_base, injection_lineage
from past_ray.skill.parameter_names import check_scales_match, scale_of
from past_ray.skill.weights import CONFIG_FILE as MODEL_CONFIG_FILE
from past_ray.skill.weights import open_weights
from past_ray.storage import write_json

BASE_KEY = "base_model_name_or_path"
"""Where PEFT's config names the model under an adapter."""

logger = logging.getLogger(__name__)


def inject_into_adapter(
    folder: Folder, vector: SkillVector, out: Place, config: ScaleConfig, *, allow_other_base: bool
) -> None:
    """Write the adapter of ``target's delta + scale * v``: their ranks add up, exactly.

    Args:
        folder: The target adapter.
        vector: What is added.
        out: Where the result goes.
        config: The scale, or one for each layer and module.
        allow_other_base: Accept a target whose base is not the vector's.

    Raises:
        SkillVectorError: The vector is dense, or the two adapters do not fit together.
        StorageError: A folder is unreadable, or the disk is full.
    """
    target, skill, is_relative = open_target_adapter(
        folder, vector, allow_other_base=allow_other_base
    )
    check_scales_match({**target.modules, **skill.modules}, config)
    scaled = {
        name: replace(module, scaling=module.scaling * scale_of(name, config))
        for name, module in skill.modules.items()
    }
    adapted = concatenate([(1.0, target), (1.0, Adapter(modules=scaled, config={}))])
    with write_folder(out, commit=CONFIG_FILE) as writer:
        write_adapter(writer.path, adapted, base_model=target.config.get(BASE_KEY))
        lineage = injection_lineage(folder, vector, config, is_relative=is_relative)
        lineage["target_hash"] = adapter_hash(target)
        write_json(writer.path / LINEAGE_FILE, lineage)


def open_target_adapter(
    folder: Folder, vector: SkillVector, *, allow_other_base: bool
) -> tuple[Adapter, Adapter, bool]:
    """Return target and vector as adapters, and whether their base is known to be one.

    Raises:
        SkillVectorError: The vector is dense, or the base under the target is not the vector's.
        StorageError: A folder is unreadable.
    """
    if vector.adapter is None:
        raise SkillVectorError(
            f"a target that is an adapter takes a vector in the LoRA form, but {vector.folder} is"
            " dense. Extract it with --rank, or merge the target's adapter into its base."
        )
    target = read_adapter(folder)
    base = target.config.get(BASE_KEY)
    is_relative = _check_base_model(folder, base, vector, allow_other_base=allow_other_base)
    return target, vector.adapter, is_relative


def _check_base_model(
    folder: Folder, base: str | None, vector: SkillVector, *, allow_other_base: bool
) -> bool:
    """Check the model under the target as far as it can be found."""
    if not base or not open_folder(base).has(MODEL_CONFIG_FILE):
        logger.warning(
            "adapter %s names no base folder that can be read (%s): only its modules' shapes are"
            " checked against the vector",
            folder,
            base,
        )
        return False
    check_same_fingerprint(
        f"base {base}", fingerprint(base), f"skill {vector.folder}", vector.manifest.fingerprint
    )
    weights = open_weights(base)
    check_has_parameters(
        f"base {base}", weights.shapes(), f"skill {vector.folder}", vector.manifest.shapes
    )
    return check_base(folder, weights, vector.manifest, allow_other_base=allow_other_base)
