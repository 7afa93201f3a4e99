"""Agreement with a reference: counts by hand, the layout of the files, repeats."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from past_ray.config.judge import RuleJudgeConfig
from past_ray.engine.judge import RuleJudge
from past_ray.errors import DataError
from past_ray.tasks.calibration import (
    Agreement,
    GradedAnswer,
    distinct_answers,
    measure_agreement,
    read_graded_answers,
)
from past_ray.tasks.judging import JudgeFailure, JudgeItem, Verdict


def graded(answer, is_correct):
    return GradedAnswer(JudgeItem(question="q", gold="g", answer=answer), is_correct)


def verdict(score, *, correct_at=0.5):
    return Verdict(score=score, is_correct=score >= correct_at)


def agreement(true_positives, false_positives, false_negatives, true_negatives):
    return Agreement(
        num_true_positives=true_positives,
        num_false_positives=false_positives,
        num_false_negatives=false_negatives,
        num_true_negatives=true_negatives,
    )


def test_every_pair_of_verdicts_is_counted_in_its_own_cell():
    reference = [graded("a", True), graded("b", True), graded("c", False), graded("d", True)]
    outcomes = [verdict(1.0), verdict(0.0), verdict(1.0), verdict(1.0)]
    assert measure_agreement(outcomes, reference) == agreement(2, 1, 1, 0)


def test_failures_are_left_out_and_are_no_disagreement():
    reference = [graded("a", True), graded("b", True)]
    found = measure_agreement([verdict(1.0), JudgeFailure(error="down")], reference)
    assert found == agreement(1, 0, 0, 0)
    assert found.agreement == 1.0


def test_another_threshold_reads_the_scores_anew():
    reference = [graded("a", True), graded("b", False)]
    outcomes = [verdict(0.6), verdict(0.6)]
    assert measure_agreement(outcomes, reference) == agreement(1, 1, 0, 0)
    assert measure_agreement(outcomes, reference, correct_at=0.6) == agreement(1, 1, 0, 0)
    assert measure_agreement(outcomes, reference, correct_at=0.61) == agreement(0, 0, 1, 1)


def test_measures_are_those_of_the_counts():
    # 100 answers: the judge says correct to 30, the reference to 40, both to 20.
    found = agreement(20, 10, 20, 50)
    assert found.num_answers == 100
    assert found.agreement == pytest.approx(0.70)
    assert found.precision == pytest.approx(20 / 30)
    assert found.recall == pytest.approx(20 / 40)
    chance = 0.3 * 0.4 + 0.7 * 0.6
    assert found.kappa == pytest.approx((0.70 - chance) / (1 - chance))


def test_measures_without_a_denominator_are_none():
    nothing = agreement(0, 0, 0, 0)
    assert (nothing.agreement, nothing.precision, nothing.recall, nothing.kappa) == (None,) * 4
    all_right = agreement(3, 0, 0, 0)
    assert (all_right.agreement, all_right.kappa) == (1.0, None)


@given(st.tuples(*[st.integers(1, 1000)] * 4))
def test_kappa_is_one_for_equal_judges_and_zero_for_independent_ones(counts):
    a, b, c, d = counts
    assert agreement(a, 0, 0, d).kappa == pytest.approx(1.0)
    # A product table: what the judge says tells nothing about the reference.
    assert agreement(a * b, a * c, d * b, d * c).kappa == pytest.approx(0.0)


def test_repeats_count_once_and_contradictions_not_at_all():
    entries = [
        graded("a", True),
        graded("b", False),
        graded("a", True),
        graded("c", True),
        graded("c", False),
    ]
    found = distinct_answers(entries)
    assert found.graded == [graded("a", True), graded("b", False)]
    assert (found.num_repeats, found.num_contradictions) == (1, 1)


def write(path, questions):
    path.write_text(json.dumps({"articles": [{"completions": [{"questions": questions}]}]}))
    return path


QUESTION = {
    "question": "who ?",
    "answer": "ali",
    "baseline_answer": "bob",
    "baseline_correct": False,
    "adapter_answer": "ali did",
    "adapter_correct": True,
}


def test_a_file_gives_both_answers_of_each_question_with_their_own_verdict(tmp_path):
    assert read_graded_answers(write(tmp_path / "graded.json", [QUESTION])) == [
        GradedAnswer(JudgeItem(question="who ?", gold="ali", answer="bob"), False),
        GradedAnswer(JudgeItem(question="who ?", gold="ali", answer="ali did"), True),
    ]


@pytest.mark.parametrize(
    "change", [{"adapter_correct": None}, {"baseline_correct": "yes"}, {"answer": 3}]
)
def test_a_verdict_that_is_none_is_refused(tmp_path, change):
    path = write(tmp_path / "graded.json", [QUESTION | change])
    with pytest.raises(DataError, match=r"graded\.json must be a JSON file of graded answers"):
        read_graded_answers(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"articles": [3]}', '{"articles": 3}'])
def test_another_layout_is_refused(tmp_path, text):
    path = tmp_path / "graded.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"graded\.json must be"):
        read_graded_answers(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json.*FileNotFoundError"):
        read_graded_answers(tmp_path / "nowhere.json")


@pytest.mark.skipif("PAST_RAY_DATA" not in os.environ, reason="PAST_RAY_DATA is not set")
def test_the_default_rule_agrees_with_gpt_4_1_on_86_percent_and_its_cap_costs_nothing():
    path = Path(os.environ["PAST_RAY_DATA"], "squad", "graded", "base.json")
    reference = distinct_answers(read_graded_answers(path)).graded
    items = [entry.item for entry in reference]
    capped, all_words = (
        measure_agreement(RuleJudge(config).judge(items), reference)
        for config in (RuleJudgeConfig(), RuleJudgeConfig(max_words=None))
    )
    assert capped.num_answers > 1900
    assert capped.agreement >= 0.86
    assert capped.agreement >= all_words.agreement - 0.001
