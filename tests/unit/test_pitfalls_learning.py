"""Known pitfalls of RL systems, those of the numbers that train: real learners and the real loss.

Each test is named after the pitfall's number: 1 mismatch, 3 aggregation, 7 end of sequence,
8 groups without spread, 10 gradient of the KL penalty, 11 masters in 16 bit, 12 padding.
"""

import pytest
import torch
from pydantic import ValidationError

from past_ray.config.rl import RLConfig
from past_ray.engine.generator_checks import eos_token_ids
from past_ray.engine.packing import pack_samples
from past_ray.errors import DataError
from past_ray.rl.batching import build_train_samples, is_constant_group
from past_ray.rl.metrics import rollout_metrics
from past_ray.rl.objective import StepTotals, count_totals, rl_loss
from past_ray.rl.types import Completion, Rollout, RolloutGroup, RolloutStatus, Turn
from past_ray.skill.checkpoint import load_weights
from tests import tiny_learner
from tests.rl_batches import ALGORITHMS, evaluate, make_batch, settings, totals_of
from tests.tiny_learner import assert_same, make_learner, make_samples, plain_logprobs, step
from tests.tiny_model import SPECIAL_TOKENS

checkpoint = tiny_learner.checkpoint_fixture

EOS = SPECIAL_TOKENS.index("<eos>")


def completed(
    reward: float, token_ids: list[int], *, finish_reason: str = "stop", index: int = 0
) -> Rollout:
    """Return a rollout of one turn with the prompt ``[3, 6, 4]``."""
    sampled = Completion(
        token_ids=token_ids,
        logprobs=[-1.0] * len(token_ids),
        finish_reason=finish_reason,
        policy_version=0,
    )
    return Rollout(
        rollout_id=f"0/q/{index}",
        turns=[Turn(prompt_ids=[3, 6, 4], completion=sampled, reward=reward)],
        answer="",
        reward=reward,
        status=RolloutStatus.COMPLETED,
        policy_version=0,
    )


def group_of(rewards: list[float]) -> RolloutGroup:
    rollouts = [completed(reward, [7 + i, EOS], index=i) for i, reward in enumerate(rewards)]
    return RolloutGroup(question_id="q", rollouts=rollouts)


# 1. Mismatch between the log-probabilities of generator and learner


def test_pitfall_01_the_learner_scores_at_the_temperature_that_sampled(checkpoint):
    sample = make_samples()[2]
    scored = make_learner(checkpoint, temperature=0.6).token_logprobs([sample])[0]
    assert scored == pytest.approx(plain_logprobs(checkpoint, sample, 0.6).tolist(), abs=1e-4)
    assert scored != pytest.approx(plain_logprobs(checkpoint, sample, 1.0).tolist(), abs=0.1)


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p"])
def test_pitfall_01_sampling_cannot_be_truncated(name):
    with pytest.raises(ValidationError, match=name):
        RLConfig.model_validate({name: 0.8})


def test_pitfall_01_a_long_rollout_is_judged_by_the_mean_of_its_log_ratios_not_by_their_sum():
    batch = {
        "logprobs": torch.full((1, 1000), -1.001, dtype=torch.float64),
        "generator_logprobs": torch.full((1, 1000), -1.0, dtype=torch.float64),
        "advantages": torch.ones(1, 1000, dtype=torch.float64),
        "loss_mask": torch.ones(1, 1000, dtype=torch.bool),
    }
    bounds = settings("grpo", correction={"min_sequence_ratio": 0.9})
    assert evaluate(batch, bounds)[1]["masked_sequence_frac"] == 0
    batch["logprobs"] = torch.full((1, 1000), -1.2, dtype=torch.float64)
    assert evaluate(batch, bounds)[1]["masked_sequence_frac"] == 1


# 3. Loss aggregation over micro-batches and ranks


