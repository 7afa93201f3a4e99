import math

import pytest
import torch

from past_ray.config.algorithm import CorrectionConfig
from past_ray.rl.corrections import geometric_mean_ratio, token_ratio, truncated_weights
from tests.rl_batches import ALGORITHMS, Batch, evaluate, make_batch, one_token, settings

LEARNER = {"anchor": "learner"}


def rollouts(*ratios: list[float], advantage: float = 1.0) -> Batch:
    """One rollout per list, with these ratios learner / generator, padded with a ratio of 100."""
    length = max(map(len, ratios))
    mask = torch.tensor([[t < len(row) for t in range(length)] for row in ratios])
    padded = [[*row, *[100.0] * (length - len(row))] for row in ratios]
    return {
        "logprobs": torch.tensor(padded, dtype=torch.float64).log(),
        "generator_logprobs": torch.zeros(mask.shape, dtype=torch.float64),
        "advantages": torch.full(mask.shape, advantage, dtype=torch.float64),
        "loss_mask": mask,
    }


def test_ratio_is_learner_over_generator():
    ratio = token_ratio(torch.tensor([0.6]).log(), generator_logprobs=torch.tensor([0.2]).log())
    assert ratio.item() == pytest.approx(3.0)


def test_weights_are_cut_above_and_never_below():
    ratios = torch.tensor([0.001, 1.0, 1.9, 2.1, 50.0])
    weights, is_truncated = truncated_weights(
        ratios.log(), generator_logprobs=torch.zeros(5), truncate_at=2.0
    )
    torch.testing.assert_close(weights, torch.tensor([0.001, 1.0, 1.9, 2.0, 2.0]))
    assert is_truncated.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_truncated_weight_multiplies_the_reinforce_gradient_of_each_token(algorithm: str):
    batch = make_batch()
    plain = evaluate(batch, settings(algorithm, correction=LEARNER))[2]
    correction = {**LEARNER, "truncate_at": 1.2}
    _, metrics, corrected = evaluate(batch, settings(algorithm, correction=correction))
    ratio = (batch["logprobs"] - batch["generator_logprobs"]).exp()
    torch.testing.assert_close(corrected, plain * ratio.clamp(max=1.2))
    expected = (ratio > 1.2)[batch["loss_mask"]].double().mean()
    assert 0 < expected < 1
    torch.testing.assert_close(metrics["truncated_weight_frac"], expected)


def test_with_its_weight_below_the_bound_the_gradient_of_the_policy_is_unbiased():
    # sum_x g(x) w(x) A(x) grad log p(x) = grad sum_x p(x) A(x), over a vocabulary of three.
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)
    generator = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    weights, _ = truncated_weights(logprobs, generator_logprobs=generator.log(), truncate_at=10.0)
    assert not weights.requires_grad
    ours = (generator * weights * advantages * logprobs).sum()
    exact = (logprobs.exp() * advantages).sum()
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits, retain_graph=True),
        torch.autograd.grad(exact, logits),
    )


def test_the_penalty_keeps_its_own_weight_beside_a_truncated_policy():
    batch = {**one_token(8.0, 1.0), "ref_logprobs": torch.zeros(1, 1, dtype=torch.float64)}
    kl = {"coefficient": 1.0}
    rl = settings("grpo", kl=kl, correction={**LEARNER, "truncate_at": 2.0})
    # Policy: -2 * A. Penalty: ratio 8 times log(p / q) = log 8, uncut, or it would be biased.
    assert evaluate(batch, rl)[2].item() == pytest.approx(-2 + 8 * math.log(8))


def test_sequence_ratio_is_the_mean_of_logs_so_that_length_does_not_collapse_it():
    # A thousand ratios of 0.999: their product is 0.37, their geometric mean 0.999.
    batch = rollouts([0.999] * 1000, [4.0, 1.0])
    ratio = geometric_mean_ratio(
        batch["logprobs"],
        generator_logprobs=batch["generator_logprobs"],
        loss_mask=batch["loss_mask"],
    )
    torch.testing.assert_close(ratio, torch.tensor([[0.999], [2.0]]).double())


def test_row_without_loss_tokens_has_ratio_one():
    ratio = geometric_mean_ratio(
        torch.full((1, 2), math.nan),
        generator_logprobs=torch.zeros(1, 2),
        loss_mask=torch.zeros(1, 2, dtype=torch.bool),
    )
    assert ratio.item() == 1.0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rollout_outside_the_bounds_does_not_train_and_still_counts(algorithm: str):
    batch = rollouts([0.7, 0.8], [1.05, 1.05], [1.0, 2.0, 1.9])
    batch["ref_logprobs"] = batch["logprobs"] - 0.5
    others = {"kl": {"coefficient": 0.3}, "entropy_coefficient": 0.1}
    correction = {"min_sequence_ratio": 0.9, "max_sequence_ratio": 1.2}
    free = evaluate(batch, settings(algorithm, **others))[2]
    _, metrics, masked = evaluate(batch, settings(algorithm, correction=correction, **others))
    assert torch.equal(masked[[0, 2]], torch.zeros(2, 3).double())
    # Unchanged, not scaled up: the denominators are those of all three.
    assert torch.equal(masked[1], free[1])
    assert masked[1].any()
    assert metrics["masked_sequence_frac"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("bound", "trains"),
    [
        ({"min_sequence_ratio": 0.9}, [False, True]),
        ({"max_sequence_ratio": 1.2}, [True, False]),
        ({}, [True, True]),
    ],
)
def test_each_bound_acts_alone(bound, trains: list[bool]):
    batch = rollouts([0.5], [2.0], advantage=1.0)
    correction = {**LEARNER, **bound}
    _, metrics, gradient = evaluate(batch, settings("grpo", correction=correction))
    assert gradient.bool().flatten().tolist() == trains
    assert ("masked_sequence_frac" in metrics) == bool(bound)


def test_weights_with_the_generators_anchor_would_correct_twice_and_are_refused():
    with pytest.raises(ValueError, match="correct the same gap twice"):
        CorrectionConfig(anchor="generator", truncate_at=2.0)


def test_padding_is_never_counted_as_truncated():
    # Padding has a ratio of 1, which a bound below 1 would cut.
    correction = {**LEARNER, "truncate_at": 0.5}
    _, metrics, _ = evaluate(rollouts([0.4], [0.6, 0.4]), settings("grpo", correction=correction))
    assert metrics["truncated_weight_frac"].item() == pytest.approx(1 / 3)
