import json
import os

import pytest

from past_ray.errors import DataError
from past_ray.tasks import squad

RECORD = {
    "title": "Jehovah%27s Witnesses",
    "context": "A passage.",
    "questions": [
        {"question": "Who?", "answer": "Ada"},
        {"question": "When?", "answer": "1900"},
    ],
    "completions": ["1. First.", "1. Second.", "1. Third."],
    "prompt": "ignored",
}


def qa(question, *answers, **fields):
    return {"question": question, "answers": [{"text": text} for text in answers], **fields}


def official(*articles):
    """Articles are ``(title, [(context, qas), ...])``."""
    return {
        "version": "v2.0",
        "data": [
            {"title": title, "paragraphs": [{"context": text, "qas": qas} for text, qas in texts]}
            for title, texts in articles
        ],
    }


@pytest.fixture
def data_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PAST_RAY_DATA", str(tmp_path))

    def write(records, name="train.json"):
        text = records if isinstance(records, str) else json.dumps(records)
        (tmp_path / name).write_text(text)
        return name

    return write


def test_passages_carry_file_and_index_as_id_and_a_readable_title(data_file):
    passages = squad.load_passages(data_file([RECORD | {"title": "Botany"}, RECORD]))
    assert [passage.passage_id for passage in passages] == ["train-0000", "train-0001"]
    assert [passage.title for passage in passages] == ["Botany", "Jehovah's Witnesses"]
    assert passages[1].questions == (("Who?", "Ada"), ("When?", "1900"))
    assert passages[1].completions == ("1. First.", "1. Second.", "1. Third.")


def test_official_paragraphs_become_passages_numbered_through_the_file(data_file):
    content = official(
        ("Notre_Dame", [("P0.", [qa("Who?", "Ada")]), ("P1.", [qa("When?", "1900")])]),
        ("Beyonc%C3%A9", [("P2.", [qa("Where?", "Oslo")])]),
    )
    passages = squad.load_passages(data_file(content, "dev-v1.1.json"))
    assert [(p.passage_id, p.title, p.context) for p in passages] == [
        ("dev-v1.1-0000", "Notre Dame", "P0."),
        ("dev-v1.1-0001", "Notre Dame", "P1."),
        ("dev-v1.1-0002", "Beyonc\N{LATIN SMALL LETTER E WITH ACUTE}", "P2."),
    ]
    assert [p.questions for p in passages] == [
        (("Who?", "Ada"),),
        (("When?", "1900"),),
        (("Where?", "Oslo"),),
    ]


def test_first_of_several_gold_answers_is_taken(data_file):
    content = official(("T", [("P.", [qa("Who?", "Ada", "Ada L.", "Ada L.")])]))
    assert squad.load_passages(data_file(content))[0].questions == (("Who?", "Ada"),)


def test_impossible_questions_are_left_out_and_counted_on_their_passage(data_file):
    impossible = qa("Why?", is_impossible=True, plausible_answers=[{"text": "no"}])
    answered = qa("Who?", "Ada", is_impossible=False)
    content = official(("T", [("P0.", [impossible, answered, impossible]), ("P1.", [answered])]))
    passages = squad.load_passages(data_file(content))
    assert [p.questions for p in passages] == [(("Who?", "Ada"),), (("Who?", "Ada"),)]
    assert [p.num_unanswerable for p in passages] == [2, 0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", r"record 1 must be an object, found a str"),
        ({"title": "t", "context": "c"}, r"record 1 must have a list 'questions', found nothing"),
        (RECORD | {"context": " "}, r"record 1 must have a text 'context', found an empty text"),
        (RECORD | {"title": 3}, r"record 1 must have a text 'title', found a int"),
        (
            RECORD | {"questions": [{"question": "Who?"}]},
            r"record 1, question 0 must have a text 'answer', found nothing",
        ),
        (
            RECORD | {"questions": [RECORD["questions"][0], {"question": "Who?", "answer": " "}]},
            r"record 1, question 1 must have a text 'answer', found an empty text",
        ),
        (RECORD | {"completions": ["x", None]}, r"record 1, completion 1 must have a text"),
    ],
)
def test_malformed_record_is_reported_with_its_index(data_file, record, message):
    with pytest.raises(DataError, match=message):
        squad.load_passages(data_file([RECORD, record]))


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (qa("Who?"), r"record 1, paragraph 0, question 1 must have an answer or 'is_impossible'"),
        (qa("Who?", ""), r"paragraph 0, question 1, answer 0 must have a text 'text', found an em"),
        ({"question": "Who?"}, r"question 1 must have a list 'answers', found nothing"),
        (qa(" ", "Ada"), r"question 1 must have a text 'question', found an empty text"),
    ],
)
def test_malformed_official_question_is_reported_with_its_place(data_file, question, message):
    good = qa("When?", "1900")
    content = official(("A", [("P.", [good])]), ("B", [("P.", [good, question])]))
    with pytest.raises(DataError, match=message):
        squad.load_passages(data_file(content))


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2}, {"a": 3', '{"data": [{}, {}, {"a" 3}]}'])
def test_broken_json_is_reported_with_its_record(data_file, text):
    with pytest.raises(DataError, match=r"train.json must be JSON, got in record 2: "):
        squad.load_passages(data_file(text))


def test_json_that_is_neither_layout_is_refused(data_file):
    with pytest.raises(DataError, match="a list of passages or an object with 'data', found a dic"):
        squad.load_passages(data_file({"rows": []}))


def test_missing_file_is_refused(data_file):
    with pytest.raises(DataError, match=r"no.json must be a data file, found none"):
        squad.load_passages("no.json")


@pytest.mark.skipif("PAST_RAY_DATA" not in os.environ, reason="PAST_RAY_DATA is not set")
@pytest.mark.parametrize(
    ("name", "num_passages", "num_questions", "num_completions"),
    [
        ("source_round1", 100, 467, 10),
        ("source_round2", 50, 243, 5),
        ("target_200", 200, 974, 5),
    ],
)
def test_real_files_load_whole(name, num_passages, num_questions, num_completions):
    passages = squad.load_passages(f"squad/{name}.json")
    assert len(passages) == num_passages
    assert sum(len(passage.questions) for passage in passages) == num_questions
    assert {len(passage.completions) for passage in passages} == {num_completions}
