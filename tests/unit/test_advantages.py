import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from past_ray.rl.advantages import constant_groups, group_advantages, turn_advantages


def test_half_right_group_gets_one_over_the_sample_deviation():
    # mean 1/2, sample variance (4 * 1/4) / 3 = 1/3, so (1 - 1/2) / sqrt(1/3) = sqrt(3) / 2.
    advantages = group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]).double(), scale_by_std=True)
    expected = torch.tensor([1, -1, 1, -1]).double() * 3**0.5 / 2
    torch.testing.assert_close(advantages, expected, atol=2e-6, rtol=0)


def test_two_rollouts_get_plus_and_minus_one_over_sqrt_two():
    # (3 - 2) / sqrt(((3-2)^2 + (1-2)^2) / 1) = 1 / sqrt(2); the population value would be 1.
    advantages = group_advantages(torch.tensor([3.0, 1.0]).double(), scale_by_std=True)
    torch.testing.assert_close(
        advantages, torch.tensor([0.5**0.5, -(0.5**0.5)]).double(), atol=1e-6, rtol=0
    )


def test_dr_grpo_only_centres():
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), scale_by_std=False)
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_constant_group_gets_exact_zeros_although_its_mean_is_rounded(scale_by_std: bool):
    rewards = torch.full((7,), 0.1)
    assert (rewards - rewards.mean()).abs().max() > 0 or (rewards.sum() / 7 != rewards[0]), (
        "choose a group whose mean is rounded"
    )
    assert group_advantages(rewards, scale_by_std=scale_by_std).tolist() == [0.0] * 7


def test_smallest_possible_spread_is_not_constant():
    nearly = torch.tensor([0.1, 0.1, torch.nextafter(torch.tensor(0.1), torch.tensor(1.0))])
    assert not constant_groups(nearly)
    assert constant_groups(torch.tensor([0.1, 0.1, 0.1]))


def test_continuous_rewards_that_share_a_mean_are_not_taken_for_constant():
    rewards = torch.tensor([[0.5, 0.5], [0.4, 0.6]])
    assert constant_groups(rewards).tolist() == [True, False]


def test_single_rollout_has_no_baseline_and_gets_zero():
    assert group_advantages(torch.tensor([1.0]), scale_by_std=True).tolist() == [0.0]


def test_groups_do_not_see_each_other():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [5.0, 7.0, 9.0]])
    together = group_advantages(rewards, scale_by_std=True)
    alone = torch.stack([group_advantages(row, scale_by_std=True) for row in rewards])
    assert torch.equal(together, alone)


def test_returns_to_go_are_compared_per_turn():
    # Returns at turn 0: 1, 0, 2, mean 1; at turn 1: 1 and 2, mean 1.5.
    advantages = turn_advantages([[0, 1], [0], [0, 2]], scale_by_std=False)
    assert advantages == [[0.0, -0.5], [-1.0], [1.0, 0.5]]


def test_turn_deviation_is_that_of_the_rollouts_that_have_the_turn():
    # Turn 1 has returns 1 and 2 only: (2 - 1.5) / sqrt(1/2) = 1 / sqrt(2).
    advantages = turn_advantages([[0, 1], [0], [0, 2]], scale_by_std=True)
    assert advantages[2] == pytest.approx([1.0, 0.5**0.5], abs=2e-6)


def test_reward_of_an_early_turn_says_nothing_about_later_turns():
    advantages = turn_advantages([[5, 1], [0, 1]], scale_by_std=False)
    assert advantages == [[2.5, 0.0], [-2.5, 0.0]]


def test_reward_of_the_last_turn_reaches_every_earlier_one():
    advantages = turn_advantages([[0, 0, 1], [0, 0, 0]], scale_by_std=False)
    assert advantages == [[0.5] * 3, [-0.5] * 3]


def test_turn_that_one_rollout_reached_has_advantage_zero():
    advantages = turn_advantages([[0, 0, 7], [1]], scale_by_std=True)
    assert advantages[0][1:] == [0.0, 0.0]
    assert advantages[0][0] > 0 > advantages[1][0]


@given(rewards=st.lists(st.floats(-10, 10), min_size=1, max_size=6))
def test_with_one_turn_each_they_are_the_advantages_of_rollouts(rewards: list[float]):
    by_turn = turn_advantages([[reward] for reward in rewards], scale_by_std=True)
    whole = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale_by_std=True)
    assert [row[0] for row in by_turn] == whole.tolist()


@given(order=st.permutations([0.1, 0.2, 0.3, 0.7, 1e-3]))
def test_equal_rewards_in_another_order_have_no_spread_at_the_first_turn(order: list[float]):
    advantages = turn_advantages([[0.1, 0.2, 0.3, 0.7, 1e-3], order], scale_by_std=True)
    assert [row[0] for row in advantages] == [0.0, 0.0]


def test_rollouts_without_turns_and_empty_groups_give_nothing():
    assert turn_advantages([], scale_by_std=True) == []
    assert turn_advantages([[], [1.0]], scale_by_std=True) == [[], [0.0]]


@given(rewards=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8), scale_by_std=st.booleans())
def test_only_a_constant_group_has_no_advantage_at_all(rewards: list[float], scale_by_std: bool):
    values = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_advantages(values, scale_by_std=scale_by_std)
    assert bool(advantages.any()) == (len(set(rewards)) > 1)
