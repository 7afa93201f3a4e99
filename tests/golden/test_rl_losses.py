"""Our tensors against scalar loops over the published formulas; see ``rl_losses.json``.

Values: relative 1e-12, both sides being float64 and differing in the order of sums alone.
Gradients: absolute 1e-8, a hundred times the error of a central difference of step 1e-5.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from past_ray.config.rl import RLConfig
from past_ray.rl.advantages import group_advantages, turn_advantages
from past_ray.rl.objective import StepTotals, rl_loss
from past_ray.rl.reward_shaping import overlong_penalty

GOLDEN = json.loads(Path(__file__).with_name("rl_losses.json").read_text(encoding="utf-8"))
ROLLOUTS = GOLDEN["rollouts"]
LENGTHS = [len(rollout["logprobs"]) for rollout in ROLLOUTS]
EXACT = {"rel": 1e-12, "abs": 1e-15}

both_scales = pytest.mark.parametrize(
    ("name", "scale_by_std"), [("grpo", True), ("dr_grpo", False)]
)


def padded(name: str) -> Tensor:
    """Return the rollouts' lists as rows, behind which garbage stands."""
    rows = [torch.tensor(rollout[name], dtype=torch.float64) for rollout in ROLLOUTS]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))


def loss_mask() -> Tensor:
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)


@pytest.mark.parametrize("case", GOLDEN["advantages"], ids=lambda case: f"{len(case['rewards'])}")
@both_scales
def test_advantages_equal_the_published_formula(case, name: str, scale_by_std: bool):
    rewards = torch.tensor(case["rewards"], dtype=torch.float64)
    ours = group_advantages(rewards, scale_by_std=scale_by_std)
    assert ours.tolist() == pytest.approx(case[name], **EXACT)


@pytest.mark.parametrize(
    "case", GOLDEN["turn_advantages"], ids=lambda case: f"{len(case['rewards'])}"
)
@both_scales
def test_turn_advantages_equal_the_formula_per_turn(case, name: str, scale_by_std: bool):
    ours = turn_advantages(case["rewards"], scale_by_std=scale_by_std)
    for row, expected in zip(ours, case[name], strict=True):
        assert row == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize(("num_tokens", "limit", "buffer", "expected"), GOLDEN["overlong"])
def test_overlong_penalty_equals_the_published_formula(num_tokens, limit, buffer, expected):
    ours = overlong_penalty(num_tokens, max_new_tokens=limit, buffer_tokens=buffer, penalty=1.0)
    assert ours == expected


@pytest.mark.parametrize("case", GOLDEN["losses"], ids=lambda case: case["name"])
def test_loss_and_gradient_equal_the_published_formulas(case):
    logprobs = padded("logprobs").requires_grad_()
    advantages = torch.tensor([[r["advantage"]] for r in ROLLOUTS], dtype=torch.float64)
    loss, metrics = rl_loss(
        logprobs,
        generator_logprobs=padded("generator_logprobs"),
        advantages=advantages.expand(loss_mask().shape),
        loss_mask=loss_mask(),
        ref_logprobs=padded("ref_logprobs"),
        entropy=padded("entropy"),
        totals=StepTotals(
            num_loss_tokens=sum(LENGTHS),
            num_rollouts=len(LENGTHS),
            rollout_token_limit=GOLDEN["provenance"]["token_limit"],
        ),
        rl=RLConfig.model_validate(case["settings"]),
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(case["loss"], **EXACT)
    for row, expected in zip(gradient.tolist(), case["gradient"], strict=True):
        assert row[: len(expected)] == pytest.approx(expected, rel=0, abs=1e-8)
        assert not any(row[len(expected) :])
    ours = {name: metrics[name].item() for name in case["metrics"]}
    assert ours == pytest.approx(case["metrics"], **EXACT)
