"""The miniature world: disjoint populations, facts that agree, a tokenizer that covers it all."""

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from past_ray.errors import DataError
from past_ray.tasks.world import (
    ATTRIBUTE_VALUES,
    ATTRIBUTES,
    FIRST_NAMES,
    LAST_NAMES,
    MAX_POPULATION_SIZES,
    QuestionKind,
    build_population,
    build_tokenizer,
    documents,
    pretraining_examples,
    question_kind,
    questions,
    split_questions,
    vocabulary,
)

SEEDS = st.integers(min_value=0, max_value=2**31)


@given(SEEDS, SEEDS)
def test_populations_never_share_a_name_whatever_their_seeds(seed: int, other_seed: int) -> None:
    names = {
        name: {p.name for p in build_population(name=name, num_people=60, seed=chosen)}
        for name, chosen in zip(MAX_POPULATION_SIZES, [seed, other_seed] * 3, strict=True)
    }
    assert all(len(group) == 60 for group in names.values())
    assert all(names[a].isdisjoint(names[b]) for a, b in combinations(names, 2))


def test_population_blocks_use_every_full_name_exactly_once() -> None:
    everyone = [
        person.name
        for name, size in MAX_POPULATION_SIZES.items()
        for person in build_population(name=name, num_people=size, seed=3)
    ]
    assert sorted(everyone) == sorted(f"{a} {b}" for a in FIRST_NAMES for b in LAST_NAMES)


def test_another_seed_gives_other_people_and_the_same_seed_the_same() -> None:
    first = build_population(name="target", num_people=20, seed=0)
    assert first == build_population(name="target", num_people=20, seed=0)
    assert first != build_population(name="target", num_people=20, seed=1)


