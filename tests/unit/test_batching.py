import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from past_ray.errors import DataError
from past_ray.rl.batching import (
    PADDING_ID,
    build_train_sample,
    build_train_samples,
    count_loss_tokens,
    filler_micro_batch,
    micro_batches,
    split_over_ranks,
)
from past_ray.rl.types import Completion, Rollout, RolloutGroup, RolloutStatus, TrainSample, Turn

LENGTHS = st.lists(st.integers(2, 30), max_size=25)


def turn(prompt_ids: list[int], token_ids: list[int], finish_reason: str = "stop") -> Turn:
    return Turn(
        prompt_ids=prompt_ids,
        completion=Completion(
            token_ids=token_ids,
            logprobs=[-0.5 * (index + 1) for index in range(len(token_ids))],
            finish_reason=finish_reason,
            policy_version=3,
        ),
    )


def rollout(reward: float | None, *turns: Turn) -> Rollout:
    return Rollout(
        rollout_id="3/q/0",
        turns=list(turns) or [turn([5, 6], [7])],
        answer="",
        reward=reward,
        status=RolloutStatus.GRADING_ERROR if reward is None else RolloutStatus.COMPLETED,
        policy_version=3,
    )


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(question_id="q", rollouts=list(rollouts))


def sample(length: int, num_sampled: int = 1, first_id: int = 10) -> TrainSample:
    mask = [index >= length - num_sampled for index in range(length)]
    return TrainSample(
        token_ids=list(range(first_id, first_id + length)),
        loss_mask=mask,
        generator_logprobs=[-1.0 if trains else 0.0 for trains in mask],
        advantages=[2.0 if trains else 0.0 for trains in mask],
    )


def build(*groups: RolloutGroup, keep_constant_groups: bool = False) -> list[TrainSample]:
    return build_train_samples(
        groups, scale_by_std=False, keep_constant_groups=keep_constant_groups
    )


def test_turns_are_laid_out_with_the_ids_that_were_sampled():
    built = build_train_sample(rollout(1.0, turn([5, 6], [7, 2]), turn([8], [9, 2])), advantage=0.7)
    assert built == TrainSample(
        token_ids=[5, 6, 7, 2, 8, 9, 2],
        loss_mask=[False, False, True, True, False, True, True],
        generator_logprobs=[0.0, 0.0, -0.5, -1.0, 0.0, -0.5, -1.0],
        advantages=[0.0, 0.0, 0.7, 0.7, 0.0, 0.7, 0.7],
    )


def test_failed_rollouts_are_left_out_before_the_baseline():
    samples = build(group(rollout(1.0), rollout(None), rollout(0.0)))
    # With the failed one scored 0 the mean would be 1/3.
    assert [s.advantages[-1] for s in samples] == [0.5, -0.5]


def test_group_of_failures_gives_no_sample():
    assert build(group(rollout(None)), group(), keep_constant_groups=True) == []


def test_constant_group_is_dropped_and_its_tokens_are_not_counted():
    constant = group(rollout(0.3), rollout(0.3))
    spread = group(rollout(0.3), rollout(0.4))
    assert count_loss_tokens(build(constant, spread)) == 2


def test_constant_group_is_kept_with_zero_advantage_for_the_kl_penalty():
    samples = build(group(rollout(0.3), rollout(0.3)), keep_constant_groups=True)
    assert count_loss_tokens(samples) == 2
    assert [s.advantages for s in samples] == [[0.0, 0.0, 0.0]] * 2


def test_truncated_completion_trains_to_its_last_token():
    truncated = rollout(1.0, turn([5], [7, 8], finish_reason="length"))
    samples = build(group(truncated, rollout(0.0)))
    assert samples[0].loss_mask == [False, True, True]


def test_empty_completion_counts_for_the_baseline_only():
    samples = build(group(rollout(1.0, turn([5], [])), rollout(0.0)))
    assert [s.advantages[-1] for s in samples] == [-0.5]


