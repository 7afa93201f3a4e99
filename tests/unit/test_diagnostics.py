import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from past_ray.errors import DataError
from past_ray.tasks.diagnostics import (
    DiagnosticFigures,
    diagnose,
    diagnostic_figures,
    repetition,
    self_consistency,
)

SOUND = DiagnosticFigures(
    empty_frac=0.01, mean_words=12.0, repetition_frac=0.02, self_consistency=0.6, perplexity=10.0
)


def signs(**changes):
    return [warning.sign for warning in diagnose(before=SOUND, after=replace(SOUND, **changes))]


def test_one_pair_of_three_agrees_after_normalisation():
    assert self_consistency([["Oslo.", "the oslo", "Bergen"]]) == pytest.approx(1 / 3)


def test_agreement_is_averaged_over_questions():
    # 1 for three equal answers, 0 for three different ones.
    assert self_consistency([["a1", "a1", "a1"], ["x", "y", "z"]]) == 0.5


def test_word_order_matters_for_agreement():
    assert self_consistency([["rome to oslo", "oslo to rome"]]) == 0.0


def test_silence_is_not_agreement():
    assert self_consistency([["", " ", ""]]) == 0.0


@given(
    st.lists(st.lists(st.sampled_from(["a1", "b", "c", ""]), min_size=4, max_size=4), min_size=1)
)
def test_agreement_is_the_mean_over_all_pairs(answers):
    pairs = [
        samples[i] == samples[j] and samples[i] != ""
        for samples in answers
        for i in range(4)
        for j in range(i)
    ]
    assert self_consistency(answers) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("answers", [[], [["oslo"]], [["a", "b"], ["c"]]])
def test_agreement_needs_two_answers_of_every_question(answers):
    with pytest.raises(DataError, match="at least two"):
        self_consistency(answers)


def test_repetition_counts_repeated_fourgrams():
    # 6 words have 3 fourgrams, all "la la la la": one is new.
    assert repetition("la la LA la la la") == pytest.approx(2 / 3)
    assert repetition("one two three four five") == 0.0
    assert repetition("la la la") == 0.0
    assert repetition("") == 0.0


def test_figures_of_answers():
    figures = diagnostic_figures([["oslo", "oslo"], ["", "in rome we live"]], perplexity=7.0)
    assert figures == DiagnosticFigures(
        empty_frac=0.25, mean_words=1.5, repetition_frac=0.0, self_consistency=0.5, perplexity=7.0
    )


def test_greedy_answers_have_no_self_consistency():
    assert diagnostic_figures([["oslo"], ["rome"]]).self_consistency is None


@pytest.mark.parametrize("answers", [[], [[]], [["a"], ["b", "c"]]])
def test_questions_must_have_equally_many_answers(answers):
    with pytest.raises(DataError, match="same number"):
        diagnostic_figures(answers)


def test_a_model_that_did_not_change_gives_no_warning():
    assert signs() == []


def test_improvement_gives_no_warning():
    assert signs(empty_frac=0.0, repetition_frac=0.0, self_consistency=0.9, perplexity=5.0) == []


@pytest.mark.parametrize(
    ("sign", "bearable", "too_much"),
    [
        ("empty_frac", 0.05, 0.07),
        ("mean_words", 47.0, 49.0),
        ("mean_words", 3.1, 2.9),
        ("repetition_frac", 0.11, 0.13),
        ("self_consistency", 0.41, 0.39),
        ("perplexity", 13.9, 14.1),
    ],
)
def test_each_sign_warns_alone_and_only_beyond_its_threshold(sign, bearable, too_much):
    assert signs(**{sign: bearable}) == []
    assert signs(**{sign: too_much}) == [sign]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_perplexity_that_is_no_number_warns(value):
    assert signs(perplexity=value) == ["perplexity"]


def test_what_was_not_measured_gives_no_warning():
    assert signs(perplexity=None, self_consistency=None) == []


def test_falling_silent_warns_of_emptiness_length_and_lost_agreement():
    silent = diagnostic_figures([["", ""]] * 4)
    found = diagnose(before=SOUND, after=silent)
    assert [warning.sign for warning in found] == ["empty_frac", "mean_words", "self_consistency"]


def test_a_loop_warns_of_repetition():
    looping = diagnostic_figures([["oslo is in norway " * 10] * 2])
    before = replace(SOUND, mean_words=looping.mean_words)
    assert [w.sign for w in diagnose(before=before, after=looping)] == ["repetition_frac"]


def test_warning_says_both_numbers_and_what_to_do():
    (warning,) = diagnose(before=SOUND, after=replace(SOUND, perplexity=30.0))
    assert "30.00 after 10.00" in warning.message
    assert "smaller scale" in warning.message
