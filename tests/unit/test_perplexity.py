import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from past_ray.engine.perplexity import TokenNLL, batch_windows, cut_windows, token_nll
from past_ray.errors import ConfigError, DataError, SkillVectorError
from past_ray.skill.checkpoint import load_weights
from tests.tiny_model import WORDS, make_tiny_model, make_tiny_tokenizer

VOCABULARY = WORDS.split()
SHORT = "anna lives in berlin ."
LONG = " ".join(VOCABULARY[(7 * index) % len(VOCABULARY)] for index in range(50))
TEXTS = [SHORT, LONG, "ben owns a cat and a dog ."]


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def folder(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=request.param)


def score(folder, texts, **options):
    options = {"max_length": 64, "batch_tokens": 256, "device": "cpu", **options}
    return token_nll(folder, texts, **options)


def reference(folder, text):
    """Log-probabilities and argmax hits of one whole text, from one plain forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([make_tiny_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    return -logprobs, (logits.argmax(-1) == ids[0, 1:]).sum().item()


def test_nll_and_hits_are_those_of_a_plain_forward_pass(folder):
    result = score(folder, TEXTS)
    expected = [reference(folder, text) for text in TEXTS]
    assert result.nll == pytest.approx(sum(nll.sum().item() for nll, _ in expected), rel=1e-5)
    assert result.num_predicted == sum(hits for _, hits in expected)
    assert result.num_read == 5 + 50 + 8
    assert result.num_scored == 4 + 49 + 7


def test_perplexity_of_a_model_without_opinion_is_the_vocabulary_size(folder):
    zeros = {name: torch.zeros_like(weight) for name, weight in load_weights(folder).items()}
    result = score(folder, TEXTS, weights=zeros)
    assert result.perplexity == pytest.approx(len(make_tiny_tokenizer()), rel=1e-5)


def test_a_long_text_is_scored_window_by_window_and_nothing_is_cut(folder):
    words = LONG.split()
    pieces = [" ".join(words[start : start + 8]) for start in range(0, 49, 7)]
    expected = sum(reference(folder, piece)[0].sum().item() for piece in pieces)
    result = score(folder, [LONG], max_length=8)
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert (result.num_read, result.num_scored) == (50, 49)


@pytest.mark.parametrize("batch_tokens", [1, 16, 64, 10_000])
def test_what_is_scored_together_changes_nothing(folder, batch_tokens):
    alone = [score(folder, [text], max_length=16) for text in TEXTS]
    together = score(folder, TEXTS, max_length=16, batch_tokens=batch_tokens)
    assert together.nll == pytest.approx(sum(one.nll for one in alone), rel=1e-5)
    assert together.num_predicted == sum(one.num_predicted for one in alone)
    assert together.num_scored == sum(one.num_scored for one in alone)


def test_given_weights_replace_those_of_the_folder(folder, tmp_path):
    other = make_tiny_model(
        tmp_path, seed=1, tie_word_embeddings="lm_head.weight" not in load_weights(folder)
    )
    assert score(folder, TEXTS, weights=load_weights(other)) == score(other, TEXTS)
    assert score(folder, TEXTS) != score(other, TEXTS)


def test_a_weight_too_few_or_too_many_is_refused_by_name(folder):
    weights = load_weights(folder)
    removed = weights.pop("model.norm.weight")
    with pytest.raises(SkillVectorError, match=r"model\.norm\.weight"):
        score(folder, TEXTS, weights=weights)
    with pytest.raises(SkillVectorError, match="adapter"):
        score(folder, TEXTS, weights={**weights, "model.norm.weight": removed, "adapter": removed})


@pytest.mark.parametrize("max_length", [1, 257])
def test_a_window_must_fit_the_model(folder, max_length):
    with pytest.raises(ConfigError, match="from 2 to the 256"):
        score(folder, TEXTS, max_length=max_length)


@pytest.mark.parametrize("texts", [[], [""], ["anna", "ben"]])
def test_nothing_to_score_is_an_error(folder, texts):
    with pytest.raises(DataError, match="at least two tokens"):
        score(folder, texts)


def test_an_empty_text_among_others_counts_nothing(folder):
    assert score(folder, [SHORT, ""]) == score(folder, [SHORT])


def test_perplexity_is_the_exponential_of_the_mean():
    result = TokenNLL(nll=4 * math.log(8), num_scored=4, num_read=5, num_predicted=1)
    assert result.perplexity == pytest.approx(8)
    assert result.accuracy == 0.25
    broken = TokenNLL(nll=1e6, num_scored=1, num_read=2, num_predicted=0)
    assert broken.perplexity == math.inf


@given(st.integers(0, 40), st.integers(2, 12))
def test_windows_score_every_token_but_the_first_exactly_once(num_tokens, max_length):
    windows = cut_windows(range(num_tokens), max_length)
    assert [token for window in windows for token in window[1:]] == list(range(1, num_tokens))
    assert all(2 <= len(window) <= max_length for window in windows)


@given(st.lists(st.integers(2, 12), max_size=30), st.integers(1, 60))
def test_batches_hold_every_window_once_within_the_budget(lengths, batch_tokens):
    windows = [[index] * length for index, length in enumerate(lengths)]
    batches = batch_windows(windows, batch_tokens)
    assert sorted(window for batch in batches for window in batch) == sorted(windows)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= batch_tokens
