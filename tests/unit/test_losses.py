import math

import pytest
import torch

from past_ray.config.algorithm import CISPOConfig, DAPOConfig, DrGRPOConfig, GRPOConfig, GSPOConfig
from past_ray.rl.corrections import MAX_LOG_RATIO
from past_ray.rl.losses import (
    cispo_terms,
    clipped_terms,
    constant_mean,
    rollout_mean,
    sequence_clipped_terms,
    token_mean,
)
from tests.rl_batches import evaluate, one_token, settings

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, 1.0, -1.3),  # gain is capped at 1 + clip_high
        (0.5, 1.0, -0.5),  # a loss of probability of a good token is not
        (0.5, -1.0, 0.8),  # relief is capped at 1 - clip_low
        (1.5, -1.0, 1.5),  # a gain of probability of a bad token is not
        (1.1, 2.0, -2.2),  # inside the clip nothing happens
    ],
)
def test_surrogate_is_the_lower_of_clipped_and_unclipped(ratio, advantage, expected):
    terms, _ = clipped_terms(
        row(ratio).log(), anchor_logprobs=row(0), advantages=row(advantage), **CLIP
    )
    assert terms.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "algorithm", [GRPOConfig(), DrGRPOConfig(), DAPOConfig(), GSPOConfig()], ids=lambda a: a.kind
)
@pytest.mark.parametrize(("ratio", "advantage"), [(1.5, 1.0), (0.5, -1.0)])
def test_clipped_token_has_zero_gradient_and_is_counted(algorithm, ratio, advantage):
    rl = settings(algorithm)
    _, metrics, gradient = evaluate(one_token(ratio, advantage), rl)
    assert gradient.item() == 0.0
    assert metrics["clip_frac"].item() == 1.0
    assert metrics["ratio_max"].item() == pytest.approx(ratio)


def test_clip_higher_lets_a_ratio_of_one_and_a_quarter_train_in_dapo_only():
    batch = one_token(1.25, 1.0)
    assert evaluate(batch, settings("dapo"))[2].item() == pytest.approx(-1.25)
    assert evaluate(batch, settings("grpo"))[2].item() == 0.0


def test_gspo_ratio_is_the_geometric_mean_and_not_the_product():
    # Ratios 4 and 1 of two tokens: mean sqrt(4) = 2, product 4. Padding changes neither.
    terms, is_clipped = sequence_clipped_terms(
        row(4, 1, 1).log(),
        anchor_logprobs=row(0, 0, 0),
        advantages=row(-1, -1, 0),
        loss_mask=torch.tensor([[True, True, False]]),
        **CLIP,
    )
    torch.testing.assert_close(terms, row(2, 2, 0))
    assert not is_clipped.any()


def test_gspo_gradient_is_that_of_the_clipped_sequence_objective():
    logprobs = row(0.3, -0.1, 0.2).requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    anchor, advantage = row(0.2, 0.0, 0.1), 1.7
    terms, _ = sequence_clipped_terms(
        logprobs,
        anchor_logprobs=anchor,
        advantages=row(*[advantage] * 3),
        loss_mask=mask,
        **CLIP,
    )
    (ours,) = torch.autograd.grad(rollout_mean(terms, loss_mask=mask, num_rollouts=1), logprobs)
    ratio = (logprobs - anchor).mean().exp()
    (expected,) = torch.autograd.grad(-advantage * ratio, logprobs)
    torch.testing.assert_close(ours, expected)


def test_gspo_clips_all_tokens_of_a_rollout_or_none():
    batch = {
        "logprobs": row(0.4, -0.1),  # mean ratio exp(0.15), past 1 + 0.15
        "generator_logprobs": row(0, 0),
        "advantages": row(1, 1),
        "loss_mask": torch.tensor([[True, True]]),
    }
    _, metrics, gradient = evaluate(batch, settings("gspo"))
    assert metrics["clip_frac"].item() == 1.0
    assert gradient.tolist() == [[0.0, 0.0]]
    assert evaluate(batch, settings("grpo"))[1]["clip_frac"].item() == 0.5


@pytest.mark.parametrize(("ratio", "weight"), [(3.0, 3.0), (9.0, 5.0), (0.01, 0.01)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_bounds_the_weight_and_keeps_the_gradient(ratio, weight, advantage):
    rl = settings(CISPOConfig(max_ratio=5.0))
    _, metrics, gradient = evaluate(one_token(ratio, advantage), rl)
    assert gradient.item() == pytest.approx(-weight * advantage)
    assert metrics["clip_frac"].item() == (ratio > 5)


def test_cispo_value_is_the_weighted_log_likelihood():
    terms, _ = cispo_terms(
        row(-2.0), anchor_logprobs=row(-2.0 - math.log(3)), advantages=row(0.5), max_ratio=2.0
    )
    assert terms.item() == pytest.approx(-2.0 * 0.5 * -2.0)


def test_ratios_are_bounded_before_they_overflow():
    terms, _ = clipped_terms(row(1e4), anchor_logprobs=row(0), advantages=row(-1.0), **CLIP)
    assert terms.item() == pytest.approx(math.exp(MAX_LOG_RATIO))


def test_three_means_of_rows_of_one_and_three_tokens():
    # Row of one token with term 4, row of three with terms 1, 1, 2.
    terms = torch.tensor([[4.0, 0, 0], [1, 1, 2]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    assert token_mean(terms, 4).item() == 8 / 4
    assert rollout_mean(terms, loss_mask=mask, num_rollouts=2).item() == pytest.approx(8 / 3)
    assert constant_mean(terms, num_rollouts=2, rollout_token_limit=5).item() == pytest.approx(0.8)


def test_unequal_micro_batches_differ_from_the_mean_of_their_means():
    # Rows of 1 and 3 tokens with values 4 and 0: token mean 1, mean of means 2.
    parts = [torch.tensor([[4.0]]), torch.tensor([[0.0, 0, 0]])]
    assert sum(token_mean(part, 4).item() for part in parts) == 1.0


def test_in_dr_grpo_a_long_wrong_answer_costs_each_token_as_much_as_a_short_one():
    def gradient(algorithm: str, length: int) -> float:
        shape = (1, length)
        batch = {
            "logprobs": torch.zeros(shape),
            "generator_logprobs": torch.zeros(shape),
            "advantages": -torch.ones(shape),
            "loss_mask": torch.ones(shape, dtype=torch.bool),
        }
        return evaluate(batch, settings(algorithm))[2][0, 0].item()

    assert gradient("dr_grpo", 8) == gradient("dr_grpo", 2)
    assert gradient("gspo", 8) == pytest.approx(gradient("gspo", 2) / 4)
