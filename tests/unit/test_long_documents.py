"""Long documents lose nothing uncounted, and no question of the target is ever trained."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from past_ray.config.experiment import ExperimentConfig
from past_ray.errors import DataError
from past_ray.pipelines.window_texts import pairs_or_gold, window_coverage, window_rows
from past_ray.tasks.synthesis import pair_requests, summary_requests
from tests.tiny_model import make_tiny_tokenizer

TEXT = "anna lives in oslo . ben likes bread . clara owns a dog . david eats rice ."
DOCUMENTS = [{"doc_id": name, "title": name.upper(), "text": TEXT} for name in ("d0", "d1")]
GOLD = [
    {"question_id": f"{name}-q0", "doc_id": name, "question": "who ?", "answer": "anna"}
    for name in ("d0", "d1")
]
PAIR = "<question>who lives in oslo ?</question><answer>anna</answer>"
WINDOWS = {"task": {"kind": "loogle"}, "model": {"kind": "wheel"}, "texts": {"kind": "windows"}}


def coverage(lengths, *, limit, sizes=(4, 6)):
    return window_coverage(lengths, sizes=sizes, overlap=1, limit=limit)


def test_tokens_behind_the_limit_are_counted_as_dropped():
    # Size 4: 0-4 3-7 6-10, size 6: 0-6 5-10; the first of each reads 6 of 10 tokens.
    one = coverage([10], limit=1)
    assert (one.windows, one.windows_dropped, one.tokens_read, one.tokens_dropped) == (2, 3, 6, 4)


def test_a_document_counts_by_its_own_length():
    # The second document is one window of 3 tokens for either size.
    two = coverage([10, 3], limit=1)
    assert (two.windows, two.windows_dropped, two.tokens_read, two.tokens_dropped) == (4, 3, 9, 4)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_without_a_limit_nothing_is_dropped(lengths):
    whole = coverage(lengths, limit=None)
    assert (whole.windows_dropped, whole.tokens_dropped) == (0, 0)
    assert whole.tokens_read == sum(lengths)


def test_every_window_is_trained_once_under_the_title_of_its_document():
    summaries = summary_requests(
        DOCUMENTS, make_tiny_tokenizer(), sizes=(4, 8), overlap=0, texts_per_window=4, seed=0
    )
    rows = window_rows(summaries)
    of_size_8 = [row for row in rows if row["doc_id"].startswith("d1#window-8.")]
    assert [row["doc_id"][-1] for row in of_size_8] == ["0", "1", "2"]  # 18 tokens
    assert "".join(row["text"] for row in of_size_8) == TEXT
    assert {row["title"] for row in of_size_8} == {"D1"}
    assert len(rows) == len(summaries) // 2 == 2 * (5 + 3)


def asked_and_written(**of_document):
    """Pair requests on one window a document, and what was written about each."""
    requests = pair_requests(
        DOCUMENTS, make_tiny_tokenizer(), sizes=(32,), overlap=0, pairs_per_window=1, seed=0
    )
    return requests, {request.request_id: of_document[request.doc_id] for request in requests}


def test_a_document_without_a_pair_is_refused_by_name():
    with pytest.raises(DataError, match=r"\['d1'\]"):
        pairs_or_gold(*asked_and_written(d0=PAIR, d1="no idea"), gold=None)


def test_only_documents_without_pairs_lend_their_questions():
    table = pairs_or_gold(*asked_and_written(d0=PAIR, d1="<question>cut"), gold=GOLD)
    assert [row["doc_id"] for row in table.rows] == ["d0", "d1"]
    assert table.rows[0]["question"] == "who lives in oslo ?"
    assert table.rows[1] == GOLD[1]
    assert table.figures == {
        "pairs": 1,
        "pairs_dropped": 1,
        "pair_texts": 2,
        "pair_texts_unparsable": 1,
        "gold_questions": 1,
    }


def test_with_nothing_to_lend_the_table_is_empty_and_says_so():
    table = pairs_or_gold(*asked_and_written(d0="", d1=""), gold=[])
    assert table.rows == []
    assert table.figures["pair_texts_unparsable"] == 2


def test_a_second_phase_needs_windows_to_ask_about():
    assert ExperimentConfig.model_validate({**WINDOWS, "sft_pairs": {}}).sft_pairs is not None
    with pytest.raises(ValidationError, match=r"sft_pairs needs texts\.kind windows"):
        ExperimentConfig.model_validate({**WINDOWS, "texts": None, "sft_pairs": {}})


@pytest.mark.parametrize("other", [{"single_passage": {}}, {"evaluation": {"dose_steps": [4]}}])
def test_windows_refuse_what_trains_in_other_portions(other):
    with pytest.raises(ValidationError, match=r"texts\.kind windows trains one model"):
        ExperimentConfig.model_validate({**WINDOWS, **other})


def test_uneven_ranks_of_the_second_phase_are_refused():
    with pytest.raises(ValidationError, match=r"sft_pairs\.batch_size must be a multiple"):
        ExperimentConfig.model_validate(
            {**WINDOWS, "sft_pairs": {"batch_size": 3}, "runtime": {"num_sft_workers": 2}}
        )
