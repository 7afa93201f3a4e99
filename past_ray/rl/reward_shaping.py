"""Rewards changed before they are compared."""


def overlong_penalty(
    num_tokens: int, *, max_new_tokens: int, buffer_tokens: int, penalty: float
) -> float:
    """Return what is added to the reward of a completion for its length: 0 or less.

    0 up to ``max_new_tokens - buffer_tokens``, then a straight line to ``-penalty`` at
    ``max_new_tokens``, and no lower beyond.

    Args:
        num_tokens: Sampled tokens of the completion.
        max_new_tokens: Their limit.
        buffer_tokens: Length of the slope.
        penalty: Taken away at the limit.

    Reference:
        Soft overlong punishment, DAPO https://arxiv.org/abs/2503.14476 eq. 13, where the limit is
        ``L_max`` and ``penalty`` is 1.
    """
    excess = num_tokens - (max_new_tokens - buffer_tokens)
    return -penalty * min(max(excess / buffer_tokens, 0.0), 1.0)
