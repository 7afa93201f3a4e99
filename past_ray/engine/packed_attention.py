"""Causal attention inside each sequence of a packed row, for any transformers decoder.

A mask over the whole row would cost N^2 and hide which blocks are empty. Here the row is cut into
its segments: a whole sequence runs the causal kernel of PyTorch, which needs no mask; one that goes
on from a shared prompt sees the prompt's keys before its own. Neighbours of equal length and prompt
run together.

Shapes: N = tokens of the row, H = query heads, K = key-value heads, D = size of a head.
"""

from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from past_ray.engine.packing import Segment
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
    segments: tuple[Segment, ...],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return ``[1, N, H, D]``: causal attention of each segment to its prompt and itself.

    Args:
        module: The layer, unused; part of the interface of transformers, as are other keywords.
        query: ``[1, H, N, D]``.
        key: ``[1, K, N, D]`` with H a multiple of K.
        value: As ``key``.
        attention_mask: Unused; there is no padding.
        segments: What the row is made of; given to the model's forward.
        scaling: Factor of the scores.
        sliding_window: Most positions a token sees, in layers that have such a limit.

    Raises:
        ConfigError: If a sequence is longer than the window.
    """
    longest = max(segment.length + _prompt_length(segment, segments) for segment in segments)
    if sliding_window is not None and longest > sliding_window:
        raise ConfigError(
            f"Sequences must fit the model's sliding window of {sliding_window} tokens, got "
            f"{longest}. Lower the prompt's length or rl.max_new_tokens."
        )
    # split() and cat() are each other's gradients; slices would each fill a gradient of the row.
    runs = _runs(segments)
    sizes = [len(run) * segments[run[0]].length for run in runs]
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    places = {run[0]: place for place, run in enumerate(runs)}
    # PyTorch's CPU kernel is several times slower in 16 bit than in float32 on short sequences.
    dtype = torch.float32 if query.device.type == "cpu" else query.dtype
    attended: list[Tensor] = []
    for run, q, k, v in zip(runs, queries, keys, values, strict=True):
        q, k, v = (_stacked(tensor, len(run)) for tensor in (q, k, v))  # [R, H, n, D]
        mask = None
        before = segments[run[0]].prompt
        if before is not None:
            prompt = places[before]
            k = torch.cat([keys[prompt].expand(len(run), -1, -1, -1), k], dim=2)
            v = torch.cat([values[prompt].expand(len(run), -1, -1, -1), v], dim=2)
            num_before = k.shape[2] - q.shape[2]
            mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(num_before)
        # Autocast would turn the float32 back into 16 bit.
        with torch.autocast(query.device.type, enabled=False):
            output = scaled_dot_product_attention(
                q.to(dtype),
                k.to(dtype),
                v.to(dtype),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        attended.append(output.transpose(1, 2).flatten(0, 1))  # [R * n, H, D]
    return torch.cat(attended).unsqueeze(0).to(query.dtype), None


def _runs(segments: tuple[Segment, ...]) -> list[list[int]]:
    """Return the places of neighbours of equal length and prompt; a shared prompt stands alone."""
    prompts = {segment.prompt for segment in segments}
    runs = groupby(
        range(len(segments)), key=lambda place: (segments[place], place if place in prompts else -1)
    )
    return [list(run) for _, run in runs]


def _stacked(tensor: Tensor, num_rows: int) -> Tensor:
    """Turn ``[1, H, R * n, D]``, R segments of equal length, into ``[R, H, n, D]``."""
    return tensor.squeeze(0).unflatten(1, (num_rows, -1)).transpose(0, 1)


def _prompt_length(segment: Segment, segments: tuple[Segment, ...]) -> int:
    return 0 if segment.prompt is None else segments[segment.prompt].length


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
