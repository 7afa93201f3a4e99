import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from past_ray.errors import DataError
from past_ray.tasks.windows import Window, text_windows, token_windows
from tests.tiny_model import make_tiny_tokenizer


def test_windows_overlap_as_asked_and_the_last_one_ends_with_the_document():
    assert token_windows(10, size=4, overlap=1) == [
        Window(start=0, end=4),
        Window(start=3, end=7),
        Window(start=6, end=10),
    ]
    assert token_windows(11, size=4, overlap=1)[-1] == Window(start=9, end=11)


def test_a_document_that_fits_one_window_is_one_window():
    assert token_windows(4, size=4, overlap=3) == [Window(start=0, end=4)]
    assert token_windows(1, size=4, overlap=3) == [Window(start=0, end=1)]


@given(st.integers(1, 400), st.integers(1, 60), st.data())
def test_every_token_is_covered_and_no_window_is_inside_another(num_tokens, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    windows = token_windows(num_tokens, size=size, overlap=overlap)
    covered = {token for window in windows for token in range(window.start, window.end)}
    assert covered == set(range(num_tokens))
    assert all(window.end - window.start == size for window in windows[:-1])
    neighbours = list(itertools.pairwise(windows))
    assert all(left.end - right.start == overlap for left, right in neighbours)
    assert all(left.end < right.end for left, right in neighbours)
    assert len(windows) == max(1, -(-(num_tokens - overlap) // (size - overlap)))


@pytest.mark.parametrize(
    ("num_tokens", "size", "overlap"), [(0, 4, 1), (9, 4, 4), (9, 4, 5), (9, 4, -1)]
)
def test_numbers_that_allow_no_windows_are_refused(num_tokens, size, overlap):
    with pytest.raises(DataError, match="overlap in"):
        token_windows(num_tokens, size=size, overlap=overlap)


def test_window_texts_are_cut_from_the_document_itself():
    text = "  anna lives\n in  oslo . ben likes rice ? "
    windows = text_windows(text, make_tiny_tokenizer(), size=4, overlap=1)
    assert windows == ["  anna lives\n in  oslo ", "oslo . ben likes ", "likes rice ? "]


@given(st.text(alphabet="ab oslo.\n\u00e9\u4e2d\U0001f600", min_size=1), st.integers(1, 9))
def test_windows_without_overlap_join_to_the_document(text, size):
    tokenizer = make_tiny_tokenizer()
    if not text.split():
        with pytest.raises(DataError, match="a token"):
            text_windows(text, tokenizer, size=size, overlap=0)
    else:
        assert "".join(text_windows(text, tokenizer, size=size, overlap=0)) == text


def test_a_character_of_several_tokens_is_never_torn():
    letters = pre_tokenizers.ByteLevel.alphabet()
    core = Tokenizer(models.BPE({letter: id for id, letter in enumerate(sorted(letters))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    text = "caf\u00e9 \u4e2d\u6587 \U0001f600!"  # 4 + 1, then 2 and 3 + 3, then 4 bytes.
    assert len(tokenizer.encode(text)) == 5 + 1 + 6 + 1 + 4 + 1
    for size in range(1, 19):
        windows = text_windows(text, tokenizer, size=size, overlap=0)
        assert "".join(windows) == text
        assert all(window in text for window in windows)
