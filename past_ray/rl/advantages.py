"""Group-relative advantages.

Shapes: P = prompts, G = rollouts of one prompt.
"""

import torch
from torch import Tensor

STD_EPSILON = 1e-6
"""Added to the deviation, as verl does; keeps a group with almost equal rewards finite."""


def constant_groups(rewards: Tensor) -> Tensor:
    """Return ``[P]`` bool, True where all rewards of a group are the same number.

    The spread (largest minus smallest) is compared with exactly 0. A standard deviation would not
    do: the mean of equal floats need not be that float, so rounding noise would pass for a spread.

    Args:
        rewards: ``[P, G]`` or ``[G]``.
    """
    return rewards.amax(dim=-1) == rewards.amin(dim=-1)


def group_advantages(rewards: Tensor, *, scale_by_std: bool) -> Tensor:
    """Return ``(r - mean(r)) / (std(r) + 1e-6)`` within each group, shaped like ``rewards``.

    ``std`` is the sample deviation (divisor G - 1). A constant group gets exact zeros.

    Args:
        rewards: ``[P, G]`` or ``[G]`` rewards of graded rollouts; leave failed ones out before.
        scale_by_std: False gives ``r - mean(r)``, which is Dr. GRPO.

    Reference:
        GRPO https://arxiv.org/abs/2402.03300 section 4.1.2; Dr. GRPO
        https://arxiv.org/abs/2503.20783 section 3.
    """
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    if scale_by_std and rewards.shape[-1] > 1:
        centred = centred / (rewards.std(dim=-1, correction=1, keepdim=True) + STD_EPSILON)
    return torch.where(constant_groups(rewards).unsqueeze(-1), 0.0, centred)
