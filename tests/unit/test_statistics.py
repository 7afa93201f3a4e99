import math

import numpy as np
import pytest

from past_ray.errors import DataError
from past_ray.tasks import statistics
from past_ray.tasks.statistics import (
    ScaleResult,
    bootstrap_ci,
    choose_scale,
    paired_bootstrap,
)


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


def answers(values, prefix="q"):
    return {f"{prefix}{index}": float(value) for index, value in enumerate(values)}


def test_every_question_a_passage_of_its_own_is_the_plain_bootstrap():
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 0.25]
    own = [f"p{index}" for index in range(6)]
    plain = bootstrap_ci(values, num_samples=500, seed=0)
    assert bootstrap_ci(values, num_samples=500, seed=0, passage_ids=own) == plain


def test_questions_that_stand_and_fall_together_widen_the_interval_by_the_root_of_their_number():
    # 100 passages of 4 equal questions hold what 100 questions hold: a factor of sqrt(4) = 2.
    values = [float(passage % 2) for passage in range(100) for _ in range(4)]
    passages = [str(passage) for passage in range(100) for _ in range(4)]
    low, high = bootstrap_ci(values, num_samples=4000, seed=0)
    wide_low, wide_high = bootstrap_ci(values, num_samples=4000, seed=0, passage_ids=passages)
    assert (wide_high - wide_low) / (high - low) == pytest.approx(2.0, abs=0.15)


def test_a_resampled_mean_weighs_passages_by_their_questions():
    # Two passages: 9 right, 1 wrong. Resamples are 9 of 9, 9 of 10 or 0 of 1 questions.
    values, passages = [1.0] * 9 + [0.0], ["a"] * 9 + ["b"]
    low, high = bootstrap_ci(values, num_samples=1000, seed=0, level=0.4, passage_ids=passages)
    assert (low, high) == (0.9, 0.9)


def test_one_passage_cannot_be_resampled():
    with pytest.raises(DataError, match="at least two passages"):
        bootstrap_ci([1.0, 0.0], num_samples=10, seed=0, passage_ids=["a", "a"])


def test_passages_must_be_as_many_as_questions():
    with pytest.raises(DataError, match="each of 3 questions"):
        bootstrap_ci([1.0, 0.0, 1.0], num_samples=10, seed=0, passage_ids=["a", "b"])


def test_difference_is_the_arm_minus_the_baseline():
    arm, baseline = answers([1, 1, 1, 0]), answers([1, 0, 0, 0])
    better = paired_bootstrap(arm, baseline=baseline, num_samples=500, seed=0)
    worse = paired_bootstrap(baseline, baseline=arm, num_samples=500, seed=0)
    assert (better.difference, worse.difference) == (0.5, -0.5)
    assert better.ci95 == (-worse.ci95[1], -worse.ci95[0])
    assert better.p_value == worse.p_value
    assert (better.num_questions, better.num_resampled) == (4, 4)


