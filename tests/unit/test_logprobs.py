import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from past_ray.rl.logprobs import CHUNK_ROWS, chosen_logprobs


def leaf_and_logits(rows: int, vocab_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return a leaf and logits that may be overwritten."""
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.randn(rows, vocab_size, generator=generator).requires_grad_()
    return leaf, leaf * 1


def test_each_row_scores_its_own_token():
    # softmax of [0, ln 3] is [1/4, 3/4].
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    logprobs, _ = chosen_logprobs(logits, torch.tensor([1, 0]), temperature=1.0)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(3 / 4), math.log(1 / 4)]))


def test_temperature_divides_the_logits():
    # At temperature 1/2 the logits [0, ln 3] become [0, ln 9]: probabilities 1/10 and 9/10.
    logits = torch.tensor([[0.0, math.log(3)]])
    logprobs, entropy = chosen_logprobs(logits, torch.tensor([1]), temperature=0.5)
    assert logprobs.item() == pytest.approx(math.log(9 / 10))
    assert entropy.item() == pytest.approx(-0.1 * math.log(0.1) - 0.9 * math.log(0.9), rel=1e-6)


def test_bfloat16_logits_are_normalised_in_float32():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    logprobs, _ = chosen_logprobs(logits.expand(1000, -1), torch.arange(1000), temperature=1.0)
    assert logprobs.dtype == torch.float32
    assert logprobs.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_entropy_of_equal_logits_is_log_of_the_vocabulary():
    _, entropy = chosen_logprobs(torch.zeros(2, 8), torch.tensor([0, 5]), temperature=0.7)
    torch.testing.assert_close(entropy, torch.full((2,), math.log(8)))


def test_impossible_token_adds_no_entropy_and_gets_no_gradient():
    leaf = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    logprobs, entropy = chosen_logprobs(leaf * 1, torch.tensor([0]), temperature=1.0)
    assert entropy.item() == pytest.approx(math.log(2))
    (logprobs + entropy).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([[0.5, -0.5, 0.0]]))


def test_gradient_is_onehot_minus_softmax_over_temperature():
    leaf = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    chosen_logprobs(leaf * 1, torch.tensor([1]), temperature=0.5)[0].sum().backward()
    # (onehot(1) - [1/10, 9/10]) / 0.5
    torch.testing.assert_close(leaf.grad, torch.tensor([[-0.2, 0.2]]))


@given(st.integers(0, 5), st.sampled_from([1, 7, CHUNK_ROWS, 2 * CHUNK_ROWS + 5]))
def test_values_and_gradients_are_those_of_the_formulas(seed: int, rows: int):
    leaf, logits = leaf_and_logits(rows, 11, seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (rows,), generator=generator)
    weights = torch.randn(2, rows, generator=generator)
    table = torch.log_softmax(leaf / 0.7, dim=-1)
    expected = table[torch.arange(rows), tokens], -(table.exp() * table).sum(-1)
    (expected_grad,) = torch.autograd.grad((torch.stack(expected) * weights).sum(), leaf)
    found = chosen_logprobs(logits, tokens, temperature=0.7)
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad((torch.stack(found) * weights).sum(), leaf)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-4)


def test_gradient_takes_the_place_of_the_logits():
    _, logits = leaf_and_logits(3, 5, 0)
    places: list[int] = []
    logits.register_hook(lambda grad: places.append(grad.data_ptr()))
    chosen_logprobs(logits, torch.tensor([0, 1, 2]), temperature=1.0)[0].sum().backward()
    assert places == [logits.data_ptr()]


def test_a_second_backward_pass_is_refused():
    _, logits = leaf_and_logits(3, 5, 0)
    total = chosen_logprobs(logits, torch.tensor([0, 1, 2]), temperature=1.0)[0].sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_no_tokens_give_nothing_and_a_gradient_of_nothing():
    leaf, logits = leaf_and_logits(0, 5, 0)
    logprobs, entropy = chosen_logprobs(logits, torch.zeros(0).long(), temperature=1.0)
    (logprobs.sum() + entropy.sum()).backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == (0, 5)
