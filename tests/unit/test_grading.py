import json
import os
from pathlib import Path

import pytest

from past_ray.config.task import RewardName
from past_ray.errors import GradingError
from past_ray.tasks.grading import GRADERS, exact_match, gold_token_recall, normalized_tokens


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


def test_every_configurable_reward_has_a_grader():
    assert set(GRADERS) == set(RewardName.__args__)


@pytest.mark.skipif("PAST_RAY_DATA" not in os.environ, reason="PAST_RAY_DATA is not set")
def test_recall_from_two_thirds_on_agrees_with_a_language_models_verdicts():
    verdicts = set()
    for name in ("base", "naive"):
        path = Path(os.environ["PAST_RAY_DATA"], "squad", "graded", f"{name}.json")
        for article in json.loads(path.read_text())["articles"]:
            for completion in article["completions"]:
                for entry in completion["questions"]:
                    for kind in ("baseline", "adapter"):
                        answer, verdict = entry[f"{kind}_answer"], entry[f"{kind}_correct"]
                        verdicts.add((entry["question"], entry["answer"], answer, verdict))
    agreed = [
        (gold_token_recall(answer, gold) >= 0.67) == verdict
        for _, gold, answer, verdict in verdicts
    ]
    assert len(agreed) > 2000
    assert 0.83 < sum(agreed) / len(agreed) < 0.90