@pytest.mark.parametrize("name", ALGORITHMS)
def test_pitfall_03_uneven_parts_add_up_to_the_gradient_of_the_whole_step(name):
    batch = make_batch()
    rl, totals = settings(name, kl={"coefficient": 0.1}), totals_of(batch["loss_mask"])
    whole = evaluate(batch, rl, totals)[2]
    rows = [slice(0, 1), slice(1, 5)]
    parts = [{key: value[part] for key, value in batch.items()} for part in rows]
    assert parts[0]["loss_mask"].sum() != parts[1]["loss_mask"].sum()
    added = torch.cat([evaluate(part, rl, totals)[2] for part in parts])
    torch.testing.assert_close(added, whole, atol=1e-12, rtol=0)
    # An average of averages is something else, so the test can tell.
    own = torch.cat([evaluate(part, rl, totals_of(part["loss_mask"]))[2] for part in parts]) / 2
    assert (own - whole).abs().max() > 1e-3


def test_pitfall_03_loss_and_gradient_do_not_depend_on_the_micro_batch_budget(checkpoint):
    samples = make_samples()
    assert [len(pack_samples(samples, max_tokens=n)) for n in (12, 4096)] == [3, 1]
    learners = [make_learner(checkpoint, max_tokens_per_micro_batch=n) for n in (12, 4096)]
    small, whole = (step(learner, samples) for learner in learners)
    assert small == pytest.approx(whole, rel=1e-5)
    assert whole["grad_norm"] > 0


def test_pitfall_03_counts_of_a_part_of_the_step_are_refused_as_denominators(checkpoint):
    samples = make_samples()
    with pytest.raises(DataError, match="totals must count the samples of all ranks"):
        make_learner(checkpoint).train_step(
            samples, totals=count_totals(samples[:2], rollout_token_limit=8)
        )


def test_pitfall_03_dr_grpo_divides_by_the_token_limit_whatever_the_lengths():
    batch, rl = make_batch(), settings("dr_grpo")
    totals = totals_of(batch["loss_mask"])
    doubled = StepTotals(
        num_loss_tokens=totals.num_loss_tokens,
        num_rollouts=totals.num_rollouts,
        rollout_token_limit=2 * totals.rollout_token_limit,
    )
    torch.testing.assert_close(
        evaluate(batch, rl, doubled)[2] * 2, evaluate(batch, rl, totals)[2], atol=1e-15, rtol=0
    )


# 7. End of sequence and padding


def test_pitfall_07_the_end_of_sequence_trains_like_any_token_also_if_it_pads(checkpoint):
    group = RolloutGroup(
        question_id="q", rollouts=[completed(1.0, [7, EOS]), completed(0.0, [8, 9, 0, EOS])]
    )
    samples = build_train_samples([group], rl=settings("grpo"))
    assert [sum(sample.loss_mask) for sample in samples] == [2, 4]
    assert [sample.loss_mask[-1] for sample in samples] == [True, True]
    learner = make_learner(checkpoint, learning_rate=1e-3)
    samples = tiny_learner.on_policy(learner, samples)
    assert step(learner, samples)["num_loss_tokens"] == 6
    for sample, row in zip(samples, learner.token_logprobs(samples), strict=True):
        moved = row[-1] - sample.generator_logprobs[-1]
        assert moved * sample.advantages[-1] > 0


