"""Means over seeds."""

import pytest

from past_ray.errors import ConfigError
from past_ray.pipelines.seeds import mean_report, parse_seeds


def report(accuracy: float, cosine: float) -> dict:
    arm = {
        "accuracy": accuracy,
        "ci95": [0.0, 1.0],
        "answer_tokens": 2.0,
        "seconds": 10 * accuracy,
        "seconds_per_new_target": 1.0,
        "truncated_frac": 0.0,
    }
    return {
        "versions": {},
        "git_commit": None,
        "arms": {"past": arm},
        "cosines": {"rl__rl": cosine},
        "weight_sync": {},
        "scale_sweep": [],
    }


def test_figures_are_means_and_the_interval_is_the_range():
    joint = mean_report("x", {0: report(0.5, 0.1), 3: report(0.7, -0.3)})
    assert joint["arms"]["past"]["accuracy"] == pytest.approx(0.6)
    assert joint["arms"]["past"]["seconds"] == pytest.approx(6.0)
    assert joint["arms"]["past"]["ci95"] == [0.5, 0.7]
    assert joint["cosines"]["rl__rl"] == pytest.approx(-0.1)
    assert joint["per_seed"]["3"]["arms"]["past"]["accuracy"] == 0.7


def test_seeds_are_read_from_a_list():
    assert parse_seeds("0, 1,2") == [0, 1, 2]


@pytest.mark.parametrize("text", ["", "a,b", "1,1", "-1", "1..3"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match="different whole numbers"):
        parse_seeds(text)
