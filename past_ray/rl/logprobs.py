"""From logits to log-probabilities: the one place that divides by temperature.

Row ``i`` of the logits predicts token ``i``; whoever lays out the rows shifts them by one
(``engine/packing.py``).

Shapes: n = tokens, V = vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ROWS = 128
"""Rows whose full distribution is held in float32 at once."""

LOWEST = torch.finfo(torch.float32).min
"""Stands for -inf, the logit of a masked token, where it is multiplied by a probability of 0."""


def chosen_logprobs(
    logits: Tensor, token_ids: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of tokens and entropies of their distributions, both ``[n]``.

    ``log p = z_token - logsumexp(z)`` and ``H = logsumexp(z) - sum_v softmax(z)_v z_v`` with
    ``z = logits / temperature``, in nats and in float32 whatever the logits are in. Both are
    differentiable.

    Besides ``logits`` no tensor of ``[n, V]`` ever exists: the backward pass writes the gradient
    over the logits, which must have no other use and allow one backward pass.

    Args:
        logits: ``[n, V]``; overwritten by the backward pass.
        token_ids: ``[n]``.
        temperature: The temperature the tokens were sampled at, above 0.
    """
    return cast("tuple[Tensor, Tensor]", _ChosenLogprobs.apply(logits, token_ids, temperature))


class _ChosenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        logits, token_ids, temperature = args
        normalizer, chosen, entropy = torch.empty(3, logits.shape[0], device=logits.device)
        for part in _chunks(logits):
            normalizer[part], chosen[part], entropy[part] = _describe(
                logits[part].float() / temperature, token_ids[part]
            )
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, token_ids, normalizer, entropy)
        return chosen - normalizer, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        *grads: Tensor | None,
    ) -> tuple[Tensor, None, None]:
        logits, token_ids, normalizer, entropy = ctx.saved_tensors
        grad_chosen, grad_entropy = (torch.zeros_like(entropy) if g is None else g for g in grads)
        has_bonus = grads[1] is not None
        for part in _chunks(logits):
            scaled = logits[part].float() / ctx.temperature
            logprobs = scaled.sub_(normalizer[part].unsqueeze(-1))
            factor = grad_chosen[part].unsqueeze(-1)
            slope = -factor
            if has_bonus:
                surprise = logprobs.clamp_min(LOWEST) + entropy[part].unsqueeze(-1)
                slope = slope - grad_entropy[part].unsqueeze(-1) * surprise
            # d log p / d z_v = [v is the token] - p_v;  d H / d z_v = -p_v (log p_v + H)
            gradient = logprobs.exp_().mul_(slope)
            gradient.scatter_add_(-1, token_ids[part].unsqueeze(-1), factor)
            logits[part] = gradient.div_(ctx.temperature)
        return logits, None, None


def _chunks(logits: Tensor) -> list[slice]:
    return [slice(row, row + CHUNK_ROWS) for row in range(0, logits.shape[0], CHUNK_ROWS)]


def _describe(scaled: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logsumexp, the token's own logit and the entropy of each row."""
    top = scaled.amax(dim=-1, keepdim=True)
    weights = (scaled - top).exp_()
    total = weights.sum(dim=-1)
    normalizer = total.log() + top.squeeze(-1)
    chosen = scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    mean = torch.linalg.vecdot(weights, scaled.clamp_min(LOWEST)) / total
    return normalizer, chosen, normalizer - mean
