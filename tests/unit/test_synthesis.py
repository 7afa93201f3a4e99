import json

import pytest
from pydantic import TypeAdapter, ValidationError

from past_ray.config.texts import TextsConfig, WindowTextsConfig
from past_ray.errors import DataError
from past_ray.tasks.synthesis import (
    pair_requests,
    passage_requests,
    read_given_texts,
    recall_requests,
    summary_requests,
    training_texts,
)
from past_ray.tasks.tables import read_documents, write_documents
from past_ray.tasks.text_prompts import (
    PAIR_FOCUSES,
    PASSAGE_INSTRUCTIONS,
    RECALL_INSTRUCTIONS,
    SUMMARY_INSTRUCTIONS,
)
from tests.tiny_model import make_tiny_tokenizer

DOCUMENTS = [
    {"doc_id": "p0", "title": "Oslo", "text": "anna lives in oslo . ben likes rice ."},
    {"doc_id": "p1", "title": "", "text": "clara owns the cat ."},
]
TOKENIZER = make_tiny_tokenizer()


def content(request):
    (message,) = request.messages
    assert message["role"] == "user"
    return message["content"]


def passage(kinds=("implications", "rewrite"), seed=0):
    return passage_requests(DOCUMENTS, kinds=kinds, texts_per_kind=2, seed=seed)


def summaries(sizes=(4, 8), seed=0):
    return summary_requests(
        DOCUMENTS, TOKENIZER, sizes=sizes, overlap=1, texts_per_window=16, seed=seed
    )


def pairs(number):
    documents = [{**DOCUMENTS[0], "doc_id": f"d{index}"} for index in range(20)]
    return pair_requests(
        documents, TOKENIZER, sizes=(4,), overlap=1, pairs_per_window=number, seed=0
    )


def test_passage_requests_show_title_and_passage_and_ask_for_their_kind():
    requests = passage()
    assert [request.request_id for request in requests[:4]] == [
        "p0#implications-0",
        "p0#implications-1",
        "p0#rewrite-0",
        "p0#rewrite-1",
    ]
    assert content(requests[0]).startswith("Title: Oslo\n\nPassage:\nanna lives in oslo .")
    assert content(requests[0]).endswith(PASSAGE_INSTRUCTIONS["implications"])
    assert content(requests[2]).endswith(PASSAGE_INSTRUCTIONS["rewrite"])
    assert content(requests[4]).startswith("Passage:\nclara owns")


def test_every_request_has_a_seed_of_its_own_that_other_requests_do_not_change():
    seeds = {request.request_id: request.seed for request in passage()}
    assert len(set(seeds.values())) == len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds.values())
    alone = {request.request_id: request.seed for request in passage(kinds=("rewrite",))}
    assert alone.items() < seeds.items()
    assert not set(seeds.values()) & {request.seed for request in passage(seed=1)}


def test_half_the_texts_of_every_window_of_every_size_are_summaries():
    requests = summaries()
    # 9 and 5 tokens, overlap 1: sizes 4 and 8 give 3 + 2 and 2 + 1 windows, 8 summaries each.
    assert len(requests) == 8 * (3 + 2 + 2 + 1)
    assert len({request.request_id for request in requests}) == len(requests)
    assert requests[0].request_id == "p0#summarise-4.0.0"
    assert requests[-1].request_id == "p1#summarise-8.0.7"
    assert "anna lives in oslo" in content(requests[0])
    assert "ben" not in content(requests[0])


def test_all_five_templates_are_drawn_for_summaries_and_for_recalls():
    asked = summaries()
    recalled = recall_requests(asked, {r.request_id: "anna" for r in asked}, seed=0)
    for requests, instructions in (
        (asked, SUMMARY_INSTRUCTIONS),
        (recalled, RECALL_INSTRUCTIONS),
    ):
        drawn = {i for i in instructions for r in requests if content(r).endswith(i)}
        assert drawn == set(instructions)
        assert len(drawn) == 5


def test_each_recall_shows_the_summary_of_its_own_window_and_empty_summaries_have_none():
    asked = summaries(sizes=(4,))
    texts = {request.request_id: f"about {request.request_id}" for request in asked}
    texts["p0#summarise-4.0.3"] = " \n"
    recalled = recall_requests(asked, texts, seed=0)
    assert len(recalled) == len(asked) - 1
    last = recalled[-1]
    assert last.request_id == "p1#recall-4.1.7"
    assert "Summary:\nabout p1#summarise-4.1.7" in content(last)
    assert last.passage == asked[-1].passage
    assert "p0#recall-4.0.3" not in {request.request_id for request in recalled}


def test_all_six_sorts_of_questions_are_drawn_and_their_number_is_asked_for():
    contents = [content(request) for request in pairs(number=7)]
    assert all("Write 7 questions" in text and "<answer>" in text for text in contents)
    drawn = {name for name, focus in PAIR_FOCUSES.items() if any(focus in t for t in contents)}
    assert drawn == set(PAIR_FOCUSES)
    assert len(drawn) == 6


def test_training_texts_are_rows_of_a_documents_table(tmp_path):
    requests = passage()
    texts = {request.request_id: f" text of {request.request_id}\n" for request in requests}
    texts["p0#rewrite-1"] = "\n"
    made = training_texts(requests, texts)
    assert made.num_dropped == 1
    path = tmp_path / "documents.parquet"
    write_documents(path, made.rows)
    assert read_documents(path).to_pylist()[0] == {
        "doc_id": "p0#implications-0",
        "title": "Oslo",
        "text": "text of p0#implications-0",
    }


def test_a_recalled_text_is_trained_behind_its_summary():
    asked = summaries(sizes=(8,))[:1]
    recalled = recall_requests(asked, {asked[0].request_id: " short "}, seed=0)
    made = training_texts(recalled, {"p0#recall-8.0.0": "long"})
    assert made.rows == [{"doc_id": "p0#recall-8.0.0", "title": "Oslo", "text": "short\n\nlong"}]


def test_a_document_about_which_nothing_was_written_is_an_error_that_names_it():
    requests = passage()
    texts = {r.request_id: "" if r.doc_id == "p1" else "text" for r in requests}
    with pytest.raises(DataError, match=r"1 of 2 documents .*'p1'"):
        training_texts(requests, texts)


def test_given_texts_take_the_place_of_generated_ones(tmp_path):
    path = tmp_path / "texts.jsonl"
    requests = passage()
    lines = [{"request_id": r.request_id, "text": r.kind} for r in requests]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {**lines[0]}]))
    assert read_given_texts(path, requests) == {r.request_id: r.kind for r in requests}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    with pytest.raises(DataError, match=r"1 .*'p0#implications-0'"):
        read_given_texts(path, requests)
    path.write_text('{"text": "no id"}\n')
    with pytest.raises(DataError, match="line 1 must be"):
        read_given_texts(path, requests)


def test_configuration_holds_the_published_windows_and_refuses_an_overlap_as_wide_as_one():
    config = TypeAdapter(TextsConfig).validate_python({"kind": "windows"})
    assert isinstance(config, WindowTextsConfig)
    assert (config.text_sizes, config.text_overlap) == ((1024, 2048, 4096), 256)
    assert (config.pair_sizes, config.pair_overlap) == ((128, 256, 512), 16)
    with pytest.raises(ValidationError, match="text_overlap must be below"):
        WindowTextsConfig(text_sizes=(256, 512))
    with pytest.raises(ValidationError):
        WindowTextsConfig(texts_per_window=15)
