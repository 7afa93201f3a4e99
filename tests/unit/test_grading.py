import pytest
from hypothesis import given
from hypothesis import strategies as st

from past_ray.config.judge import RuleName
from past_ray.errors import GradingError
from past_ray.tasks.grading import (
    GRADERS,
    exact_match,
    first_words,
    gold_token_recall,
    normalized_tokens,
    token_f1,
)


def test_case_punctuation_and_articles_do_not_count():
    assert normalized_tokens("The Age, of  an Enlightenment!") == ["age", "of", "enlightenment"]
    assert exact_match("  the Oslo.", "oslo") == 1.0


def test_typographic_punctuation_equals_ascii_punctuation():
    assert exact_match("1750\u20131840", "1750-1840") == 1.0
    assert exact_match("\u201csilver\u201d", "silver") == 1.0


def test_exact_match_needs_the_same_words_in_the_same_order():
    assert exact_match("baker cat", "cat baker") == 0.0
    assert exact_match("in oslo", "oslo") == 0.0


def test_recall_is_the_share_of_gold_words_found():
    assert gold_token_recall("he fled from Otrar in 1219", "fled from Otrar") == 1.0
    assert gold_token_recall("Subutai went", "Subutai and Jebe") == pytest.approx(1 / 3)
    assert gold_token_recall("silver", "gold") == 0.0


def test_repeated_gold_words_must_be_found_as_often():
    assert gold_token_recall("new york", "new york new york") == 0.5
    assert gold_token_recall("cat cat cat", "cat owl") == 0.5


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    # 2 of 3 words of the answer are gold, and 2 of the 4 gold words are found.
    precision, recall = 2 / 3, 2 / 4
    expected = 2 * precision * recall / (precision + recall)
    assert token_f1("subutai jebe went", "subutai jebe horse bow") == pytest.approx(expected)
    assert token_f1("oslo", "oslo") == 1.0
    assert token_f1("rome", "oslo") == 0.0


def test_f1_punishes_words_around_the_gold_ones_and_recall_does_not():
    assert token_f1("it is surely oslo", "oslo") == pytest.approx(2 / 5)
    assert gold_token_recall("it is surely oslo", "oslo") == 1.0


def test_only_the_first_words_are_graded():
    answer = "It is  Rome,\nor Oslo"
    assert first_words(answer, max_words=3, gold="Oslo") == "It is Rome,"
    assert gold_token_recall(first_words(answer, max_words=4, gold="Oslo"), "Oslo") == 0.0
    assert gold_token_recall(first_words(answer, max_words=5, gold="Oslo"), "Oslo") == 1.0


def test_a_gold_answer_longer_than_the_cap_stays_within_reach():
    gold = "he fled to an island"
    assert first_words(f"{gold} far away", max_words=2, gold=gold) == gold


@given(st.text("bc ,-"), st.text("bc ,-"), st.integers(1, 6))
def test_the_cap_counts_what_is_graded_and_never_raises_the_recall(answer, gold, max_words):
    if not normalized_tokens(gold):
        return
    capped = first_words(answer, max_words=max_words, gold=gold)
    assert len(normalized_tokens(capped)) <= max(max_words, len(gold.split()))
    assert gold_token_recall(capped, gold) <= gold_token_recall(answer, gold)


def test_word_inside_a_longer_word_is_not_found():
    assert gold_token_recall("category", "cat") == 0.0


def test_empty_answer_scores_zero_with_every_grader():
    for grader in GRADERS.values():
        assert grader("", "oslo") == 0.0
        assert grader(" \n", "oslo") == 0.0


def test_answer_of_articles_and_signs_alone_can_still_be_right():
    for grader in GRADERS.values():
        assert grader("The", "the") == 1.0
        assert grader("%", "%") == 1.0
        assert grader("$", "%") == 0.0


def test_empty_gold_answer_is_an_error_and_not_a_zero():
    for grader in GRADERS.values():
        with pytest.raises(GradingError, match="gold answer must not be empty"):
            grader("oslo", " ")


def test_every_configurable_rule_has_a_grader():
    assert set(GRADERS) == set(RuleName.__args__)
