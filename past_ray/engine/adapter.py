"""LoRA adapters of PEFT: put around a model, and merged out of its state."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from past_ray.config.sft import LoraConfig
from past_ray.rl.adapter_weights import AdapterWeights


def add_adapter(model: PreTrainedModel, lora: LoraConfig, *, seed: int) -> nn.Module:
    """Put a LoRA adapter around ``model``, freeze the rest and return the PEFT model.

    Args:
        model: The model; its linear layers are wrapped in place.
        lora: Size and place of the adapter.
        seed: Seed of its first factor; the second is 0, so outputs do not change. The state of
            the global generator is left alone.
    """
    import peft  # Takes a second to import, and full fine-tuning does not need it.

    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, adapter)


def adapter_weights(state: dict[str, Tensor], lora: LoraConfig) -> AdapterWeights:
    """Return the adapter's factors out of the state of a PEFT model, under the names of its files.

    Args:
        state: Holds at least the adapter.
        lora: Its size and place.
    """
    factors = {
        name.replace(".default.", "."): value for name, value in state.items() if ".lora_" in name
    }
    return AdapterWeights(
        tensors=factors,
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=tuple(lora.target_modules),
    )


def merge_adapter(state: dict[str, Tensor], *, scaling: float) -> dict[str, Tensor]:
    """Return plain weights: ``W + scaling * B A`` where PEFT put an adapter, else ``W``.

    Args:
        state: State of a PEFT model with one LoRA adapter on linear layers, in fp32.
        scaling: ``alpha / rank`` of the adapter.

    Returns:
        Weights under the names of the model without an adapter; ``state`` is not changed.
    """
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        plain = name.removeprefix("base_model.model.")
        layer, is_wrapped, parameter = name.rpartition(".base_layer.")
        if is_wrapped and parameter == "weight":
            down, up = (
                state[f"{layer}.lora_A.default.weight"],
                state[f"{layer}.lora_B.default.weight"],
            )
            value = value + scaling * (up @ down)
        merged[plain.replace(".base_layer.", ".")] = value
    return merged
