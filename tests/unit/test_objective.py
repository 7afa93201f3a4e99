import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from past_ray.config.algorithm import CorrectionConfig, KLConfig
from past_ray.rl.metrics import merge_metrics
from past_ray.rl.objective import StepTotals, count_totals, rl_loss
from past_ray.rl.types import TrainSample
from tests.rl_batches import (
    ALGORITHMS,
    TOKEN_LIMIT,
    evaluate,
    make_batch,
    on_policy,
    one_token,
    settings,
    totals_of,
)

KL = KLConfig(coefficient=0.3)
LEARNER_ANCHOR = CorrectionConfig(anchor="learner", truncate_at=1.1)
MASKING = CorrectionConfig(min_sequence_ratio=0.9, max_sequence_ratio=1.1)
EVERYTHING = {
    "kl": KL,
    "entropy_coefficient": 0.1,
    "correction": LEARNER_ANCHOR.model_copy(update=MASKING.model_dump(exclude_defaults=True)),
}
VARIANTS = [
    {},
    {"kl": KL},
    {"kl": KLConfig(coefficient=0.3, gradient="plain")},
    {"correction": LEARNER_ANCHOR},
    {"correction": MASKING},
    EVERYTHING,
]
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "+".join(v) or "plain")


def weight_of_tokens(algorithm: str, loss_mask: torch.Tensor) -> torch.Tensor:
    """What one token of each row weighs, by the definition of the algorithm's mean."""
    per_row = loss_mask.sum(dim=1, keepdim=True).double()
    num_rollouts = int(loss_mask.any(dim=1).sum())
    if algorithm == "gspo":
        weight = 1 / (per_row.clamp(min=1) * num_rollouts)
    elif algorithm == "dr_grpo":
        weight = torch.full_like(per_row, 1 / (num_rollouts * TOKEN_LIMIT))
    else:
        weight = torch.full_like(per_row, 1 / float(loss_mask.sum()))
    return torch.where(loss_mask, weight, 0.0)


@every_algorithm
@pytest.mark.parametrize("anchor", ["generator", "learner"])
def test_on_policy_gradient_equals_reinforce(algorithm: str, anchor: str):
    batch = on_policy(make_batch())
    _, _, gradient = evaluate(batch, settings(algorithm, correction={"anchor": anchor}))
    weight = weight_of_tokens(algorithm, batch["loss_mask"])
    torch.testing.assert_close(gradient, -weight * batch["advantages"])


@every_algorithm
def test_on_the_learners_own_anchor_the_gradient_is_reinforce_however_old_the_tokens(
    algorithm: str,
):
    batch = make_batch()
    _, metrics, gradient = evaluate(batch, settings(algorithm, correction={"anchor": "learner"}))
    weight = weight_of_tokens(algorithm, batch["loss_mask"])
    torch.testing.assert_close(gradient, -weight * batch["advantages"])
    assert metrics["clip_frac"].item() == 0.0


@every_algorithm
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_descent_makes_good_tokens_likelier_and_bad_ones_rarer(algorithm: str, advantage: float):
    _, _, gradient = evaluate(one_token(1.0, advantage), settings(algorithm))
    assert math.copysign(1, -gradient.item()) == math.copysign(1, advantage)


@every_algorithm
def test_group_without_advantage_has_no_policy_gradient_but_keeps_its_penalty(algorithm: str):
    batch = make_batch()
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    _, _, without_penalty = evaluate(batch, settings(algorithm))
    _, _, with_penalty = evaluate(batch, settings(algorithm, kl=KL))
    assert torch.equal(without_penalty, torch.zeros_like(without_penalty))
    assert ((with_penalty != 0) == batch["loss_mask"]).all()


@every_algorithm
@every_variant
@given(split=st.lists(st.integers(0, 3), min_size=5, max_size=5), seed=st.integers(0, 99))
@hypothesis_settings(max_examples=15, deadline=None)
def test_micro_batches_add_up_to_the_full_batch(algorithm: str, variant, split, seed: int):
    rl, batch = settings(algorithm, **variant), make_batch(seed)
    totals = totals_of(batch["loss_mask"])
    loss, metrics, gradient = evaluate(batch, rl, totals)
    summed, parts = torch.zeros_like(gradient), []
    for part in set(split):
        rows = torch.tensor(split) == part
        _, part_metrics, summed[rows] = evaluate(
            {name: value[rows] for name, value in batch.items()}, rl, totals
        )
        parts.append({name: value.item() for name, value in part_metrics.items()})
    torch.testing.assert_close(summed, gradient)
    merged = merge_metrics(parts)
    assert merged == pytest.approx({name: value.item() for name, value in metrics.items()})
    assert merged["loss"] == pytest.approx(loss.item())


@every_algorithm
@every_variant
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_garbage_cannot_reach_the_loss_or_its_gradient(algorithm, variant, garbage: float):
    rl, batch = settings(algorithm, **variant), make_batch()
    clean_loss, clean_metrics, clean_gradient = evaluate(batch, rl)
    for name in set(batch) - {"loss_mask"}:
        dirty = {**batch, name: torch.where(batch["loss_mask"], batch[name], garbage)}
        loss, metrics, gradient = evaluate(dirty, rl)
        assert torch.equal(loss, clean_loss)
        assert torch.equal(gradient, clean_gradient)
        assert metrics == clean_metrics


