"""Memory, operations and seconds of training and generation, from a model's shape.

Pure formulas; ``docs/planning.md`` derives them and says what they leave out. N is the number of
all weights, M that of the weights in matrix products (no input embedding), L layers, d the hidden
size, f the feed-forward size, k the size of a token's keys, V the vocabulary. Memory is in bytes of
one GPU, time in seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from past_ray.config.plan import ModelShape

FP32 = 4
"""Bytes of a master weight, a gradient or a moment."""

BF16 = 2
"""Bytes of a weight in a matrix product, a kept activation or a cached key."""

LOGIT_BYTES = 12
"""One logit in the loss: bf16 and its fp32 copy, and the gradients of both."""

MAX_CONCURRENT = 256
"""Sequences that one engine decodes together; vLLM's ``max_num_seqs`` in our configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes on one GPU at the peak of a training step."""

    state: float
    """Masters, gradients, moments and the frozen reference: this rank's share."""

    gathered: float
    """What FSDP has gathered at one time, and bf16 copies of weights."""

    activations: float
    """Kept for the backward pass."""

    logits: float
    """The vocabulary projection and its gradient."""

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.state + self.gathered + self.activations + self.logits


def lora_parameters(shape: ModelShape, *, rank: int, target_modules: Sequence[str]) -> int:
    """Return the weights of an adapter: ``rank (inputs + outputs)`` for each linear layer."""
    d, f, k = shape.hidden_size, shape.intermediate_size, shape.kv_size
    sizes = {
        "q_proj": d + d,
        "k_proj": d + k,
        "v_proj": d + k,
        "o_proj": d + d,
        "gate_proj": d + f,
        "up_proj": d + f,
        "down_proj": f + d,
    }
    return shape.num_layers * rank * sum(sizes[name] for name in target_modules)


def training_memory(
    shape: ModelShape,
    *,
    num_ranks: int,
    num_tokens: int,
    num_logits: int,
    gradient_checkpointing: bool,
    num_adapter_parameters: int | None = None,
    frozen_bytes: int = FP32,
    has_reference: bool = False,
) -> TrainingMemory:
    """Return the peak of mixed-precision AdamW under FSDP.

    State over the ranks: 16 N (masters 4, gradients 4, moments 8), or with an adapter of A weights
    4 N + 16 A. Gathered, with several ranks: two layers and the embeddings in fp32, with their
    gradients unless frozen. The bf16 copies of weights live until the backward pass: M of them, or
    with checkpointing those of one layer and the head. A frozen base in bf16 takes 2 N and no copy.

    Args:
        shape: Sizes of the model.
        num_ranks: GPUs over which FSDP shards.
        num_tokens: Tokens of one micro-batch.
        num_logits: Tokens of it that reach the vocabulary.
        gradient_checkpointing: Only the input of each layer is kept.
        num_adapter_parameters: Weights of the LoRA adapter; None trains all weights.
        frozen_bytes: Bytes of each weight under an adapter, ``FP32`` or ``BF16``.
        has_reference: A frozen fp32 copy of the model is sharded alongside.
    """
    head, layer = shape.vocab_size * shape.hidden_size, shape.layer_matrix_parameters
    copies = BF16 * (layer + head if gradient_checkpointing else shape.matrix_parameters)
    if num_adapter_parameters is None:
        state, gathered_bytes = 4 * FP32 * shape.num_parameters, 2 * FP32
    else:
        state = 4 * FP32 * num_adapter_parameters + frozen_bytes * shape.num_parameters
        gathered_bytes = frozen_bytes
        copies = 0 if frozen_bytes == BF16 else copies
    if has_reference:
        state += FP32 * shape.num_parameters
    embeddings = head * (1 if shape.tie_word_embeddings else 2)
    gathered = 0 if num_ranks == 1 else gathered_bytes * (2 * layer + embeddings)
    per_token = activation_bytes_per_token(shape, gradient_checkpointing=gradient_checkpointing)
    return TrainingMemory(
        state=state / num_ranks,
        gathered=gathered + copies,
        activations=per_token * num_tokens,
        logits=LOGIT_BYTES * shape.vocab_size * num_logits,
    )


def activation_bytes_per_token(shape: ModelShape, *, gradient_checkpointing: bool) -> int:
    """Return what one token leaves for the backward pass, attention being fused.

    One layer keeps in fp32 the two residuals and their normed values, and in bf16 five casts of
    the latter (for query, key, value, gate, up), query, key, value, the output of attention and
    four feed-forward tensors (gate, its activation, up, their product):
    ``c = 4 (4 d) + 2 (7 d + 2 k + 4 f)``. All layers: ``L c``. With checkpointing the fp32 input
    of each layer, and one whole layer at a time: ``4 L d + c``.

    Differs from the paper: its layer has GELU, dropout and bf16 residuals, which gives 34 d.

    Reference: https://arxiv.org/abs/2205.05198 section 4.1.
    """
    d, f, k = shape.hidden_size, shape.intermediate_size, shape.kv_size
    layer = FP32 * 4 * d + BF16 * (7 * d + 2 * k + 4 * f)
    if gradient_checkpointing:
        return FP32 * shape.num_layers * d + layer
    return shape.num_layers * layer