def test_equal_arms_differ_by_nothing_with_p_one():
    arm = answers([1, 0, 1, 1])
    result = paired_bootstrap(arm, baseline=dict(arm), num_samples=200, seed=0)
    assert (result.difference, result.ci95, result.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_always_better_has_the_smallest_p_that_the_resamples_allow():
    ones, zeros = answers([1] * 20), answers([0] * 20)
    assert paired_bootstrap(ones, baseline=zeros, num_samples=999, seed=0).p_value == 2 / 1000


def test_interval_and_p_value_agree_with_the_normal_approximation():
    # 60 questions gained, 40 lost, 300 unchanged: d = 0.05, variance (0.25 - 0.05^2) / 400.
    arm = answers([1] * 60 + [0] * 40 + [1] * 300)
    baseline = answers([0] * 60 + [1] * 40 + [1] * 300)
    result = paired_bootstrap(arm, baseline=baseline, num_samples=20_000, seed=0)
    error = math.sqrt((0.25 - 0.05**2) / 400)
    assert result.difference == pytest.approx(0.05)
    assert result.ci95 == pytest.approx((0.05 - 1.96 * error, 0.05 + 1.96 * error), abs=0.004)
    assert result.p_value == pytest.approx(math.erfc(0.05 / error / math.sqrt(2)), abs=0.01)


def test_pairing_removes_what_makes_a_question_hard_for_both_arms():
    # Half of the questions are hard for both; the arm gains 5 of 100 and loses none.
    arm, baseline = answers([1] * 55 + [0] * 45), answers([1] * 50 + [0] * 50)
    paired = paired_bootstrap(arm, baseline=baseline, num_samples=4000, seed=0)
    assert paired.ci95[0] > 0
    alone = bootstrap_ci(list(arm.values()), num_samples=4000, seed=0)
    assert alone[0] < 0.5


def test_a_gain_in_one_passage_is_no_evidence_about_passages():
    arm, baseline = answers([1] * 10 + [0] * 30), answers([0] * 40)
    passage_of = {f"q{index}": f"p{index // 10}" for index in range(40)}
    by_question = paired_bootstrap(arm, baseline=baseline, num_samples=2000, seed=0)
    by_passage = paired_bootstrap(
        arm, baseline=baseline, num_samples=2000, seed=0, passage_of=passage_of
    )
    assert by_question.p_value < 0.01
    assert by_passage.p_value > 0.2
    assert by_passage.difference == by_question.difference == 0.25
    assert by_passage.num_resampled == 4


def test_order_of_the_questions_changes_nothing():
    arm, baseline = answers([1, 0, 1, 0, 1]), answers([0, 0, 1, 1, 0])
    turned = dict(reversed(arm.items()))
    passage_of = {f"q{index}": f"p{index // 2}" for index in range(5)}
    results = [
        paired_bootstrap(a, baseline=baseline, num_samples=300, seed=0, passage_of=passage_of)
        for a in (arm, turned)
    ]
    assert results[0] == results[1]


def test_arms_with_other_questions_are_refused_by_name():
    with pytest.raises(DataError, match="z0"):
        paired_bootstrap(answers([1]), baseline=answers([1], "z"), num_samples=10, seed=0)


def test_a_question_without_a_passage_is_refused_by_name():
    arm = answers([1, 0])
    with pytest.raises(DataError, match="q1"):
        paired_bootstrap(arm, baseline=arm, num_samples=10, seed=0, passage_of={"q0": "p"})


def chosen(*results, **options):
    rows = [ScaleResult(scale=scale, correct=answers(values)) for scale, values in results]
    return choose_scale(rows, num_samples=1000, seed=0, **options)


def test_clearly_best_scale_is_chosen():
    choice = chosen((0.0, [0] * 50), (1.0, [1] * 40 + [0] * 10), (0.5, [1] * 10 + [0] * 40))
    assert (choice.scale, choice.best_scale, choice.accuracy) == (1.0, 1.0, 0.8)
    assert "no smaller scale" in choice.reason


def test_equal_accuracies_go_to_the_smaller_scale():
    assert chosen((2.0, [1, 0] * 20), (1.0, [1, 0] * 20)).scale == 1.0


def test_a_lead_within_the_noise_goes_to_the_smaller_scale_and_says_so():
    # Scale 1 wins 3 questions and loses 2 of 50.
    half = [1] * 22 + [0, 0, 0] + [1, 1] + [0] * 23
    one = [1] * 22 + [1, 1, 1] + [0, 0] + [0] * 23
    choice = chosen((1.0, one), (0.5, half), (0.0, [0] * 50))
    assert (choice.scale, choice.best_scale) == (0.5, 1.0)
    assert choice.accuracy == 24 / 50
    assert "scale 0.5 (48.0%)" in choice.reason


def test_a_skill_without_use_gives_scale_zero():
    assert chosen((0.0, [1, 0] * 20), (1.0, [0, 1] * 20)).scale == 0.0


def test_a_lead_from_one_passage_alone_is_noise_when_passages_are_known():
    results = ((0.0, [0] * 40), (1.0, [1] * 10 + [0] * 30))
    passage_of = {f"q{index}": f"p{index // 10}" for index in range(40)}
    assert chosen(*results).scale == 1.0
    assert chosen(*results, passage_of=passage_of).scale == 0.0


@pytest.mark.parametrize("results", [(), ((1.0, [1]), (1.0, [0]))], ids=["none", "twice"])
def test_scales_must_be_there_and_differ(results):
    with pytest.raises(DataError, match="all different"):
        chosen(*results)
