"""Group-relative advantages, of whole rollouts or of their turns.

Shapes: P = prompts, G = rollouts of one prompt.
"""

import math
from collections.abc import Sequence

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

    ``std`` is the sample deviation (divisor G - 1). A constant group gets exact zeros, any other
    at least one advantage that is not 0.

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


def turn_advantages(
    turn_rewards: Sequence[Sequence[float]], *, scale_by_std: bool
) -> list[list[float]]:
    """Return one advantage per turn of each rollout of a group.

    ``G_t = r_t + r_(t+1) + ...`` is what a rollout still earns from turn ``t`` on;
    ``group_advantages`` compares it with that of all rollouts that have a turn ``t``. A turn that
    only one rollout reached has nothing to be compared with and gets 0.

    Three rollouts, returns at turn 0 of 1, 0 and 2, at turn 1 of 1 and 2::

        turn_advantages([[0, 1], [0], [0, 2]], scale_by_std=False)  # [[0, -0.5], [-1], [1, 0.5]]

    Args:
        turn_rewards: One sequence per graded rollout of one prompt; lengths may differ.
        scale_by_std: As in ``group_advantages``.

    Reference:
        Process supervision in GRPO, https://arxiv.org/abs/2402.03300 section 4.1.3.

    Differs from the paper:
        Returns are summed first and normalised per turn index; the paper normalises the rewards of
        all steps together and sums after, which makes a longer rollout's first step worth more.
    """
    # fsum is exact before its one rounding, so equal rewards in another order stay equal.
    returns = [[math.fsum(row[turn:]) for turn in range(len(row))] for row in turn_rewards]
    advantages = [[0.0] * len(row) for row in turn_rewards]
    for turn in range(max(map(len, turn_rewards), default=0)):
        reached = [index for index, row in enumerate(returns) if turn < len(row)]
        compared = torch.tensor([returns[index][turn] for index in reached], dtype=torch.float64)
        found = group_advantages(compared, scale_by_std=scale_by_std).tolist()
        for index, advantage in zip(reached, found, strict=True):
            advantages[index][turn] = advantage
    return advantages