def test_rollout_without_prompt_is_refused():
    with pytest.raises(DataError, match="must start with prompt tokens"):
        build_train_sample(rollout(1.0, turn([], [7])), advantage=1.0)


def test_missing_logprobs_are_refused_with_both_counts():
    completion = Completion(
        token_ids=[7, 8], logprobs=[-1.0], finish_reason="stop", policy_version=0
    )
    broken = rollout(1.0, Turn(prompt_ids=[5], completion=completion))
    with pytest.raises(DataError, match="got 1 for 2"):
        build_train_sample(broken, advantage=1.0)


def test_end_of_sequence_that_equals_the_padding_id_still_trains():
    built = build_train_sample(rollout(1.0, turn([5, 6], [7, PADDING_ID])), advantage=1.0)
    (batch,) = micro_batches([built, sample(6)], max_tokens=100)
    row = batch.indices.index(0)
    assert batch.loss_mask[row].tolist() == [False, False, True, True, False, False]
    assert batch.attention_mask[row].tolist() == [1, 1, 1, 1, 0, 0]


def test_padding_is_on_the_right_and_carries_nothing():
    (batch,) = micro_batches([sample(2, first_id=20), sample(4)], max_tokens=100)
    assert batch.indices == [1, 0]
    assert batch.token_ids.tolist() == [[10, 11, 12, 13], [20, 21, PADDING_ID, PADDING_ID]]
    assert batch.generator_logprobs.tolist() == [[0, 0, 0, -1], [0, -1, 0, 0]]
    assert batch.advantages.tolist() == [[0, 0, 0, 2], [0, 2, 0, 0]]
    assert batch.first_loss_position == 1


def test_padded_tokens_stay_within_the_budget():
    batches = micro_batches([sample(n) for n in (9, 3, 8, 2, 2)], max_tokens=10)
    # 9 alone; 8 alone, since 2 * 8 > 10; then 3, 2, 2 as 3 rows of 3.
    assert [batch.indices for batch in batches] == [[0], [2], [1, 3, 4]]


def test_sample_longer_than_the_budget_goes_alone():
    batches = micro_batches([sample(20), sample(3)], max_tokens=10)
    assert [tuple(batch.token_ids.shape) for batch in batches] == [(1, 20), (1, 3)]


@given(lengths=LENGTHS, max_tokens=st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_every_sample_is_in_exactly_one_micro_batch(lengths: list[int], max_tokens: int):
    samples = [sample(n, first_id=index) for index, n in enumerate(lengths)]
    batches = micro_batches(samples, max_tokens=max_tokens)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(samples)))
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == count_loss_tokens(samples)
    for batch in batches:
        assert batch.token_ids.numel() <= max_tokens or len(batch.indices) == 1
        for index, row, attended in zip(
            batch.indices, batch.token_ids, batch.attention_mask.bool(), strict=True
        ):
            assert row[attended].tolist() == samples[index].token_ids


@given(lengths=LENGTHS, num_ranks=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_ranks_share_all_samples_about_evenly(lengths: list[int], num_ranks: int):
    samples = [sample(n, first_id=100 * index) for index, n in enumerate(lengths)]
    shares = split_over_ranks(samples, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(s.token_ids[0] for share in shares for s in share) == [
        s.token_ids[0] for s in samples
    ]
    loads = [sum(len(s.token_ids) for s in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_one_rank_gets_the_samples_in_their_order():
    samples = [sample(3), sample(9), sample(5)]
    assert split_over_ranks(samples, 1) == [samples]


def test_filler_trains_nothing_but_has_a_token_to_predict():
    filler = filler_micro_batch()
    assert filler.indices == []
    assert not filler.loss_mask.any()
    assert filler.token_ids.shape == (1, 2)


def test_samples_cross_processes():
    assert pickle.loads(pickle.dumps(sample(4))) == sample(4)
    assert torch.equal(
        pickle.loads(pickle.dumps(filler_micro_batch())).token_ids, filler_micro_batch().token_ids
    )
