import math

import pytest
import torch

from past_ray.rl.logprobs import ENTROPY_CHUNK, token_entropy, token_logprobs


def test_logits_before_a_token_score_it():
    # softmax of [0, ln 3] is [1/4, 3/4].
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(3), 0.0], [50.0, -50.0]]])
    logprobs = token_logprobs(logits, torch.tensor([[0, 1, 1]]), temperature=1.0)
    expected = torch.tensor([[0.0, math.log(3 / 4), math.log(1 / 4)]])
    torch.testing.assert_close(logprobs, expected)


def test_temperature_divides_the_logits():
    # At temperature 1/2 the logits [0, ln 3] become [0, ln 9]: probabilities 1/10 and 9/10.
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]])
    logprobs = token_logprobs(logits, torch.tensor([[0, 1]]), temperature=0.5)
    assert logprobs[0, 1].item() == pytest.approx(math.log(9 / 10))
    entropy = token_entropy(logits, temperature=0.5)
    expected = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    assert entropy[0, 1].item() == pytest.approx(expected, rel=1e-6)


def test_bfloat16_logits_are_normalised_in_float32():
    logits = torch.randn(1, 4, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    every = torch.stack(
        [
            token_logprobs(logits, torch.full((1, 4), token), temperature=1.0)
            for token in range(1000)
        ]
    )
    assert every.dtype == torch.float32
    torch.testing.assert_close(every.exp().sum(0)[:, 1:], torch.ones(1, 3), atol=1e-5, rtol=0)


def test_entropy_of_equal_logits_is_log_of_the_vocabulary():
    entropy = token_entropy(torch.zeros(2, 3, 8), temperature=0.7)
    expected = torch.tensor([0.0, math.log(8), math.log(8)]).expand(2, 3)
    torch.testing.assert_close(entropy, expected)


def test_chunks_do_not_change_the_entropy():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 2 * ENTROPY_CHUNK + 5, 6, generator=generator)
    distribution = torch.distributions.Categorical(logits=logits[:, :-1] / 0.5)
    entropy = token_entropy(logits, temperature=0.5)
    torch.testing.assert_close(entropy[:, 1:], distribution.entropy())


def test_impossible_token_adds_no_entropy():
    logits = torch.tensor([[[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]]])
    assert token_entropy(logits, temperature=1.0)[0, 1].item() == pytest.approx(math.log(2))


def test_gradient_is_onehot_minus_softmax_over_temperature():
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]], requires_grad=True)
    token_logprobs(logits, torch.tensor([[0, 1]]), temperature=0.5).sum().backward()
    # (onehot(1) - [1/10, 9/10]) / 0.5
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([-0.2, 0.2]))
    assert logits.grad[0, 1].tolist() == [0.0, 0.0]
