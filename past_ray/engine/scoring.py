"""A model's opinion of the tokens of a pack."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from past_ray.config.sft import Precision
from past_ray.engine.packing import Pack
from past_ray.rl.logprobs import chosen_logprobs


def score_pack(
    model: nn.Module, pack: Pack, *, temperature: float, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies, both ``[B, L]`` on the pack's grid.

    Only positions that predict a token of the grid reach the vocabulary projection, the largest
    tensor of a step.

    Args:
        model: A model of ``engine.learner_model`` on the device of the pack.
        pack: What to score.
        temperature: The temperature the tokens were sampled at.
        precision: ``bf16`` computes matrix products in bfloat16; weights and softmax stay fp32.
    """
    with _autocast(pack.token_ids.device.type, precision):
        logits = model(
            input_ids=pack.token_ids,
            position_ids=pack.position_ids,
            segments=pack.segments,
            logits_to_keep=pack.predictors,
            use_cache=False,
        ).logits.squeeze(0)
    logprobs, entropy = chosen_logprobs(logits, pack.targets, temperature=temperature)
    return pack.grid(logprobs), pack.grid(entropy)


def _autocast(device_type: str, precision: Precision) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.bfloat16)
