import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from past_ray.rl.losses import (
    KL_ESTIMATORS,
    MAX_LOG_RATIO,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_penalty,
    ppo_clip_loss,
    token_mean,
)

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def make_batch(seed: int = 0, shape: tuple[int, int] = (5, 7)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs = -normal().abs()
    return {
        "logprobs": logprobs,
        "generator_logprobs": logprobs + 0.3 * normal(),
        "ref_logprobs": logprobs + 0.3 * normal(),
        "advantages": normal(),
        "loss_mask": torch.rand(*shape, generator=generator) < 0.6,
    }


def policy_loss(batch: dict[str, Tensor], num_loss_tokens: int) -> Tensor:
    values = {name: value for name, value in batch.items() if name != "ref_logprobs"}
    logprobs = values.pop("logprobs")
    return ppo_clip_loss(logprobs, **values, num_loss_tokens=num_loss_tokens, **CLIP)[0]


def penalty_loss(batch: dict[str, Tensor], num_loss_tokens: int, estimator: str = "k3") -> Tensor:
    names = ("ref_logprobs", "loss_mask")
    return kl_penalty(
        batch["logprobs"],
        **{name: batch[name] for name in names},
        num_loss_tokens=num_loss_tokens,
        estimator=estimator,
    )[0]


def squared_penalty_loss(batch: dict[str, Tensor], num_loss_tokens: int) -> Tensor:
    return penalty_loss(batch, num_loss_tokens, "k2")


def gradient(loss_function, batch: dict[str, Tensor], num_loss_tokens: int) -> Tensor:
    logprobs = batch["logprobs"].clone().requires_grad_()
    loss_function({**batch, "logprobs": logprobs}, num_loss_tokens).backward()
    assert logprobs.grad is not None
    return logprobs.grad


def one_token(log_ratio: float, advantage: float) -> dict[str, Tensor]:
    return {
        "logprobs": torch.tensor([[log_ratio]]),
        "generator_logprobs": torch.zeros(1, 1),
        "advantages": torch.tensor([[advantage]]),
        "loss_mask": torch.ones(1, 1, dtype=torch.bool),
    }


def test_on_policy_gradient_equals_reinforce():
    batch = make_batch()
    batch["generator_logprobs"] = batch["logprobs"]
    expected = torch.where(batch["loss_mask"], -batch["advantages"] / 11, 0.0)
    torch.testing.assert_close(gradient(policy_loss, batch, 11), expected)


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
def test_surrogate_is_the_lower_of_clipped_and_unclipped(
    ratio: float, advantage: float, expected: float
):
    batch = one_token(math.log(ratio), advantage)
    assert policy_loss(batch, 1).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.5, 1.0), (0.5, -1.0)])
def test_clipped_token_has_zero_gradient_and_is_counted(ratio: float, advantage: float):
    batch = one_token(math.log(ratio), advantage)
    assert gradient(policy_loss, batch, 1).item() == 0.0
    logprobs = batch.pop("logprobs")
    _, metrics = ppo_clip_loss(logprobs, **batch, num_loss_tokens=1, **CLIP)
    assert metrics["clip_frac"].item() == 1.0
    assert metrics["ratio_max"].item() == pytest.approx(ratio)


@pytest.mark.parametrize("loss_function", [policy_loss, penalty_loss, squared_penalty_loss])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_garbage_cannot_reach_the_loss_or_its_gradient(loss_function, garbage: float):
    batch = make_batch()
    clean_loss = loss_function(batch, 11)
    clean_gradient = gradient(loss_function, batch, 11)
    for name in ("logprobs", "generator_logprobs", "ref_logprobs", "advantages"):
        dirty = {**batch, name: torch.where(batch["loss_mask"], batch[name], garbage)}
        assert torch.equal(loss_function(dirty, 11), clean_loss)
        assert torch.equal(gradient(loss_function, dirty, 11), clean_gradient)


@pytest.mark.parametrize("loss_function", [policy_loss, penalty_loss])
def test_empty_mask_gives_zero_loss_and_zero_gradient(loss_function):
    batch = make_batch()
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    assert loss_function(batch, 3).item() == 0.0
    assert torch.equal(gradient(loss_function, batch, 3), torch.zeros(5, 7).double())


@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
def test_extreme_ratios_stay_finite(log_ratio: float):
    batch = one_token(log_ratio, -1.0)
    assert policy_loss(batch, 1).item() <= math.exp(MAX_LOG_RATIO) * 1.001
    assert torch.isfinite(gradient(policy_loss, batch, 1)).all()
    batch["ref_logprobs"] = batch["generator_logprobs"]
    for estimator in KL_ESTIMATORS:
        assert torch.isfinite(penalty_loss(batch, 1, estimator))


