import math

import numpy as np
import pytest

from past_ray.errors import DataError
from past_ray.tasks import statistics
from past_ray.tasks.statistics import bootstrap_ci


def test_constant_values_have_an_interval_of_width_zero():
    assert bootstrap_ci([0.25] * 40, num_samples=200, seed=0) == (0.25, 0.25)


def test_interval_of_a_share_agrees_with_the_normal_approximation():
    values = [1.0] * 300 + [0.0] * 100
    low, high = bootstrap_ci(values, num_samples=4000, seed=1)
    half_width = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half_width, abs=0.006)
    assert high == pytest.approx(0.75 + half_width, abs=0.006)


def test_lower_level_gives_a_narrower_interval_inside():
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    low_95, high_95 = bootstrap_ci(values, num_samples=2000, seed=0)
    low_50, high_50 = bootstrap_ci(values, num_samples=2000, seed=0, level=0.5)
    assert low_95 < low_50 < high_50 < high_95


def test_same_seed_gives_the_same_interval_whatever_ran_before():
    values = list(np.linspace(0, 1, 30))
    first = bootstrap_ci(values, num_samples=500, seed=3)
    bootstrap_ci(values, num_samples=77, seed=9)
    assert bootstrap_ci(values, num_samples=500, seed=3) == first
    assert bootstrap_ci(values, num_samples=500, seed=4) != first


def test_splitting_the_draws_into_blocks_changes_nothing(monkeypatch):
    values = list(np.linspace(0, 1, 30))
    whole = bootstrap_ci(values, num_samples=100, seed=3)
    monkeypatch.setattr(statistics, "MAX_DRAWS_AT_ONCE", 200)
    assert bootstrap_ci(values, num_samples=100, seed=3) == whole


def test_no_values_is_an_error():
    with pytest.raises(DataError, match="at least one value"):
        bootstrap_ci([], num_samples=100, seed=0)
