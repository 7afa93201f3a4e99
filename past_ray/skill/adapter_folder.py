"""PEFT adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

The files hold ``base_model.model.<module>.lora_A.weight`` ``[r, in]`` and ``...lora_B.weight``
``[out, r]``; whatever else PEFT can put there means more than ``W + scaling * B @ A`` and is
refused by name.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from past_ray.errors import SkillVectorError, StorageError
from past_ray.locations import Folder
from past_ray.skill.adapter import NUM_NAMES_SHOWN, Adapter, LoraModule, concatenate
from past_ray.storage import write_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

MUST_BE_UNSET = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of PEFT 0.21 that make a layer compute something else than ``W x + scaling * B A x``."""

PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""``init_lora_weights`` that leave the base as it is; PiSSA and others take a part out of it."""

_FACTOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.[^.]+)?\.weight")


def is_adapter(folder: Folder) -> bool:
    """Tell whether a folder says of itself that it is a PEFT adapter."""
    return folder.has(CONFIG_FILE)


def read_adapter(folder: Folder) -> Adapter:
    """Return the factors in float32, with the scaling that PEFT would give each module.

    Raises:
        SkillVectorError: The adapter is no plain LoRA, or its files contradict each other.
        StorageError: A file is missing, cut off or no safetensors file.
    """
    config = folder.read_json(CONFIG_FILE)
    _check_plain_lora(folder, config)
    factors = _read_factors(folder)
    lone = [f"{name} with only lora_{''.join(f)}" for name, f in factors.items() if len(f) < 2]
    _refuse(folder, "hold lora_A and lora_B of each module", lone, "Save the adapter again.")
    modules: dict[str, LoraModule] = {}
    misfits: list[str] = []
    for name in sorted(factors):
        a, b = factors[name]["A"], factors[name]["B"]
        rank, scaling = _rank_and_scaling(folder, config, name)
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            misfits.append(f"{name} A {tuple(a.shape)} B {tuple(b.shape)} for rank {rank}")
        modules[f"{name}.weight"] = LoraModule(a=a, b=b, scaling=scaling)
    _refuse(
        folder,
        f"hold A [r, in] and B [out, r] with the ranks of its {CONFIG_FILE}",
        misfits,
        "Copy both files from one save.",
    )
    return Adapter(modules=modules, config=config)


def write_adapter(folder: Path, adapter: Adapter, *, base_model: str | None) -> None:
    """Write a plain PEFT adapter in float32 into ``folder``; not atomic by itself.

    What is written is ``concatenate([(1.0, adapter)])``: one rank, scaling 1. Modules are listed by
    their full names, because some layers may have a module that others lack.

    Args:
        folder: Created if it is missing.
        adapter: What to write.
        base_model: Folder or name of the base model, for the reader.

    Raises:
        SkillVectorError: The adapter changes nothing, or its rank is beyond what vLLM serves.
    """
    modules = concatenate([(1.0, adapter)]).modules
    names = {name: name.removesuffix(".weight") for name in modules}
    rank = next(iter(modules.values())).rank
    folder.mkdir(parents=True, exist_ok=True)
    factors = {f"{PREFIX}{names[name]}.lora_A.weight": module.a for name, module in modules.items()}
    factors |= {
        f"{PREFIX}{names[name]}.lora_B.weight": module.b for name, module in modules.items()
    }
    save_file(factors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "target_modules": list(names.values()),
    }
    write_json(folder / CONFIG_FILE, config)


def _check_plain_lora(folder: Folder, config: Mapping[str, Any]) -> None:
    expected = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": PLAIN_INITS}
    offenders = [
        f"{key}={config.get(key)!r}"
        for key, allowed in expected.items()
        if config.get(key) not in allowed
    ]
    offenders += [f"{key}={config[key]!r}" for key in MUST_BE_UNSET if config.get(key)]
    _refuse(
        folder,
        "be a plain LoRA adapter",
        offenders,
        "Merge it into its base model (PEFT's merge_and_unload) and give the merged model, or train"
        " without these settings.",
    )


def _read_factors(folder: Folder) -> dict[str, dict[str, Tensor]]:
    """Return ``{module: {"A": ..., "B": ...}}`` in float32, every tensor checked by itself."""
    factors: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    quantised: list[str] = []
    infinite: list[str] = []
    for key, tensor in sorted(_load(folder).items()):
        match = _FACTOR.fullmatch(key)
        if match is None or match["factor"] in factors.setdefault(match["module"], {}):
            unknown.append(key)
            continue
        if tensor.dtype not in FLOAT_DTYPES:
            quantised.append(f"{key} {tensor.dtype}")
        elif not tensor.float().isfinite().all():
            infinite.append(key)
        factors[match["module"]][match["factor"]] = tensor.float()
    _refuse(
        folder,
        f"hold one {PREFIX}<module>.lora_A.weight and lora_B.weight per module and nothing else",
        unknown or ([] if factors else ["no tensors"]),
        "Merge such an adapter into its base model and give the merged model.",
    )
    _refuse(folder, "hold floating point numbers", quantised, "Save it before quantisation.")
    _refuse(folder, "hold finite numbers", infinite, "Look for the step at which it diverged.")
    return factors


def _load(folder: Folder) -> dict[str, Tensor]:
    if not folder.has(WEIGHTS_FILE):
        raise StorageError(
            f"{folder} must hold {WEIGHTS_FILE} beside its {CONFIG_FILE}, found none."
            " Save the adapter as safetensors (save_pretrained does)."
        )
    try:
        return load(folder.read_bytes(WEIGHTS_FILE))
    except (SafetensorError, KeyError) as error:
        raise StorageError(
            f"{WEIGHTS_FILE} in {folder} must be a complete safetensors file, got: {error!r}."
            " Copy or train the adapter again."
        ) from error


def _rank_and_scaling(folder: Folder, config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """What PEFT's ``LoraModel`` gives the module ``name``."""
    rank = _setting(config, "r", "rank_pattern", name)
    alpha = _setting(config, "lora_alpha", "alpha_pattern", name)
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise SkillVectorError(
            f"{CONFIG_FILE} in {folder} must give a rank of at least 1 and an alpha for {name}, got"
            f" {rank!r} and {alpha!r}. Save the adapter with PEFT again."
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _setting(config: Mapping[str, Any], key: str, pattern_key: str, name: str) -> Any:  # noqa: ANN401 - JSON
    """PEFT's rule: the first pattern that the end of the name matches, from a dot on, wins."""
    patterns: dict[str, Any] = config.get(pattern_key) or {}
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return patterns.get(name, config.get(key))


def _refuse(folder: Folder, must: str, offenders: list[str], remedy: str) -> None:
    if offenders:
        raise SkillVectorError(
            f"{folder} must {must}, found {len(offenders)} that break this (first:"
            f" {', '.join(offenders[:NUM_NAMES_SHOWN])}). {remedy}"
        )
