import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from past_ray.errors import DataError
from past_ray.tasks.records import read_json_file, read_json_lines, resolve_data_path


def test_missing_file_without_the_variable_says_to_set_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PAST_RAY_DATA", raising=False)
    with pytest.raises(DataError, match="Set PAST_RAY_DATA to the folder"):
        resolve_data_path(Path("squad/target.json"))


def test_missing_file_with_the_variable_names_its_value(tmp_path, monkeypatch):
    monkeypatch.setenv("PAST_RAY_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"Check PAST_RAY_DATA={tmp_path}"):
        resolve_data_path(Path("squad/target.json"))


def test_absolute_path_ignores_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("PAST_RAY_DATA", "/elsewhere")
    (tmp_path / "a.json").write_text("[]")
    assert resolve_data_path(tmp_path / "a.json") == tmp_path / "a.json"


@given(
    records=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=3)), max_size=4),
    indent=st.sampled_from([None, 2]),
)
def test_records_before_broken_json_are_counted(tmp_path_factory, records, indent):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps([*records, "end"], indent=indent).replace('"end"', "{broken}"))
    with pytest.raises(DataError, match=f"got in record {len(records)}: "):
        read_json_file(path)


def test_broken_line_is_reported_with_its_record_and_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": \n')
    with pytest.raises(DataError, match=r"a.jsonl: record 2 \(line 4\) must be JSON"):
        read_json_lines(path)


def test_line_separator_inside_a_text_does_not_end_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\N{LINE SEPARATOR}y"}\n', encoding="utf-8")
    assert read_json_lines(path) == [{"a": "x\N{LINE SEPARATOR}y"}]


@pytest.mark.parametrize("read", [read_json_file, read_json_lines])
def test_file_that_is_not_utf8_is_refused(tmp_path, read):
    (tmp_path / "a.json").write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="must be UTF-8 text"):
        read(tmp_path / "a.json")
