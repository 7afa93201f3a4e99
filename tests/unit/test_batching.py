import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from past_ray.config.algorithm import DAPOConfig, DrGRPOConfig, OverlongConfig
from past_ray.config.rl import RLConfig
from past_ray.errors import DataError
from past_ray.rl.batching import (
    build_train_sample,
    build_train_samples,
    is_constant_group,
    split_over_ranks,
)
from past_ray.rl.objective import count_totals
from past_ray.rl.types import Completion, Rollout, RolloutGroup, RolloutStatus, TrainSample, Turn

LENGTHS = st.lists(st.integers(2, 30), max_size=25)


def turn(
    prompt_ids: list[int], token_ids: list[int], reward: float = 0.0, finish_reason: str = "stop"
) -> Turn:
    return Turn(
        prompt_ids=prompt_ids,
        completion=Completion(
            token_ids=token_ids,
            logprobs=[-0.5 * (index + 1) for index in range(len(token_ids))],
            finish_reason=finish_reason,
            policy_version=3,
        ),
        reward=reward,
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


def two_turns(first: float, second: float) -> Rollout:
    return rollout(first + second, turn([5, 6], [7], first), turn([8], [9, 2], second))


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(question_id="q", rollouts=list(rollouts))


def sample(length: int, first_id: int = 10) -> TrainSample:
    mask = [index == length - 1 for index in range(length)]
    return TrainSample(
        token_ids=list(range(first_id, first_id + length)),
        loss_mask=mask,
        generator_logprobs=[-1.0 if trains else 0.0 for trains in mask],
        advantages=[2.0 if trains else 0.0 for trains in mask],
    )


def config(**changes: object) -> RLConfig:
    """Advantages are differences to the mean, and nothing acts on constant groups."""
    plain = {"algorithm": DrGRPOConfig(), "kl": {"coefficient": 0.0}}
    return RLConfig.model_validate({**plain, **changes})


def build(*groups: RolloutGroup, **changes: object) -> list[TrainSample]:
    return build_train_samples(groups, rl=config(**changes))


def last_advantages(samples: list[TrainSample]) -> list[float]:
    return [built.advantages[-1] for built in samples]


def test_turns_are_laid_out_with_the_ids_that_were_sampled_and_their_own_advantage():
    built = build_train_sample(
        rollout(1.0, turn([5, 6], [7, 2]), turn([8], [9, 2])), advantages=[0.7, 0.3]
    )
    assert built == TrainSample(
        token_ids=[5, 6, 7, 2, 8, 9, 2],
        loss_mask=[False, False, True, True, False, True, True],
        generator_logprobs=[0.0, 0.0, -0.5, -1.0, 0.0, -0.5, -1.0],
        advantages=[0.0, 0.0, 0.7, 0.7, 0.0, 0.3, 0.3],
    )


def test_failed_rollouts_are_left_out_before_the_baseline():
    # With the failed one scored 0 the mean would be 1/3.
    samples = build(group(rollout(1.0), rollout(None), rollout(0.0)))
    assert last_advantages(samples) == [0.5, -0.5]


def test_only_dr_grpo_does_not_divide_by_the_deviation():
    spread = group(rollout(1.0), rollout(0.0))
    scaled = build(spread, algorithm={"kind": "grpo"})
    assert last_advantages(scaled) == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=2e-6)
    assert last_advantages(build(spread)) == [0.5, -0.5]


def test_group_of_failures_gives_no_sample():
    assert build(group(rollout(None)), group(), kl={"coefficient": 0.1}) == []


def test_constant_group_is_dropped_and_its_tokens_are_not_counted():
    samples = build(group(rollout(0.3), rollout(0.3)), group(rollout(0.3), rollout(0.4)))
    totals = count_totals(samples, rollout_token_limit=8)
    assert (totals.num_loss_tokens, totals.num_rollouts) == (2, 2)


@pytest.mark.parametrize("acting", [{"kl": {"coefficient": 0.1}}, {"entropy_coefficient": 0.1}])
def test_constant_group_is_kept_with_zero_advantage_for_what_still_acts_on_it(acting):
    samples = build(group(rollout(0.3), rollout(0.3)), **acting)
    assert [s.advantages for s in samples] == [[0.0, 0.0, 0.0]] * 2
    assert count_totals(samples, rollout_token_limit=8).num_loss_tokens == 2


