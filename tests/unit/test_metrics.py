import math

import pytest

from past_ray.rl.metrics import merge_metrics, rollout_metrics
from past_ray.rl.types import Completion, Rollout, RolloutGroup, RolloutStatus, Turn


def rollout(reward: float | None, *lengths: int, finish_reason: str = "stop") -> Rollout:
    status = RolloutStatus.GRADING_ERROR if reward is None else RolloutStatus.COMPLETED
    turns = [
        Turn(
            prompt_ids=[1, 2],
            completion=Completion(
                token_ids=[3] * length,
                logprobs=[-1.0] * length,
                finish_reason=finish_reason,
                policy_version=0,
            ),
        )
        for length in lengths
    ]
    return Rollout(
        rollout_id="0/q/0", turns=turns, answer="", reward=reward, status=status, policy_version=0
    )


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(question_id="q", rollouts=list(rollouts))


def test_sums_add_and_maxima_do_not():
    parts = [{"loss": 0.25, "ratio_max": 1.5}, {"loss": 0.5, "ratio_max": 1.2}, {"only_here": 2.0}]
    assert merge_metrics(parts) == {"loss": 0.75, "ratio_max": 1.5, "only_here": 2.0}


def test_merging_leaves_its_inputs_alone():
    first = {"loss": 1.0}
    merge_metrics([first, {"loss": 2.0}])
    assert first == {"loss": 1.0}


def test_failed_rollouts_have_no_reward_and_are_not_scored_zero():
    metrics = rollout_metrics([group(rollout(1.0, 2), rollout(0.5, 4), rollout(None, 6))])
    assert metrics["reward"] == 0.75
    assert metrics["completion_tokens"] == 3.0
    assert metrics["num_tokens"] == 12.0
    assert metrics["error_frac"] == pytest.approx(1 / 3)


def test_tokens_of_all_turns_count():
    metrics = rollout_metrics([group(rollout(1.0, 2, 3), rollout(0.0, 1))])
    assert metrics["num_tokens"] == 6.0
    assert metrics["completion_tokens"] == 3.0


def test_truncated_rollouts_are_a_share_of_completed_ones():
    groups = [group(rollout(1.0, 2, finish_reason="length"), rollout(0.0, 2), rollout(None))]
    assert rollout_metrics(groups)["truncated_frac"] == 0.5


def test_groups_without_spread_are_counted():
    groups = [
        group(rollout(0.1, 1), rollout(0.1, 1)),
        group(rollout(1.0, 1), rollout(0.0, 1)),
        group(rollout(1.0, 1), rollout(None, 1)),
        group(rollout(None), rollout(None)),
    ]
    assert rollout_metrics(groups)["constant_group_frac"] == 0.75


def test_mean_over_nothing_is_nan():
    metrics = rollout_metrics([group(rollout(None))])
    assert math.isnan(metrics["reward"])
    assert metrics["error_frac"] == 1.0
