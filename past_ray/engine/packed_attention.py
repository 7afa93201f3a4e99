"""Causal attention inside each sequence of a packed row, for any transformers decoder.

A mask over the whole row would cost N^2 and hide which blocks are empty. Here the row is cut into
its sequences and each runs the causal kernel of PyTorch, which needs no mask.

Shapes: N = tokens of the row, H = query heads, K = key-value heads, D = size of a head.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from past_ray.errors import ConfigError

PACKED_ATTENTION = "past_ray_packed"
"""Value of transformers' ``attn_implementation``."""

PACKABLE_LAYERS = ("full_attention", "sliding_attention")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: tuple[int, ...],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return ``[1, N, H, D]``: causal attention of each sequence to itself.

    Args:
        module: The layer, unused; part of the interface of transformers, as are other keywords.
        query: ``[1, H, N, D]``.
        key: ``[1, K, N, D]`` with H a multiple of K.
        value: As ``key``.
        attention_mask: Unused; there is no padding.
        sequence_lengths: Tokens of each sequence of the row; given to the model's forward.
        scaling: Factor of the scores.
        sliding_window: Most positions a token sees, in layers that have such a limit.

    Raises:
        ConfigError: If a sequence is longer than the window.
    """
    if sliding_window is not None and max(sequence_lengths) > sliding_window:
        raise ConfigError(
            f"Sequences must fit the model's sliding window of {sliding_window} tokens, got "
            f"{max(sequence_lengths)}. Lower the prompt's length or rl.max_new_tokens."
        )
    # split() and cat() are each other's gradients; slices would each fill a gradient of the row.
    parts = zip(
        *(tensor.split(sequence_lengths, dim=2) for tensor in (query, key, value)), strict=True
    )
    attended = [
        scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)
        for q, k, v in parts
    ]
    return torch.cat(attended, dim=1), None


def check_packable(model: PreTrainedModel) -> None:
    """Refuse models whose layers would mix the sequences of a row.

    Raises:
        ConfigError: A layer is not attention, or attention cannot be replaced.
    """
    config = cast("Any", model.config.get_text_config())
    kinds = set(cast("list[str]", getattr(config, "layer_types", None) or PACKABLE_LAYERS))
    others = sorted(kinds - set(PACKABLE_LAYERS))
    has_more = [name for name in ("attn_logit_softcapping",) if getattr(config, name, None)]
    if others or has_more or not getattr(model, "_supports_attention_backend", False):
        found = others or has_more or "attention of its own"
        raise ConfigError(
            f"A policy must be a decoder of plain attention layers, such as Llama or Qwen, got "
            f"{type(model).__name__} with {found}. Choose another model."
        )


AttentionInterface.register(PACKED_ATTENTION, cast("Any", packed_attention))