def test_spread_is_exact_so_continuous_rewards_are_not_taken_for_equal():
    assert is_constant_group(group(*[rollout(0.1)] * 7), rl=config())
    nearly = math.nextafter(0.1, 1)
    assert not is_constant_group(group(*[rollout(0.1)] * 6, rollout(nearly)), rl=config())


def test_group_is_constant_with_fewer_than_two_graded_rollouts():
    assert is_constant_group(group(rollout(1.0), rollout(None)), rl=config())
    assert is_constant_group(group(rollout(None)), rl=config())


def test_turns_are_compared_by_what_they_still_earn():
    samples = build(group(two_turns(1, 0), two_turns(0, 1)), advantage="turn")
    # Both earn 1 from the start; at the second turn the second rollout still earns 1.
    assert [s.advantages for s in samples] == [
        [0, 0, 0.0, 0, -0.5, -0.5],
        [0, 0, 0.0, 0, 0.5, 0.5],
    ]


def test_group_with_equal_sums_is_constant_by_rollout_but_not_by_turn():
    same_sum = group(two_turns(1, 0), two_turns(0, 1))
    assert is_constant_group(same_sum, rl=config())
    assert not is_constant_group(same_sum, rl=config(advantage="turn"))


def test_turn_rewards_that_do_not_make_up_the_reward_are_refused():
    unset = rollout(1.0, turn([5], [7]), turn([8], [9]))
    with pytest.raises(DataError, match=r"must add up to its reward 1.0, found 0.0"):
        build(group(unset, two_turns(0, 1)), advantage="turn")


OVERLONG = {
    "algorithm": DAPOConfig(overlong=OverlongConfig(buffer_tokens=2, penalty=0.5)),
    "max_new_tokens": 4,
}


def test_overlong_answer_loses_reward_before_it_is_compared():
    # Lengths 2, 3 and 4 of at most 4 lose 0, 0.25 and 0.5, so rewards become 1, 0.75, 0.5.
    lengths = [rollout(1.0, turn([5], list(range(10, 10 + n)))) for n in (2, 3, 4)]
    samples = build(group(*lengths), **OVERLONG)
    # Their sample deviation is 0.25.
    assert last_advantages(samples) == pytest.approx([1, 0, -1], abs=1e-5)
    assert build(group(*lengths)) == []


def test_overlong_turn_loses_reward_where_it_happened():
    long_first = rollout(1.0, turn([5], [1, 2, 3, 4]), turn([8], [9], 1.0))
    long_last = rollout(1.0, turn([5], [1]), turn([8], [9, 2, 3, 4], 1.0))
    first, last = build(group(long_first, long_last), advantage="turn", **OVERLONG)
    # From the start both lose 0.5; from the second turn on only the second rollout does.
    assert first.advantages[1:5] == [0.0] * 4
    assert first.advantages[-1] > 0 > last.advantages[-1]


def test_truncated_completion_trains_to_its_last_token():
    truncated = rollout(1.0, turn([5], [7, 8], finish_reason="length"))
    samples = build(group(truncated, rollout(0.0)))
    assert samples[0].loss_mask == [False, True, True]


def test_mask_comes_from_lengths_whatever_the_ids_are():
    # 0 pads batches and 2 ends sequences; both were sampled here, and both were prompted.
    built = build_train_sample(rollout(1.0, turn([0, 2], [0, 2])), advantages=[1.0])
    assert built.loss_mask == [False, False, True, True]


def test_empty_completion_counts_for_the_baseline_only():
    samples = build(group(rollout(1.0, turn([5], [])), rollout(0.0)))
    assert last_advantages(samples) == [-0.5]


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_reward_that_is_no_number_is_refused(reward: float):
    with pytest.raises(DataError, match="must have a finite reward"):
        build(group(rollout(reward), rollout(0.0)))


def test_rollout_without_prompt_is_refused():
    with pytest.raises(DataError, match="must start with prompt tokens"):
        build_train_sample(rollout(1.0, turn([], [7])), advantages=[1.0])


def test_missing_logprobs_are_refused_with_both_counts():
    completion = Completion(
        token_ids=[7, 8], logprobs=[-1.0], finish_reason="stop", policy_version=0
    )
    broken = rollout(1.0, Turn(prompt_ids=[5], completion=completion))
    with pytest.raises(DataError, match="got 1 for 2"):
        build_train_sample(broken, advantages=[1.0])


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


def test_samples_cross_processes():
    assert pickle.loads(pickle.dumps(sample(4))) == sample(4)
