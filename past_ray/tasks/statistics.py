"""Uncertainty of a mean over questions."""

from collections.abc import Sequence

import numpy as np

from past_ray.errors import DataError

MAX_DRAWS_AT_ONCE = 4_000_000
"""Draws held in memory together: 32 MB of indices."""


def bootstrap_ci(
    values: Sequence[float], *, num_samples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean.

    Args:
        values: One per question, e.g. 0 or 1; at least one.
        num_samples: Resamples, each of ``len(values)`` draws with replacement.
        seed: The same seed and values give the same interval, whatever ran before.
        level: Share of the resampled means inside the interval.

    Raises:
        DataError: ``values`` is empty.

    Reference:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    if not values:
        raise DataError("a confidence interval needs at least one value, found none.")
    observed = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    rows_at_once = max(1, MAX_DRAWS_AT_ONCE // len(observed))
    means = np.concatenate(
        [
            observed[rng.integers(len(observed), size=(num_rows, len(observed)))].mean(axis=1)
            for num_rows in _block_sizes(num_samples, rows_at_once)
        ]
    )
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _block_sizes(total: int, block: int) -> list[int]:
    """Split ``total`` into blocks of at most ``block``."""
    return [min(block, total - start) for start in range(0, total, block)]