@every_algorithm
@every_variant
def test_micro_batch_without_loss_tokens_adds_nothing(algorithm: str, variant):
    batch = make_batch()
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    totals = StepTotals(num_loss_tokens=3, num_rollouts=1, rollout_token_limit=TOKEN_LIMIT)
    _, metrics, gradient = evaluate(batch, settings(algorithm, **variant), totals)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert set(map(float, metrics.values())) == {0.0}


@every_algorithm
def test_order_of_rollouts_and_padding_change_nothing(algorithm: str):
    rl, batch = settings(algorithm, **EVERYTHING), make_batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = {name: torch.nn.functional.pad(value[order], (0, 3)) for name, value in batch.items()}
    loss, _, gradient = evaluate(batch, rl)
    moved_loss, _, moved_gradient = evaluate(moved, rl)
    torch.testing.assert_close(moved_loss, loss)
    torch.testing.assert_close(moved_gradient[:, :7], gradient[order])


@every_algorithm
@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
def test_extreme_ratios_stay_finite(algorithm: str, log_ratio: float):
    batch = one_token(1.0, -1.0)
    batch["logprobs"] = torch.full((1, 1), log_ratio, dtype=torch.float64)
    batch["ref_logprobs"] = torch.zeros(1, 1, dtype=torch.float64)
    for estimator in ("k1", "k2", "k3"):
        for gradient in ("plain", "importance_weighted"):
            kl = KLConfig(estimator=estimator, gradient=gradient)
            for value in evaluate(batch, settings(algorithm, kl=kl))[::2]:
                assert torch.isfinite(value).all()


@every_algorithm
def test_nan_on_a_token_that_trains_reaches_the_loss(algorithm: str):
    batch = make_batch()
    batch["generator_logprobs"][0, 0] = math.nan
    assert evaluate(batch, settings(algorithm, correction=MASKING))[0].isnan()


def test_penalty_is_weighted_and_counted_as_the_policy_is():
    batch = make_batch()
    for algorithm in ALGORITHMS:
        with_penalty, metrics, _ = evaluate(batch, settings(algorithm, kl=KL))
        without, _, _ = evaluate(batch, settings(algorithm))
        log_ratio = batch["ref_logprobs"] - batch["logprobs"]
        k3 = log_ratio.exp() - 1 - log_ratio
        weight = weight_of_tokens(algorithm, batch["loss_mask"])
        torch.testing.assert_close(with_penalty - without, 0.3 * (weight * k3).sum())
        torch.testing.assert_close(metrics["ref_kl"], k3[batch["loss_mask"]].mean())


def test_descent_raises_the_entropy_and_its_coefficient_scales_it():
    batch = make_batch()
    entropy = batch["entropy"].requires_grad_()
    loss, metrics = rl_loss(
        batch["logprobs"],
        generator_logprobs=batch["generator_logprobs"],
        advantages=batch["advantages"],
        loss_mask=batch["loss_mask"],
        ref_logprobs=None,
        entropy=entropy,
        totals=totals_of(batch["loss_mask"]),
        rl=settings("grpo", entropy_coefficient=0.1),
    )
    (gradient,) = torch.autograd.grad(loss, entropy)
    torch.testing.assert_close(gradient, -0.1 * weight_of_tokens("grpo", batch["loss_mask"]))
    torch.testing.assert_close(metrics["entropy"], entropy[batch["loss_mask"]].mean().detach())


def test_entropy_is_reported_but_not_minimised_at_coefficient_zero():
    batch = make_batch()
    loss, _, _ = evaluate(batch, settings("grpo"))
    del batch["entropy"]
    assert torch.equal(loss, evaluate(batch, settings("grpo"))[0])


def test_metrics_are_detached_and_describe_the_gap_to_the_generator():
    batch = make_batch()
    _, metrics, _ = evaluate(batch, settings("grpo", kl=KL))
    ratio = (batch["logprobs"] - batch["generator_logprobs"])[batch["loss_mask"]].exp()
    assert not any(value.requires_grad for value in metrics.values())
    torch.testing.assert_close(metrics["ratio_mean"], ratio.mean())
    torch.testing.assert_close(metrics["ratio_max"], ratio.max())
    # Tokens come from the generator, so KL(generator || learner) is what k3 estimates from them.
    torch.testing.assert_close(metrics["generator_kl"], (ratio - 1 - ratio.log()).mean())


def test_totals_count_tokens_and_the_rollouts_that_have_any():
    def sample(loss_mask: list[bool]) -> TrainSample:
        zeros = [0.0] * len(loss_mask)
        return TrainSample(
            token_ids=[5] * len(loss_mask),
            loss_mask=loss_mask,
            generator_logprobs=zeros,
            advantages=zeros,
        )

    samples = [sample([False, True, True]), sample([False, True]), sample([False, False])]
    assert count_totals(samples, rollout_token_limit=8) == StepTotals(
        num_loss_tokens=3, num_rollouts=2, rollout_token_limit=8
    )
