"""Floating-point operations that a learner's step cannot do without."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes of a dense decoder with gated feed-forward layers, such as Llama or Qwen."""

    num_layers: int
    """Transformer layers."""

    hidden_size: int
    """Width of the residual stream."""

    intermediate_size: int
    """Width of the feed-forward layer."""

    num_heads: int
    """Query heads."""

    num_kv_heads: int
    """Key-value heads."""

    head_size: int
    """Width of a head."""

    vocab_size: int
    """Rows of the vocabulary projection."""


def decoder_shape(model_config: PreTrainedConfig) -> DecoderShape:
    """Read the sizes out of a configuration of transformers."""
    config = cast("Any", model_config)
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return DecoderShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=head_size,
        vocab_size=config.vocab_size,
    )


def step_flops(
    shape: DecoderShape, *, lengths: Sequence[int], num_loss_tokens: int, is_training: bool = True
) -> int:
    """Return the operations of matrix products: 2 per multiply-add, forward and backward.

    ``F = L (2 T W + sum_i 2 H D t_i (t_i + 1)) + 2 n d V``, three times that with the backward
    pass: T tokens in all, t_i of sample i, n that train, W weights of a layer's linear maps, L
    layers, H heads of size D, width d, vocabulary V. Attention counts each pair of a token and one
    it may see, once for the scores and once for the values. Not counted: what is computed twice
    (checkpointing) or for nothing (padding, masked pairs, positions that do not train), the
    optimizer, and everything that is no matrix product.

    Args:
        shape: Sizes of the model, all of whose weights train.
        lengths: Tokens of each sample.
        num_loss_tokens: Tokens that train, which alone need the vocabulary.
        is_training: False counts a forward pass.
    """
    width, heads = shape.hidden_size, shape.num_heads * shape.head_size
    projections = 2 * width * (heads + shape.num_kv_heads * shape.head_size)
    weights = projections + 3 * width * shape.intermediate_size
    linear = 2 * sum(lengths) * weights
    attention = sum(2 * heads * length * (length + 1) for length in lengths)
    vocabulary = 2 * num_loss_tokens * width * shape.vocab_size
    forward = shape.num_layers * (linear + attention) + vocabulary
    return 3 * forward if is_training else forward