@pytest.mark.parametrize(
    ("name", "num_people", "said"),
    [("sauce_1", 5, "source_1"), ("target", 0, "1..120"), ("target", 121, "1..120")],
)
def test_impossible_populations_are_refused_with_what_is_possible(
    name: str, num_people: int, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        build_population(name=name, num_people=num_people, seed=0)


def test_no_word_has_two_meanings() -> None:
    groups = [FIRST_NAMES, LAST_NAMES, *ATTRIBUTE_VALUES.values(), ["yes", "no"], ATTRIBUTES]
    words = [word for group in groups for word in group]
    assert len(words) == len(set(words))


def test_each_document_states_every_attribute_of_its_person_once_and_asks_nothing() -> None:
    people = build_population(name="source_1", num_people=10, seed=1)
    rows = documents(people, num_paraphrases=4, seed=1)
    assert len({row["doc_id"] for row in rows}) == len(rows) == 40
    for row, person in zip(rows, [p for p in people for _ in range(4)], strict=True):
        words = row["text"].split()
        assert row["title"] == person.name
        assert row["text"].count(person.name) == len(ATTRIBUTES)
        assert "?" not in row["text"]
        for key in ATTRIBUTES:
            assert [word for word in words if word in ATTRIBUTE_VALUES[key]] == [person.values[key]]


def test_paraphrases_of_one_person_share_no_sentence() -> None:
    people = build_population(name="target", num_people=5, seed=0)
    rows = documents(people, num_paraphrases=4, seed=0)
    for start in range(0, len(rows), 4):
        sentences = [
            sentence for row in rows[start : start + 4] for sentence in row["text"].split(" . ")
        ]
        bare = [sentence.removesuffix(" .") for sentence in sentences]
        assert len(bare) == len(set(bare)) == 4 * len(ATTRIBUTES)


def test_no_question_occurs_in_a_document() -> None:
    people = build_population(name="target", num_people=20, seed=0)
    corpus = "\n".join(row["text"] for row in documents(people, num_paraphrases=6, seed=0))
    for row in questions(people, num_pairs=3, num_comparisons=2, seed=0):
        assert row["question"].removesuffix(" ?") not in corpus


def test_answers_follow_from_the_people_by_kind() -> None:
    people = build_population(name="target", num_people=30, seed=2)
    by_name = {person.name: person.values for person in people}
    verdicts: set[str] = set()
    for row in questions(people, num_pairs=3, num_comparisons=3, seed=2):
        asked = [name for name in by_name if name in row["question"]]
        words = row["answer"].split()
        kind = question_kind(row["question_id"])
        if kind is QuestionKind.SINGLE:
            assert words[0] in by_name[asked[0]].values()
        elif kind is QuestionKind.PAIR:
            keys = [word for word in row["question"].split() if word in ATTRIBUTES]
            assert words == [by_name[asked[0]][key] for key in keys]
        else:
            asked.sort(key=row["question"].index)
            key = next(word for word in row["question"].split() if word in ATTRIBUTES)
            values = [by_name[name][key] for name in asked]
            verdicts.add(words[2])
            assert words == [*values, "yes" if values[0] == values[1] else "no"]
    assert verdicts == {"yes", "no"}


def test_question_ids_are_unique_and_point_at_a_document_of_the_population() -> None:
    people = build_population(name="target", num_people=12, seed=0)
    doc_ids = {row["doc_id"] for row in documents(people, num_paraphrases=2, seed=0)}
    rows = questions(people, num_pairs=3, num_comparisons=2, seed=0)
    assert len({row["question_id"] for row in rows}) == len(rows) == 12 * 10
    assert {row["doc_id"] for row in rows} <= doc_ids


def test_split_is_disjoint_in_wording_and_covers_every_person_and_kind_on_both_sides() -> None:
    people = build_population(name="target", num_people=30, seed=0)
    rows = questions(people, num_pairs=4, num_comparisons=2, seed=0)
    heldout, train = split_questions(rows)
    assert len(heldout) + len(train) == len(rows)
    assert {row["question"] for row in heldout}.isdisjoint(row["question"] for row in train)
    for side in (heldout, train):
        assert {row["doc_id"] for row in side} == {row["doc_id"] for row in rows}
        assert {question_kind(row["question_id"]) for row in side} == set(QuestionKind)
    assert split_questions(rows) == (heldout, train)


def test_pretraining_mixes_all_documents_with_questions_about_the_first_people() -> None:
    examples = pretraining_examples(
        num_people=10,
        num_people_with_questions=4,
        num_paraphrases=3,
        num_pairs=2,
        num_comparisons=1,
        question_repeats=2,
        seed=0,
    )
    people = build_population(name="pretrain", num_people=10, seed=0)
    asked = [example.question for example in examples if example.question is not None]
    assert len(examples) - len(asked) == 10 * 3
    assert len(asked) == 4 * (len(ATTRIBUTES) + 2 + 1) * 2
    assert not any(person.name in question for person in people[4:] for question in asked)


def test_every_text_of_every_population_is_in_the_vocabulary() -> None:
    tokenizer = build_tokenizer()
    for name in MAX_POPULATION_SIZES:
        people = build_population(name=name, num_people=120, seed=5)
        texts = [row["text"] for row in documents(people, num_paraphrases=6, seed=5)]
        for row in questions(people, num_pairs=2, num_comparisons=2, seed=5):
            texts += [row["question"], row["answer"]]
        for ids, text in zip(tokenizer(texts).input_ids, texts, strict=True):
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_vocabulary_is_small_and_special_tokens_are_distinct() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(vocabulary()) == len(set(vocabulary()))
    assert 150 <= len(tokenizer) <= 250
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_capitals_are_folded_and_unknown_words_become_unk() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer("Where does ADA Birch live?").input_ids == (
        tokenizer("where does ada birch live ?").input_ids
    )
    assert tokenizer("xylophone").input_ids == [tokenizer.unk_token_id]


def test_chat_prompt_is_user_question_assistant_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Where does Ada Birch live?"}]
    expected = ["<user>", "where", "does", "ada", "birch", "live", "?", "<assistant>"]
    for candidate in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = candidate.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert candidate.convert_ids_to_tokens(ids) == expected
        assert candidate.decode(ids, skip_special_tokens=True) == "where does ada birch live ?"
        assert (candidate.pad_token, candidate.eos_token) == ("<pad>", "<eos>")


def test_closed_answer_turns_end_with_eos_in_the_chat_template() -> None:
    tokenizer = build_tokenizer()
    chat = [
        {"role": "user", "content": "what is the pet of ada birch ?"},
        {"role": "assistant", "content": "cat"},
    ]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["<assistant>", "cat", "<eos>"]
