import pytest

from past_ray.errors import DataError
from past_ray.tasks.passages import (
    Passage,
    check_disjoint_titles,
    check_questions_differ,
    given_rows,
    passage_rows,
    question_rows,
)


def passage(index=0, *, title="Botany", questions=(("Who?", "Ada"),), completions=()):
    return Passage(
        passage_id=f"a-{index:04d}",
        title=title,
        context=f"Text {index}.",
        questions=questions,
        completions=completions,
    )


def test_passages_and_given_completions_are_separate_rows():
    members = [passage(0, completions=("x", "y", "z")), passage(1, completions=("u", "v"))]
    assert passage_rows(members) == [
        {"doc_id": "a-0000", "title": "Botany", "text": "Text 0."},
        {"doc_id": "a-0001", "title": "Botany", "text": "Text 1."},
    ]
    assert given_rows(members, num_completions=2) == [
        {"doc_id": "a-0000#1", "title": "Botany", "text": "x"},
        {"doc_id": "a-0000#2", "title": "Botany", "text": "y"},
        {"doc_id": "a-0001#1", "title": "Botany", "text": "u"},
        {"doc_id": "a-0001#2", "title": "Botany", "text": "v"},
    ]


def test_questions_are_numbered_within_their_passage_and_name_it():
    members = [passage(0, questions=(("Who?", "Ada"), ("When?", "1900"))), passage(1)]
    assert [tuple(row.values()) for row in question_rows(members)] == [
        ("a-0000-q0", "a-0000", "Who?", "Ada"),
        ("a-0000-q1", "a-0000", "When?", "1900"),
        ("a-0001-q0", "a-0001", "Who?", "Ada"),
    ]


def test_more_completions_than_there_are_is_an_error():
    with pytest.raises(DataError, match=r"a-0001 must have 1 completions, found 0. Lower"):
        given_rows([passage(0, completions=("x",)), passage(1)], num_completions=1)


def test_question_asked_twice_of_one_passage_is_refused_with_both_places():
    questions = (("Who is it?", "Ada"), ("When?", "1900"), ("who  is it? ", "Ada L."))
    with pytest.raises(DataError, match=r"a-0003 must ask .* questions 0 and 2 .*keep_repeated"):
        check_questions_differ([passage(2), passage(3, questions=questions)])


def test_two_passages_may_ask_the_same():
    check_questions_differ([passage(0), passage(1)])


def test_title_shared_by_two_domains_is_refused_with_their_names():
    source, target = [passage(0), passage(1, title="Force")], [passage(2, title="Oslo")]
    check_disjoint_titles(source, target, left_name="source_1", right_name="target")
    with pytest.raises(DataError, match=r"source_1 and target must have no title .*\['Force'\]"):
        check_disjoint_titles(
            source, [*target, source[1]], left_name="source_1", right_name="target"
        )
