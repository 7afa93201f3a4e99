import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from past_ray.errors import ConfigError, DataError
from past_ray.sft.examples import SFTExample, chat_example, document_examples
from tests.tiny_model import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_a_document_is_its_tokens_and_eos_with_loss_from_the_second_token():
    (example,) = document_examples(["anna lives in oslo ."], TOKENIZER, max_length=16)
    assert example.token_ids == (*ids("anna lives in oslo ."), EOS)
    assert example.num_prompt_tokens == 0
    assert example.num_loss_tokens == 5  # 5 words and eos; nothing predicts the first


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(2, 9))
def test_pieces_of_a_long_document_never_lose_a_token(lengths, max_length):
    texts = [" ".join(["anna", "oslo", "cat"][i % 3] for i in range(length)) for length in lengths]
    pieces = document_examples(texts, TOKENIZER, max_length=max_length)
    joined = [token for piece in pieces for token in piece.token_ids]
    assert joined == [token for text in texts for token in (*ids(text), EOS)]
    assert max(len(piece.token_ids) for piece in pieces) <= max_length


def test_ten_tokens_in_pieces_of_at_most_four_are_three_three_four():
    pieces = document_examples(["cat " * 9], TOKENIZER, max_length=4)
    assert [len(piece.token_ids) for piece in pieces] == [3, 3, 4]


def test_a_document_without_tokens_is_refused_with_its_position():
    with pytest.raises(DataError, match="document 1 of 2"):
        document_examples(["anna", "  "], TOKENIZER, max_length=4)


def test_a_chat_example_has_loss_on_the_answer_and_eos_only():
    example = chat_example([{"role": "user", "content": "where is anna ?"}], "in oslo", TOKENIZER)
    prompt = ids("<user> where is anna ? <eos> <assistant>")
    assert example.token_ids == (*prompt, *ids("in oslo"), EOS)
    assert example.num_prompt_tokens == len(prompt)
    assert example.num_loss_tokens == 3


def test_an_answer_without_tokens_is_refused():
    with pytest.raises(DataError, match="An answer must have a token"):
        chat_example([{"role": "user", "content": "who ?"}], "", TOKENIZER)


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-sequence"):
        document_examples(["anna"], tokenizer, max_length=4)


def test_a_prompt_as_long_as_the_sequence_leaves_no_loss():
    assert SFTExample(token_ids=(1, 2), num_prompt_tokens=2).num_loss_tokens == 0
