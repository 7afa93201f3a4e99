"""Models as the learner needs them: fp32, no dropout, packed attention."""

from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from past_ray.config.rl import RLConfig
from past_ray.engine.adapter import add_adapter
from past_ray.engine.packed_attention import PACKED_ATTENTION, check_packable
from past_ray.engine.sharding import shard_model
from past_ray.skill.checkpoint import read_config

ADAPTER_SEED = 0
"""Every rank, and a restarted run, must start from the same random adapter."""


def load_policy(config: RLConfig, folder: Path, *, device: str) -> nn.Module:
    """Read, wrap and shard the weights that train; a fresh adapter changes no output."""
    model = cast("nn.Module", _load(folder))
    if config.lora is not None:
        model = add_adapter(cast("PreTrainedModel", model), config.lora, seed=ADAPTER_SEED).eval()
    if config.gradient_checkpointing:
        _checkpoint_gradients(model)
    return shard_model(model.to(device))


def load_reference(folder: Path, *, device: str) -> nn.Module:
    """Read and shard frozen weights."""
    model = cast("nn.Module", _load(folder))
    return shard_model(model.requires_grad_(False).to(device))


def _load(folder: Path) -> PreTrainedModel:
    """Read a checkpoint in fp32, with dropout off for good.

    Adam steps at usual learning rates vanish in 16-bit weights, so masters are fp32.
    """
    read_config(folder)
    transformers_logging.disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=PACKED_ATTENTION, local_files_only=True
    )
    check_packable(model)
    return model.eval()


def _checkpoint_gradients(model: nn.Module) -> None:
    """Recompute layers in the backward pass.

    transformers does so only for layers in training mode. Their children stay in evaluation mode,
    so dropout stays off.
    """
    cast("PreTrainedModel", model).gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