def test_pitfall_07_every_end_of_sequence_of_a_chat_model_ends_a_completion(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    assert eos_token_ids(tmp_path) == [1, 5]


def test_pitfall_07_a_cut_completion_trains_to_its_last_token_and_is_counted():
    cut = completed(1.0, [7, 8, 9], finish_reason="length")
    group = RolloutGroup(question_id="q", rollouts=[cut, completed(0.0, [7, EOS], index=1)])
    sample = build_train_samples([group], rl=settings("grpo"))[0]
    assert sample.loss_mask == [False, False, False, True, True, True]
    assert rollout_metrics([group])["truncated_frac"] == 0.5


# 8. Groups without spread


def test_pitfall_08_equal_continuous_rewards_have_no_advantage_and_close_ones_have():
    # Their mean is not 0.1 in binary, so their deviation is not 0.
    equal, close = group_of([0.1] * 7), group_of([0.1] * 6 + [0.1 + 1e-9])
    rl = settings("grpo")
    assert is_constant_group(equal, rl=rl)
    assert build_train_samples([equal], rl=rl) == []
    assert not is_constant_group(close, rl=rl)
    assert len(build_train_samples([close], rl=rl)) == 7


def test_pitfall_08_dropped_groups_are_in_no_denominator_and_kept_ones_have_exact_zeros():
    groups = [group_of([0.3] * 3), group_of([0.0, 1.0, 0.5])]
    dropped = build_train_samples(groups, rl=settings("dapo"))
    assert count_totals(dropped, rollout_token_limit=8).num_loss_tokens == 3 * 2
    # A KL penalty still acts on them.
    kept = build_train_samples(groups, rl=settings("dapo", kl={"coefficient": 0.1}))
    assert count_totals(kept, rollout_token_limit=8).num_loss_tokens == 2 * 3 * 2
    assert {value for sample in kept[:3] for value in sample.advantages} == {0.0}


def test_pitfall_08_a_step_without_any_spread_neither_hangs_nor_moves_a_weight(checkpoint):
    learner = make_learner(checkpoint, weight_decay=0.1)
    samples = build_train_samples([group_of([0.3] * 4)], rl=settings("grpo"))
    before = learner.export_weights()
    assert step(learner, samples) == {"num_loss_tokens": 0.0}
    assert_same(learner.export_weights(), before, atol=0)


# 10. The gradient of a KL penalty


@pytest.mark.parametrize("is_stale", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_pitfall_10_by_default_the_penalty_descends_the_divergence_itself(estimator, is_stale):
    # Four tokens drawn exactly as often as their probabilities say: the mean is the expectation.
    tokens = torch.tensor([0, 1, 2, 2])
    generator = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).log()
    logits = (generator + is_stale * torch.tensor([0.5, -0.3, 0.1])).requires_grad_()
    reference = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    policy = logits.log_softmax(0)
    loss, _ = rl_loss(
        policy[tokens].unsqueeze(0),
        generator_logprobs=generator[tokens].unsqueeze(0),
        advantages=torch.zeros(1, 4, dtype=torch.float64),
        loss_mask=torch.ones(1, 4, dtype=torch.bool),
        ref_logprobs=reference[tokens].unsqueeze(0),
        entropy=None,
        totals=StepTotals(num_loss_tokens=4, num_rollouts=1, rollout_token_limit=4),
        rl=settings("grpo", kl={"coefficient": 1.0, "estimator": estimator}),
    )
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


# 11. 16-bit masters


def test_pitfall_11_a_small_step_in_bf16_is_in_the_skill_vector_though_bf16_would_lose_it(
    checkpoint, tmp_path
):
    learner = make_learner(checkpoint, precision="bf16", learning_rate=1e-6)
    step(learner, tiny_learner.on_policy(learner, make_samples()))
    learner.save(tmp_path / "saved")
    old, new = load_weights(checkpoint), load_weights(tmp_path / "saved")
    name = "model.layers.0.mlp.gate_proj.weight"
    assert {value.dtype for value in new.values()} == {torch.float32}
    # Adam's first step is the learning rate; rounding would move weights a thousand times as
    # far, or not at all.
    moved = (new[name] - old[name]).abs()
    assert moved.max() < 1.5e-6
    assert (moved > 0.5e-6).float().mean() > 0.9
    assert (new[name].bfloat16() != old[name].bfloat16()).float().mean() < 0.1


# 12. Left padding


def test_pitfall_12_a_sample_beside_longer_ones_scores_as_it_does_alone(checkpoint):
    samples = [*make_samples(0), *make_samples(1)]
    learner = make_learner(checkpoint)
    for sample, row in zip(samples, learner.token_logprobs(samples), strict=True):
        assert row == pytest.approx(plain_logprobs(checkpoint, sample, 1.0).tolist(), abs=1e-4)


def test_pitfall_12_packs_hold_no_padding_and_positions_start_anew():
    samples = make_samples()
    (pack,) = pack_samples(samples, max_tokens=4096)
    assert pack.token_ids.shape == (1, sum(len(sample.token_ids) for sample in samples))
    expected = [position for s in pack.segments for position in range(s.length)]
    assert pack.position_ids.tolist() == [expected]