def kv_bytes_per_token(shape: ModelShape) -> int:
    """Return ``2 bytes * 2 L k``: keys and values of one token in bf16."""
    return BF16 * 2 * shape.num_layers * shape.kv_size


def generation_memory(
    shape: ModelShape, *, tensor_parallel: int, num_sequences: int, sequence_tokens: int
) -> float:
    """Return bf16 weights and the cache of the sequences decoded together, over the GPUs.

    Args:
        shape: Sizes of the model.
        tensor_parallel: GPUs of one engine.
        num_sequences: Sequences of one engine; it decodes at most ``MAX_CONCURRENT`` together.
        sequence_tokens: Longest prompt plus completion.
    """
    concurrent = min(num_sequences, MAX_CONCURRENT)
    cache = kv_bytes_per_token(shape) * concurrent * sequence_tokens
    return (BF16 * shape.num_parameters + cache) / tensor_parallel


def forward_flops(shape: ModelShape, *, num_tokens: float, sequence_tokens: float) -> float:
    """Return ``2 M D + 2 L d D (t + 1)`` for D tokens in sequences of t.

    The second term is causal attention: scores and values, on the pairs that are not masked.
    """
    return num_tokens * (2 * shape.matrix_parameters + _attention_flops(shape, sequence_tokens))


def training_flops(
    shape: ModelShape,
    *,
    num_tokens: float,
    sequence_tokens: float,
    is_lora: bool,
    gradient_checkpointing: bool,
) -> float:
    """Return ``6 M D`` and three times attention; ``4 M D`` with LoRA; a forward more if twice.

    The backward pass multiplies once for the gradients of activations and once for those of
    weights; frozen weights need only the first. Attention has no weights.

    Reference: https://arxiv.org/abs/2001.08361 section 2.1 (6 N D).
    """
    matrices = (4 if is_lora else 6) * shape.matrix_parameters
    once = num_tokens * (matrices + 3 * _attention_flops(shape, sequence_tokens))
    again = forward_flops(shape, num_tokens=num_tokens, sequence_tokens=sequence_tokens)
    return once + again if gradient_checkpointing else once


def generation_seconds(
    shape: ModelShape,
    *,
    num_sequences: int,
    prompt_tokens: float,
    new_tokens: float,
    num_engines: int,
    tensor_parallel: int,
    flops_per_s: float,
    bytes_per_s: float,
) -> float:
    """Return the time of prompts (bound by operations) and of decoding (usually by bandwidth).

    An engine with S sequences decodes C = min(S, MAX_CONCURRENT) together, in ``new_tokens S / C``
    steps. A step reads the weights and C caches that are half grown: ``2 M + C kv (p + n / 2)``
    bytes. It cannot be faster than its operations, which bind when C is large.

    Args:
        shape: Sizes of the model.
        num_sequences: Completions in all.
        prompt_tokens: Mean prompt p.
        new_tokens: Mean completion n.
        num_engines: Copies of the model.
        tensor_parallel: GPUs of each.
        flops_per_s: Operations per second that one GPU reaches.
        bytes_per_s: Bytes per second that one GPU reaches.
    """
    each = math.ceil(num_sequences / num_engines)
    concurrent = min(each, MAX_CONCURRENT)
    context = prompt_tokens + new_tokens / 2
    read = BF16 * shape.matrix_parameters + concurrent * kv_bytes_per_token(shape) * context
    step = read / (bytes_per_s * tensor_parallel)
    prompts = forward_flops(
        shape, num_tokens=each * prompt_tokens, sequence_tokens=prompt_tokens
    ) / (flops_per_s * tensor_parallel)
    decoding = forward_flops(shape, num_tokens=each * new_tokens, sequence_tokens=2 * context) / (
        flops_per_s * tensor_parallel
    )
    return prompts + max(new_tokens * each / concurrent * step, decoding)


def adapter_seconds(
    shape: ModelShape,
    *,
    num_sequences: int,
    sequence_tokens: float,
    flops_per_s: float,
    bytes_per_s: float,
) -> float:
    """Return the time of one adapter's training with batches of one sequence, on one GPU.

    Short sequences do not fill a GPU: a step takes at least what two readings of the bf16 weights
    take, ``4 M`` bytes.

    Args:
        shape: Sizes of the model.
        num_sequences: Sequences of all epochs, which is optimizer steps.
        sequence_tokens: Mean sequence.
        flops_per_s: Operations per second that the GPU reaches.
        bytes_per_s: Bytes per second that the GPU reaches.
    """
    operations = training_flops(
        shape,
        num_tokens=sequence_tokens,
        sequence_tokens=sequence_tokens,
        is_lora=True,
        gradient_checkpointing=False,
    )
    reading = 2 * BF16 * shape.matrix_parameters
    return num_sequences * max(operations / flops_per_s, reading / bytes_per_s)


def _attention_flops(shape: ModelShape, sequence_tokens: float) -> float:
    """Return the forward operations of attention for one token, over all layers."""
    return 2 * shape.num_layers * shape.hidden_size * (sequence_tokens + 1)
