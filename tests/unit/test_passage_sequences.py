import doctest
import json
import os
from pathlib import Path

import pytest

from past_ray.sft import passage_sequences
from past_ray.sft.passage_sequences import (
    continued_pretraining_sequences,
    single_passage_sequences,
)

PASSAGE = "Oslo is the capital of Norway ."


def lines_of(generation):
    *lines, last = single_passage_sequences("Oslo", passage=PASSAGE, generation=generation)
    assert last == f"Oslo\n{PASSAGE}"
    return lines


def test_the_examples_in_the_docstrings_are_right():
    results = doctest.testmod(passage_sequences)
    assert (results.failed, results.attempted) == (0, 2)


def test_every_line_stands_alone_under_the_title_and_the_passage_comes_last():
    assert lines_of("1. A\n2. B\n3. C") == ["Oslo\n1. A", "Oslo\n2. B", "Oslo\n3. C"]


def test_empty_lines_are_dropped_and_spaces_around_a_line_too():
    assert lines_of("\n  A \r\n\n \t\nB\n") == ["Oslo\nA", "Oslo\nB"]


@pytest.mark.parametrize(
    ("generation", "kept"),
    [
        ("Sure, here:\n1. A\n2. B", ["1. A", "2. B"]),
        ("Sure, here:\n\n  1. A", ["1. A"]),  # blank lines do not count
        ("Sure, here:\n- A\n1. B", ["Sure, here:", "- A", "1. B"]),
        ("1. A\n2. B", ["1. A", "2. B"]),
        ("A", ["A"]),
        ("1. A", ["1. A"]),
    ],
)
def test_an_introduction_is_dropped_only_before_the_first_item_of_a_list(generation, kept):
    assert lines_of(generation) == [f"Oslo\n{line}" for line in kept]


def test_without_a_generation_the_passage_is_trained_on_alone_and_once():
    alone = [f"Oslo\n{PASSAGE}"]
    assert single_passage_sequences("Oslo", passage=PASSAGE, generation=" \n") == alone
    assert continued_pretraining_sequences("Oslo", passage=PASSAGE, generations=[]) == alone


def test_continued_pretraining_keeps_generations_whole_and_repeats_the_passage_for_each():
    generations = ["Sure:\n1. A\n\n2. B\n", "1. C"]
    assert continued_pretraining_sequences("Oslo", passage=PASSAGE, generations=generations) == [
        "Oslo\nSure:\n1. A\n\n2. B",
        f"Oslo\n{PASSAGE}",
        "Oslo\n1. C",
        f"Oslo\n{PASSAGE}",
    ]


@pytest.mark.skipif("PAST_RAY_DATA" not in os.environ, reason="PAST_RAY_DATA is not set")
def test_lines_of_published_generations_are_the_generation_without_its_introduction():
    file = Path(os.environ["PAST_RAY_DATA"], "squad", "source_round1.json")
    for record in json.loads(file.read_text(encoding="utf-8")):
        title, passage = record["title"], record["context"]
        whole = continued_pretraining_sequences(
            title, passage=passage, generations=record["completions"]
        )
        assert len(whole) == 2 * len(record["completions"])
        for generation in record["completions"]:
            *lines, last = single_passage_sequences(title, passage=passage, generation=generation)
            assert last == whole[1]
            # Together the lines are the generation, less at most an introduction.
            words = " ".join(line.removeprefix(f"{title}\n") for line in lines).split()
            assert words == generation.split()[-len(words) :]
            assert all(line.count("\n") == 1 for line in lines)
