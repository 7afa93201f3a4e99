import json
import os

import pytest

from past_ray.errors import DataError
from past_ray.tasks import loogle

PAIRS = [{"Q": "It's where?", "A": "Oslo.", "S": "It lies in Oslo."}]
RECORD = {"title": "Ada", "input": " Early life.", "qa_pairs": repr(PAIRS), "output": "none"}


@pytest.fixture
def data_file(tmp_path):
    def write(*records):
        path = tmp_path / "docs.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def test_document_carries_its_index_and_the_pairs_of_its_literal(data_file):
    documents = loogle.load_passages(data_file(RECORD, RECORD | {"title": "Bo"}))
    assert [(d.passage_id, d.title, d.context) for d in documents] == [
        ("docs-0000", "Ada", "Early life."),
        ("docs-0001", "Bo", "Early life."),
    ]
    assert documents[0].questions == (("It's where?", "Oslo."),)


@pytest.mark.parametrize(
    "literal", ["[{'Q': 'a', 'A':", "none", "__import__('os').getcwd()", "[" * 10_000]
)
def test_pairs_that_are_no_literal_are_refused_and_never_run(data_file, literal):
    with pytest.raises(DataError, match=r"record 1: qa_pairs must be a Python literal, found "):
        loogle.load_passages(data_file(RECORD, RECORD | {"qa_pairs": literal}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qa_pairs": "{'Q': 'a'}"}, r"record 1: qa_pairs must be a list of pairs"),
        ({"qa_pairs": PAIRS}, r"record 1 must have a text 'qa_pairs', found a list"),
        (
            {"qa_pairs": repr([*PAIRS, {"Q": "Who?", "A": ""}])},
            r"record 1, question 1 must have a text 'A', found an empty text",
        ),
        ({"qa_pairs": "['text']"}, r"record 1, question 0 must be an object, found a str"),
        ({"input": ""}, r"record 1 must have a text 'input', found an empty text"),
    ],
)
def test_malformed_record_is_reported_with_its_index(data_file, fields, message):
    with pytest.raises(DataError, match=message):
        loogle.load_passages(data_file(RECORD, RECORD | fields))


@pytest.mark.skipif("PAST_RAY_DATA" not in os.environ, reason="PAST_RAY_DATA is not set")
def test_real_sample_loads_whole():
    documents = loogle.load_passages("loogle/shortdep_qa.jsonl")
    assert [len(document.questions) for document in documents] == [11, 12, 16, 25, 16]
