"""Our tensors against scalar loops over the published formulas; see ``rl_losses.json``.

Tolerance 1e-12: both sides are float64 and differ only in the order of a few additions.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from past_ray.rl.advantages import group_advantages
from past_ray.rl.losses import kl_penalty, ppo_clip_loss

GOLDEN = json.loads(Path(__file__).with_name("rl_losses.json").read_text(encoding="utf-8"))
EXACT = {"rel": 1e-12, "abs": 1e-12}


def padded(name: str) -> Tensor:
    """One row a rollout, right-padded with a value that must not matter."""
    rollouts = GOLDEN["losses"]["rollouts"]
    longest = max(len(rollout["logprobs"]) for rollout in rollouts)
    rows = [torch.tensor(rollout[name], dtype=torch.float64) for rollout in rollouts]
    return torch.stack([pad(row, (0, longest - len(row)), value=-77.0) for row in rows])


def loss_mask() -> Tensor:
    return padded("logprobs") != -77.0


def num_loss_tokens() -> int:
    return sum(len(rollout["logprobs"]) for rollout in GOLDEN["losses"]["rollouts"])


@pytest.mark.parametrize("case", GOLDEN["advantages"], ids=lambda case: f"{len(case['rewards'])}")
@pytest.mark.parametrize(("name", "scale_by_std"), [("grpo", True), ("dr_grpo", False)])
def test_advantages_equal_the_published_formula(case, name: str, scale_by_std: bool):
    rewards = torch.tensor(case["rewards"], dtype=torch.float64)
    ours = group_advantages(rewards, scale_by_std=scale_by_std)
    assert ours.tolist() == pytest.approx(case[name], **EXACT)


def test_policy_loss_equals_the_published_formula():
    clip_low, clip_high = GOLDEN["provenance"]["clip"]
    advantages = [[rollout["advantage"]] for rollout in GOLDEN["losses"]["rollouts"]]
    loss, metrics = ppo_clip_loss(
        padded("logprobs"),
        generator_logprobs=padded("generator_logprobs"),
        advantages=torch.tensor(advantages, dtype=torch.float64).expand(loss_mask().shape),
        loss_mask=loss_mask(),
        num_loss_tokens=num_loss_tokens(),
        clip_low=clip_low,
        clip_high=clip_high,
    )
    assert loss.item() == pytest.approx(GOLDEN["losses"]["policy_loss"], **EXACT)
    assert metrics["clip_frac"].item() == pytest.approx(GOLDEN["losses"]["clip_frac"], **EXACT)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty_equals_the_published_formula(estimator: str):
    penalty, _ = kl_penalty(
        padded("logprobs"),
        ref_logprobs=padded("ref_logprobs"),
        loss_mask=loss_mask(),
        num_loss_tokens=num_loss_tokens(),
        estimator=estimator,
    )
    assert penalty.item() == pytest.approx(GOLDEN["losses"]["kl"][estimator], **EXACT)
