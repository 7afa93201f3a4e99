import math

import pytest
import torch
from torch import Tensor

from past_ray.rl.kl import KL_ESTIMATORS, kl_k1, kl_k2, kl_k3, kl_terms
from tests.rl_batches import evaluate, make_batch, settings

P_LOGITS = [0.3, -1.0, 0.8]
Q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
G = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
"""Policy, reference and generator over a vocabulary of three: every mean is a sum of three."""


def policy() -> tuple[Tensor, Tensor]:
    logits = torch.tensor(P_LOGITS, dtype=torch.float64, requires_grad=True)
    return logits, torch.log_softmax(logits, 0)


def divergence_gradients() -> tuple[Tensor, Tensor]:
    """Gradients of KL(p || q) and KL(q || p) by the policy's logits."""
    logits, logprobs = policy()
    reverse = (logprobs.exp() * (logprobs - Q.log())).sum()
    forward = (Q * (Q.log() - logprobs)).sum()
    (reverse_gradient,) = torch.autograd.grad(reverse, logits, retain_graph=True)
    return reverse_gradient, torch.autograd.grad(forward, logits)[0]


def mean_gradient(estimator: str, sampled_from: Tensor, *, is_weighted: bool) -> Tensor:
    """Mean over tokens drawn from a distribution of the penalty's gradient."""
    logits, logprobs = policy()
    terms = kl_terms(
        logprobs,
        ref_logprobs=Q.log(),
        generator_logprobs=sampled_from.log() if is_weighted else None,
        estimator=estimator,
    )
    return torch.autograd.grad((sampled_from * terms).sum(), logits)[0]


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("is_stale", [False, True], ids=["on_policy", "off_policy"])
def test_weighted_gradient_is_exactly_that_of_the_divergence(estimator: str, is_stale: bool):
    sampled_from = G if is_stale else policy()[1].exp().detach()
    ours = mean_gradient(estimator, sampled_from, is_weighted=True)
    torch.testing.assert_close(ours, divergence_gradients()[0])


def test_weighted_gradient_is_that_of_k3_times_a_ratio_that_carries_grad():
    logprobs = torch.tensor([-0.3, -2.0], dtype=torch.float64, requires_grad=True)
    generator, reference = torch.tensor([-0.5, -1.0]), torch.tensor([-1.1, -0.2])
    published = (logprobs - generator).exp() * kl_k3(logprobs, reference)
    (expected,) = torch.autograd.grad(published.sum(), logprobs)
    for estimator in KL_ESTIMATORS:
        terms = kl_terms(
            logprobs, ref_logprobs=reference, generator_logprobs=generator, estimator=estimator
        )
        torch.testing.assert_close(torch.autograd.grad(terms.sum(), logprobs)[0], expected)


@pytest.mark.parametrize(("estimator", "descends"), [("k2", 0), ("k3", 1)])
def test_plain_k2_descends_the_reverse_and_plain_k3_the_forward_divergence(estimator, descends):
    on_policy = policy()[1].exp().detach()
    ours = mean_gradient(estimator, on_policy, is_weighted=False)
    torch.testing.assert_close(ours, divergence_gradients()[descends])


def test_plain_k1_has_no_gradient_on_average():
    ours = mean_gradient("k1", policy()[1].exp().detach(), is_weighted=False)
    torch.testing.assert_close(ours, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_value_is_the_estimator_whatever_the_gradient(estimator: str):
    batch = make_batch()
    values = [
        kl_terms(
            batch["logprobs"],
            ref_logprobs=batch["ref_logprobs"],
            generator_logprobs=generator,
            estimator=estimator,
        )
        for generator in (None, batch["generator_logprobs"])
    ]
    assert torch.equal(*values)
    assert torch.equal(
        values[0], KL_ESTIMATORS[estimator](batch["logprobs"], batch["ref_logprobs"])
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: str):
    logprobs = policy()[1].detach()
    exact = (logprobs.exp() * (logprobs - Q.log())).sum()
    mean = (logprobs.exp() * KL_ESTIMATORS[estimator](logprobs, Q.log())).sum()
    torch.testing.assert_close(mean, exact)


def test_k2_is_biased_but_right_to_second_order():
    logprobs = policy()[1].detach()

    def bias(distance: float) -> float:
        q = (logprobs + distance * torch.tensor([1.0, -1.0, 0.5])).log_softmax(0)
        exact = (logprobs.exp() * (logprobs - q)).sum()
        return (logprobs.exp() * kl_k2(logprobs, q)).sum().item() - exact.item()

    # The divergence is of order distance^2, its bias of order distance^3.
    assert bias(1.0) != 0
    assert bias(0.01) / bias(0.001) == pytest.approx(1000, rel=0.05)


@pytest.mark.parametrize("kl_gradient", ["plain", "importance_weighted"])
def test_descent_pulls_a_token_that_is_too_likely_down_and_one_too_rare_up(kl_gradient: str):
    batch = make_batch()
    kl = {"coefficient": 1.0, "estimator": "k3", "gradient": kl_gradient}
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    _, _, gradient = evaluate(batch, settings("grpo", kl=kl))
    distance = batch["logprobs"] - batch["ref_logprobs"]
    mask = batch["loss_mask"]
    assert torch.equal(gradient[mask].sign(), distance[mask].sign())


def test_estimators_at_a_ratio_of_two():
    ours, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl_k1(ours, reference).item() == pytest.approx(math.log(2))
    assert kl_k2(ours, reference).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(ours, reference).item() == pytest.approx(0.5 - 1 + math.log(2))


def test_k3_is_never_negative_and_zero_only_at_equality():
    log_ratios = torch.arange(-50, 51, dtype=torch.float64) / 10
    values = kl_k3(log_ratios, torch.zeros_like(log_ratios))
    assert (values > 0).tolist() == (log_ratios != 0).tolist()
    assert values[50].item() == 0.0


def test_k3_keeps_its_digits_near_equality_in_float32():
    # exp(r) - 1 - r = r^2 / 2 + O(r^3); exp(r) - 1 alone is wrong by 5 % here.
    value = kl_k3(torch.tensor([0.0]), torch.tensor([1e-3]))
    assert value.item() == pytest.approx(0.5e-6, rel=1e-3)


def test_ref_kl_metric_is_k3_whatever_is_minimised():
    batch = make_batch()
    found = [
        evaluate(batch, settings("grpo", kl={"coefficient": 0.5, "estimator": estimator}))
        for estimator in KL_ESTIMATORS
    ]
    assert len({metrics["ref_kl"].item() for _, metrics, _ in found}) == 1
    assert len({loss.item() for loss, _, _ in found}) == 3