@pytest.mark.parametrize("loss_function", [policy_loss, penalty_loss])
@given(split=st.lists(st.integers(0, 3), min_size=5, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_micro_batches_add_up_to_the_full_batch(loss_function, split: list[int], seed: int):
    batch = make_batch(seed)
    num_loss_tokens = int(batch["loss_mask"].sum()) or 1
    part_of = torch.tensor(split)
    loss = torch.zeros((), dtype=torch.float64)
    grad = torch.zeros(5, 7, dtype=torch.float64)
    for part in set(split):
        rows = part_of == part
        micro = {name: value[rows] for name, value in batch.items()}
        loss += loss_function(micro, num_loss_tokens)
        grad[rows] = gradient(loss_function, micro, num_loss_tokens)
    torch.testing.assert_close(loss, loss_function(batch, num_loss_tokens))
    torch.testing.assert_close(grad, gradient(loss_function, batch, num_loss_tokens))


def test_unequal_micro_batches_differ_from_the_mean_of_their_means():
    # Rows of 1 and 3 tokens with values 4 and 0: token mean 1, mean of means 2.
    values = torch.tensor([[4.0, 0, 0], [0, 0, 0]])
    loss_mask = torch.tensor([[True, False, False], [True, True, True]])
    parts = [token_mean(values[[i]], loss_mask=loss_mask[[i]], num_loss_tokens=4) for i in (0, 1)]
    assert sum(parts).item() == 1.0


@pytest.mark.parametrize("loss_function", [policy_loss, penalty_loss])
def test_permuting_sequences_changes_nothing(loss_function):
    batch = make_batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = {name: value[order] for name, value in batch.items()}
    torch.testing.assert_close(loss_function(permuted, 11), loss_function(batch, 11))


@pytest.mark.parametrize("loss_function", [policy_loss, penalty_loss])
def test_padding_changes_nothing(loss_function):
    batch = make_batch()
    padded = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()}
    torch.testing.assert_close(loss_function(padded, 11), loss_function(batch, 11))


def test_metrics_are_detached_and_means_add_up():
    batch = make_batch()
    del batch["ref_logprobs"]
    logprobs = batch.pop("logprobs").requires_grad_()
    num_loss_tokens = int(batch["loss_mask"].sum())
    _, metrics = ppo_clip_loss(logprobs, **batch, num_loss_tokens=num_loss_tokens, **CLIP)
    ratio = (logprobs - batch["generator_logprobs"])[batch["loss_mask"]].exp()
    assert not any(value.requires_grad for value in metrics.values())
    torch.testing.assert_close(metrics["ratio_mean"], ratio.mean())
    torch.testing.assert_close(metrics["ratio_max"], ratio.max())
    torch.testing.assert_close(metrics["generator_kl"], (ratio - 1 - ratio.log()).mean())


def test_estimators_at_a_ratio_of_two():
    policy, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl_k1(policy, reference).item() == pytest.approx(math.log(2))
    assert kl_k2(policy, reference).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(policy, reference).item() == pytest.approx(0.5 - 1 + math.log(2))


def expected_gradient(estimator: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact mean over tokens of the penalty's value and gradient, for one categorical policy.

    Returns the value, the gradient by logits and the gradients of KL(p || q) and KL(q || p).
    """
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    logprobs = torch.log_softmax(logits, 0)
    p = logprobs.exp()
    values = KL_ESTIMATORS[estimator](logprobs, q.log())
    (grad,) = torch.autograd.grad((p.detach() * values).sum(), logits, retain_graph=True)
    reverse = (p * (logprobs - q.log())).sum()
    forward = (q * (q.log() - logprobs)).sum()
    (reverse_grad,) = torch.autograd.grad(reverse, logits, retain_graph=True)
    (forward_grad,) = torch.autograd.grad(forward, logits)
    return (p * values).sum().detach() - reverse.detach(), grad, reverse_grad, forward_grad


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: str):
    bias, *_ = expected_gradient(estimator)
    assert abs(bias.item()) < 1e-12


def test_k1_as_a_loss_has_no_gradient_on_average():
    _, grad, _, _ = expected_gradient("k1")
    torch.testing.assert_close(grad, torch.zeros(3).double())


def test_k2_as_a_loss_descends_the_reverse_divergence():
    _, grad, reverse_grad, _ = expected_gradient("k2")
    torch.testing.assert_close(grad, reverse_grad)


def test_k3_as_a_loss_descends_the_forward_divergence():
    _, grad, _, forward_grad = expected_gradient("k3")
    torch.testing.assert_close(grad, forward_grad)


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
    values = {
        estimator: kl_penalty(
            batch["logprobs"],
            ref_logprobs=batch["ref_logprobs"],
            loss_mask=batch["loss_mask"],
            num_loss_tokens=11,
            estimator=estimator,
        )
        for estimator in KL_ESTIMATORS
    }
    assert len({metrics["ref_kl"].item() for _, metrics in values.values()}) == 1
    assert values["k3"][0].item() == values["k1"][1]["ref_kl"].item()
    assert values["k1"][0].item() != values["k3"][0].item()
