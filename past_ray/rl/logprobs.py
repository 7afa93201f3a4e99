"""From logits to log-probabilities: the one place that shifts by one and divides by temperature.

Logits at position ``t`` predict token ``t + 1``. Everything returned here is aligned with the
tokens: position ``t`` describes ``token_ids[:, t]``, and position 0, which nothing predicts, is 0.

Shapes: B = sequences, T = token positions, V = vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

ENTROPY_CHUNK = 128
"""Positions whose full distribution is held at once."""


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float) -> Tensor:
    """Return ``[B, T]`` log-probabilities of the tokens under ``softmax(logits / temperature)``.

    Computed in float32 whatever the logits are in; differentiable.

    Args:
        logits: ``[B, T, V]`` output of the model for ``token_ids``.
        token_ids: ``[B, T]``.
        temperature: The temperature the tokens were sampled at, above 0.
    """
    scaled = logits[:, :-1].float() / temperature
    chosen = scaled.gather(-1, token_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return pad(chosen - scaled.logsumexp(dim=-1), (1, 0))


def token_entropy(logits: Tensor, *, temperature: float) -> Tensor:
    """Return ``[B, T]`` entropies, in nats, of the distribution each token was drawn from.

    ``H = logsumexp(z) - sum_v softmax(z)_v z_v`` with ``z = logits / temperature``. Computed in
    chunks of positions, so the memory is that of ``ENTROPY_CHUNK`` positions.

    Args:
        logits: ``[B, T, V]``.
        temperature: As in ``token_logprobs``.
    """
    chunks: list[Tensor] = []
    for chunk in logits[:, :-1].split(ENTROPY_CHUNK, dim=1):
        logprobs = torch.log_softmax(chunk.float() / temperature, dim=-1)
        # A token that was masked with -inf has probability 0 and adds nothing.
        weighted = torch.where(logprobs.isinf(), 0.0, logprobs.exp() * logprobs)
        chunks.append(-weighted.sum(dim=-1))
    return pad(torch.cat(chunks, dim=1), (1, 0))
