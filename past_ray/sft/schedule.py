"""Which examples an optimizer step sees and how fast it learns: functions of the step alone."""

import math
import random
from collections.abc import Sequence

from past_ray.config.sft import Schedule


def learning_rate(
    step: int, *, schedule: Schedule, num_steps: int, peak: float, warmup_frac: float
) -> float:
    """Return the learning rate of one step: linear warm-up, then the schedule.

    After the ``num_warmup`` steps of ``cosine_learning_rate``, ``constant`` stays at ``peak`` and
    ``linear`` is ``peak * (num_steps - step) / (num_steps - num_warmup)``: from the peak down to
    zero one step after the last.

    Args:
        step: Optimizer step, from 0.
        schedule: What follows the warm-up.
        num_steps: Steps of the whole run.
        peak: Highest learning rate.
        warmup_frac: Share of the steps with linear warm-up, in [0, 1).
    """
    num_warmup = math.ceil(warmup_frac * num_steps)
    if schedule == "cosine" or step < num_warmup:
        return cosine_learning_rate(step, num_steps=num_steps, peak=peak, warmup_frac=warmup_frac)
    if schedule == "constant":
        return peak
    return peak * (num_steps - step) / (num_steps - num_warmup)


def cosine_learning_rate(step: int, *, num_steps: int, peak: float, warmup_frac: float) -> float:
    """Return the learning rate of one step: linear warm-up, then cosine decay towards zero.

    ``peak * (step + 1) / num_warmup`` for the first ``num_warmup = ceil(warmup_frac * num_steps)``
    steps, so the first step already learns and the last warm-up step is at the peak. Then
    ``peak * (1 + cos(pi * progress)) / 2`` with ``progress`` from 0 at the first step after the
    warm-up to 1 one step after the last: no step has a rate of zero.

    Args:
        step: Optimizer step, from 0.
        num_steps: Steps of the whole run.
        peak: Highest learning rate.
        warmup_frac: Share of the steps with linear warm-up, in [0, 1).
    """
    num_warmup = math.ceil(warmup_frac * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def example_order(
    num_examples: int, *, num_steps: int, batch_size: int, seed: int
) -> list[list[int]]:
    """Choose the examples of every step from seeded shuffles, one shuffle per epoch.

    Steps run on across epochs: no example is left out and none is drawn more than once per epoch.
    The order does not depend on the number of workers.

    Args:
        num_examples: Size of the data set, at least 1.
        num_steps: Steps to plan.
        batch_size: Examples per step.
        seed: Seed of all shuffles.

    Returns:
        ``num_steps`` lists of ``batch_size`` indices.
    """
    generator = random.Random(seed)
    order: list[int] = []
    while len(order) < num_steps * batch_size:
        epoch = list(range(num_examples))
        generator.shuffle(epoch)
        order += epoch
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(num_steps)]


def bucketed_order(
    lengths: Sequence[int], *, num_epochs: int, batch_size: int, seed: int
) -> list[list[int]]:
    """Choose the examples of every step, those of like length together, every epoch anew.

    Each epoch holds every example once, in ``ceil(num_examples / batch_size)`` steps of random
    order; the longest examples share the step that is not full. With ``batch_size=1`` an epoch is a
    plain shuffle.

    Args:
        lengths: Of the examples, in tokens.
        num_epochs: Passes over the examples.
        batch_size: Examples per step.
        seed: Seed of all shuffles.

    Returns:
        Per step, indices into ``lengths``.
    """
    generator = random.Random(seed)
    order: list[list[int]] = []
    for _ in range(num_epochs):
        # Sorting is stable: the shuffle decides among examples of one length.
        by_length = sorted(
            generator.sample(range(len(lengths)), len(lengths)), key=lambda index: lengths[index]
        )
        batches = [
            by_length[start : start + batch_size] for start in range(0, len(lengths), batch_size)
        ]
        generator.shuffle(batches)
        order += batches
    return order
