import json
import os
from pathlib import Path

import pytest

from past_ray.errors import DataError
from past_ray.tasks import squad, tables

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


@pytest.fixture
def data_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PAST_RAY_DATA", str(tmp_path))

    def write(records, name="train.json"):
        (tmp_path / name).write_text(json.dumps(records))
        return Path(name)

    return write


def test_passages_carry_file_and_index_as_id_and_a_readable_title(data_file):
    path = data_file([RECORD | {"title": "Botany"}, RECORD, RECORD])
    passages = squad.load_passages(path, num_passages=2)
    assert [passage.passage_id for passage in passages] == ["train-0000", "train-0001"]
    assert [passage.title for passage in passages] == ["Botany", "Jehovah's Witnesses"]
    assert passages[1].questions == (("Who?", "Ada"), ("When?", "1900"))


def test_completions_become_documents_and_questions_name_the_passage(data_file):
    passages = squad.load_passages(data_file([RECORD]), num_passages=1)
    documents, questions = squad.passage_tables(passages, num_completions=2)
    assert documents == [
        {"doc_id": "train-0000", "title": "Jehovah's Witnesses", "text": "A passage."},
        {"doc_id": "train-0000#1", "title": "Jehovah's Witnesses", "text": "1. First."},
        {"doc_id": "train-0000#2", "title": "Jehovah's Witnesses", "text": "1. Second."},
    ]
    assert [(row["question_id"], row["doc_id"], row["answer"]) for row in questions] == [
        ("train-0000-q0", "train-0000", "Ada"),
        ("train-0000-q1", "train-0000", "1900"),
    ]


def test_more_completions_or_passages_than_there_are_is_an_error(data_file):
    path = data_file([RECORD])
    with pytest.raises(DataError, match="at least 2 passages, found 1"):
        squad.load_passages(path, num_passages=2)
    with pytest.raises(DataError, match="must have 4 completions, found 3"):
        squad.passage_tables(squad.load_passages(path, num_passages=1), num_completions=4)


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
        (RECORD | {"completions": ["x", None]}, r"record 1, completion 1 must have a text"),
    ],
)
def test_malformed_record_is_reported_with_its_index(data_file, record, message):
    path = data_file([RECORD, record])
    with pytest.raises(DataError, match=message):
        squad.load_passages(path, num_passages=2)


def test_file_that_is_not_json_or_not_a_list_is_refused(data_file, tmp_path):
    with pytest.raises(DataError, match="must be a list of passages, found a dict"):
        squad.load_passages(data_file({"data": []}), num_passages=1)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="must be JSON"):
        squad.load_passages(Path("broken.json"), num_passages=1)


def test_missing_file_without_the_variable_says_to_set_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PAST_RAY_DATA", raising=False)
    with pytest.raises(DataError, match="Set PAST_RAY_DATA to the folder"):
        squad.load_passages(Path("squad/target.json"), num_passages=1)


def test_missing_file_with_the_variable_names_its_value(tmp_path, monkeypatch):
    monkeypatch.setenv("PAST_RAY_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"Check PAST_RAY_DATA={tmp_path}"):
        squad.resolve_data_path(Path("squad/target.json"))


def test_absolute_path_ignores_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("PAST_RAY_DATA", "/elsewhere")
    (tmp_path / "a.json").write_text("[]")
    assert squad.resolve_data_path(tmp_path / "a.json") == tmp_path / "a.json"


def test_title_shared_by_source_and_target_is_refused(data_file):
    source = squad.load_passages(data_file([RECORD, RECORD]), num_passages=2)
    target = squad.load_passages(
        data_file([RECORD | {"title": "Force"}], "dev.json"), num_passages=1
    )
    squad.check_disjoint_titles(source, target)
    with pytest.raises(DataError, match="no title in common, found 1"):
        squad.check_disjoint_titles(source, [*target, source[0]])


@pytest.mark.skipif("PAST_RAY_DATA" not in os.environ, reason="PAST_RAY_DATA is not set")
def test_real_files_load_and_fill_valid_tables(tmp_path):
    source = squad.load_passages(Path("squad/source_round1.json"), num_passages=50)
    target = squad.load_passages(Path("squad/target_200.json"), num_passages=200)
    squad.check_disjoint_titles(source, target)
    documents, questions = squad.passage_tables(target, num_completions=5)
    assert (len(documents), len(questions)) == (200 * 6, 974)
    assert sum(len(passage.questions) for passage in source) == 225
    tables.write_documents(tmp_path / "documents.parquet", documents)
    tables.write_questions(tmp_path / "questions.parquet", questions)
    known = tables.read_documents(tmp_path / "documents.parquet")
    assert tables.read_questions(tmp_path / "questions.parquet", known).num_rows == 974
