import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from past_ray.sft.loss import IGNORED, next_token_loss, padded_batch


def test_labels_are_scored_by_the_logits_one_position_before():
    logits = torch.zeros(1, 3, 2)
    logits[0, 0] = torch.tensor([0.0, math.log(3.0)])  # token 1 has probability 3/4
    labels = torch.tensor([[0, 1, IGNORED]])
    loss = next_token_loss(logits, labels=labels, num_loss_tokens=1)
    assert loss.item() == pytest.approx(-math.log(0.75))


def test_the_sum_is_divided_by_the_given_count_and_not_by_the_labels_present():
    logits = torch.zeros(1, 3, 4)
    labels = torch.tensor([[0, 1, 2]])
    loss = next_token_loss(logits, labels=labels, num_loss_tokens=8)
    assert loss.item() == pytest.approx(2 * math.log(4.0) / 8)


def test_a_batch_without_labels_has_zero_loss_and_zero_gradient():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    labels = torch.full((2, 3), IGNORED)
    loss = next_token_loss(logits, labels=labels, num_loss_tokens=5)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_padding_and_prompts_have_no_label_whatever_their_ids():
    input_ids, attention_mask, labels = padded_batch(
        [(7, 0, 7), (5,)], num_prompt_tokens=[1, 0], pad_id=0
    )
    assert input_ids.tolist() == [[7, 0, 7], [5, 0, 0]]
    assert attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [[IGNORED, 0, 7], [5, IGNORED, IGNORED]]


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 3))
def test_micro_batches_add_up_to_the_loss_and_gradient_of_the_whole(split, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (6, 4), generator=generator)
    labels[0, 1] = IGNORED

    def loss_and_gradient(parts):
        leaf = logits.clone().requires_grad_()
        losses = [
            next_token_loss(leaf[part], labels=labels[part], num_loss_tokens=17) for part in parts
        ]
        total = torch.stack(losses).sum()
        total.backward()
        return total, leaf.grad

    whole_loss, whole_gradient = loss_and_gradient([slice(0, 6)])
    loss, gradient = loss_and_gradient([slice(0, split), slice(split, 6)])
    torch.testing.assert_close(loss, whole_loss)
    torch.testing.assert_close(gradient, whole_gradient)
