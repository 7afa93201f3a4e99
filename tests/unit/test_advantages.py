import pytest
import torch

from past_ray.rl.advantages import constant_groups, group_advantages


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
