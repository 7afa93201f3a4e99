"""The supervised loss: one sum over tokens, divided by the count of the whole optimizer step.

Shapes: B = sequences, T = token positions, V = vocabulary.

``num_loss_tokens`` counts all micro-batches and all ranks before the first backward pass, so any
split of a step into micro-batches adds up to the same loss and the same gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""Label of a position without loss; ``cross_entropy`` skips it."""


def next_token_loss(logits: Tensor, *, labels: Tensor, num_loss_tokens: int) -> Tensor:
    """Cross-entropy of each label under the logits one position before it, summed and divided.

    ``L = -(1/N) sum_t log softmax(logits[t - 1])[labels[t]]`` over ``labels[t] != IGNORED`` and
    ``t >= 1``, with ``N = num_loss_tokens``. Computed in float32.

    Args:
        logits: ``[B, T, V]`` of any float dtype; carries grad.
        labels: ``[B, T]`` token ids; ``IGNORED`` on the prompt and on padding.
        num_loss_tokens: Loss tokens of the whole optimizer step, over all ranks.

    Returns:
        A scalar; 0 with gradient 0 where no label counts.
    """
    scored = logits[:, :-1].flatten(0, 1).float()
    targets = labels[:, 1:].flatten()
    total = functional.cross_entropy(scored, targets, ignore_index=IGNORED, reduction="sum")
    return total / num_loss_tokens


def padded_batch(
    token_ids: list[tuple[int, ...]], *, num_prompt_tokens: list[int], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad sequences on the right to the longest of them.

    The mask and the labels follow from lengths, never from token values.

    Args:
        token_ids: B sequences.
        num_prompt_tokens: B counts of leading tokens without loss.
        pad_id: Any valid id; padding is neither attended to nor trained.

    Returns:
        ``input_ids`` ``[B, T]``, ``attention_mask`` ``[B, T]`` (1 on real tokens) and ``labels``
        ``[B, T]`` (``IGNORED`` on the prompt and on padding), all int64.
    """
    shape = (len(token_ids), max(len(sequence) for sequence in token_ids))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, (sequence, prompt) in enumerate(zip(token_ids, num_prompt_tokens, strict=True)):
        ids = torch.tensor(sequence, dtype=torch.int64)
        input_ids[row, : len(sequence)] = ids
        attention_mask[row, : len(sequence)] = 1
        labels[row, prompt : len(sequence)] = ids[prompt:]
    return input_ids, attention_mask, labels
