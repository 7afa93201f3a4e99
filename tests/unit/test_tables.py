import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from past_ray.errors import DataError, StorageError
from past_ray.tasks import tables

DOCUMENT_ROWS = [
    {"doc_id": "d0", "title": "ada", "text": "ada lives in oslo ."},
    {"doc_id": "d1", "title": "", "text": "leo lives in rome ."},
]
QUESTION_ROWS = [
    {"question_id": "q0", "doc_id": "d1", "question": "where does leo live ?", "answer": "rome"},
    {"question_id": "q1", "doc_id": "d0", "question": "where does ada live ?", "answer": "oslo"},
]


def documents_file(folder, **columns):
    defaults = {"doc_id": ["d0", "d1"], "title": ["a", "b"], "text": ["x", "y"]}
    path = folder / "documents.parquet"
    pq.write_table(pa.table(defaults | columns), path)
    return path


def questions_file(folder, **columns):
    defaults = {name: [row[name] for row in QUESTION_ROWS] for name in QUESTION_ROWS[0]}
    path = folder / "questions.parquet"
    pq.write_table(pa.table(defaults | columns), path)
    return path


def test_written_rows_are_read_back_in_order(tmp_path):
    tables.write_documents(tmp_path / "new" / "documents.parquet", DOCUMENT_ROWS)
    tables.write_questions(tmp_path / "questions.parquet", QUESTION_ROWS)
    documents = tables.read_documents(tmp_path / "new" / "documents.parquet")
    questions = tables.read_questions(tmp_path / "questions.parquet", documents)
    assert documents.to_pylist() == DOCUMENT_ROWS
    assert questions.to_pylist() == QUESTION_ROWS


def test_written_file_has_the_schema_with_no_nullable_column(tmp_path):
    tables.write_documents(tmp_path / "documents.parquet", DOCUMENT_ROWS)
    assert pq.read_schema(tmp_path / "documents.parquet").equals(tables.DOCUMENTS)


def test_further_columns_are_left_out_and_large_strings_are_accepted(tmp_path):
    path = documents_file(tmp_path, text=pa.array(["x", "y"], pa.large_string()), page=[1, 2])
    table = tables.read_documents(path)
    assert table.column_names == ["doc_id", "title", "text"]
    assert table["text"].to_pylist() == ["x", "y"]


def test_missing_column_error_lists_found_and_expected_names(tmp_path):
    path = tmp_path / "documents.parquet"
    pq.write_table(pa.table({"doc_id": ["d0"], "title": ["a"], "body": ["x"]}), path)
    with pytest.raises(
        DataError,
        match=r"\['doc_id', 'title', 'text'\], found \['doc_id', 'title', 'body'\]. Rename or add "
        r"\['text'\]",
    ):
        tables.read_documents(path)


def test_column_of_numbers_is_refused_with_its_type(tmp_path):
    path = documents_file(tmp_path, doc_id=[1, 2])
    with pytest.raises(DataError, match="doc_id must be a column of strings, found int64"):
        tables.read_documents(path)


def test_null_text_is_reported_with_its_row(tmp_path):
    path = documents_file(tmp_path, text=["x", None])
    with pytest.raises(DataError, match=r"text must not be null, found 1 nulls \(row 1\)"):
        tables.read_documents(path)


def test_blank_texts_are_counted_in_full_and_listed_up_to_five(tmp_path):
    blank = ["x", "", " ", "\n\t", "y", "", "\u00a0", "", ""]
    numbers = [str(row) for row in range(len(blank))]
    path = documents_file(tmp_path, doc_id=numbers, title=numbers, text=blank)
    with pytest.raises(DataError, match=r"found 7 empty \(rows 1, 2, 3, 5, 6, \.\.\.\)"):
        tables.read_documents(path)


def test_duplicate_id_error_names_both_rows(tmp_path):
    path = documents_file(
        tmp_path, doc_id=["a", "b", "c", "b"], title=["t"] * 4, text=["x", "y", "z", "w"]
    )
    with pytest.raises(
        DataError, match="doc_id must be unique, found 1 repeated: 'b' in rows 1 and 3"
    ):
        tables.read_documents(path)


def test_question_for_an_unknown_document_is_reported_with_its_row(tmp_path):
    documents = tables.read_documents(documents_file(tmp_path))
    path = questions_file(tmp_path, doc_id=["d0", "nowhere"])
    with pytest.raises(DataError, match=r"found 1 unknown \(row 1; they name \['nowhere'\]\)"):
        tables.read_questions(path, documents)


@pytest.mark.parametrize("column", ["question", "answer", "question_id"])
def test_empty_question_answer_or_id_is_refused(tmp_path, column):
    documents = tables.read_documents(documents_file(tmp_path))
    path = questions_file(tmp_path, **{column: ["fine", "  "]})
    with pytest.raises(DataError, match=rf"{column} must not be empty, found 1 empty \(row 1\)"):
        tables.read_questions(path, documents)


def test_duplicate_question_id_is_refused(tmp_path):
    documents = tables.read_documents(documents_file(tmp_path))
    path = questions_file(tmp_path, question_id=["q", "q"])
    with pytest.raises(DataError, match="'q' in rows 0 and 1"):
        tables.read_questions(path, documents)


def test_table_without_rows_is_refused(tmp_path):
    path = tmp_path / "documents.parquet"
    pq.write_table(tables.DOCUMENTS.empty_table(), path)
    with pytest.raises(DataError, match="at least one row"):
        tables.read_documents(path)


def test_absent_file_and_other_formats_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="found nothing there"):
        tables.read_documents(tmp_path / "documents.parquet")
    (tmp_path / "text.parquet").write_text("doc_id,title,text\n")
    with pytest.raises(DataError, match="must be readable as Parquet"):
        tables.read_documents(tmp_path / "text.parquet")


def test_bad_rows_are_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "documents.parquet"
    with pytest.raises(DataError, match=r"row 0 must have the columns .* found \['doc_id'\]"):
        tables.write_documents(path, [{"doc_id": "d0"}])
    with pytest.raises(DataError, match="text must be text, found 7 in row 1"):
        tables.write_documents(path, [DOCUMENT_ROWS[0], DOCUMENT_ROWS[1] | {"text": 7}])
    with pytest.raises(DataError, match=r"text must not be empty, found 1 empty \(row 0\)"):
        tables.write_documents(path, [DOCUMENT_ROWS[0] | {"text": ""}])
    assert list(tmp_path.iterdir()) == []


def test_failed_write_is_a_storage_error_and_leaves_the_older_file(tmp_path):
    (tmp_path / "folder").write_text("a file where a folder must be")
    with pytest.raises(StorageError, match="must be writable"):
        tables.write_documents(tmp_path / "folder" / "documents.parquet", DOCUMENT_ROWS)
