"""Writes ``rl_losses.json``: reference numbers for advantages, policy loss and KL penalties.

The reference is this file: the papers' formulas as float64 scalar loops over lists, written without
looking at ``past_ray.rl`` and without tensors, masks or vectorised operations. No other library's
code is run or copied. Run it again only if a formula was wrong:

    python tests/golden/make_rl_losses.py
"""

import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20260111
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
LENGTHS = (6, 3, 5, 1)

PROVENANCE = {
    "method": "scalar float64 loops over the published formulas; no third-party implementation",
    "formulas": {
        "advantages_grpo": "arXiv 2402.03300 section 4.1.2, with the sample deviation plus 1e-6",
        "advantages_dr_grpo": "arXiv 2503.20783 section 3: no division by the deviation",
        "policy_loss": "arXiv 1707.06347 eq. 7 with the bounds and token mean of 2503.14476 eq. 8",
        "k1 k2 k3": "http://joschu.net/blog/kl-approx.html; k3 is arXiv 2402.03300 eq. 4",
    },
    "script": "tests/golden/make_rl_losses.py",
    "seed": SEED,
    "clip": [CLIP_LOW, CLIP_HIGH],
}


def advantages(rewards: list[float], *, scale_by_std: bool) -> list[float]:
    if all(reward == rewards[0] for reward in rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
    scale = math.sqrt(variance) + 1e-6 if scale_by_std else 1.0
    return [(reward - mean) / scale for reward in rewards]


def policy_loss(rollouts: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the loss and the share of clipped tokens."""
    terms: list[float] = []
    num_clipped = 0
    for rollout in rollouts:
        for new, old in zip(rollout["logprobs"], rollout["generator_logprobs"], strict=True):
            ratio = math.exp(new - old)
            advantage = rollout["advantage"]
            bounded = min(max(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH)
            terms.append(min(ratio * advantage, bounded * advantage))
            num_clipped += bounded * advantage < ratio * advantage
    return -math.fsum(terms) / len(terms), num_clipped / len(terms)


def penalties(rollouts: list[dict[str, Any]]) -> dict[str, float]:
    """Return the token mean of each estimator of KL(policy || reference)."""
    terms: dict[str, list[float]] = {"k1": [], "k2": [], "k3": []}
    for rollout in rollouts:
        for new, ref in zip(rollout["logprobs"], rollout["ref_logprobs"], strict=True):
            ratio = math.exp(ref) / math.exp(new)
            terms["k1"].append(-math.log(ratio))
            terms["k2"].append(math.log(ratio) ** 2 / 2)
            terms["k3"].append(ratio - 1 - math.log(ratio))
    return {name: math.fsum(values) / len(values) for name, values in terms.items()}


def make_rollouts(generator: np.random.Generator) -> list[dict[str, Any]]:
    rewards = [1.0, 0.25, 0.0, 0.5]
    rollouts: list[dict[str, Any]] = []
    for length, advantage in zip(LENGTHS, advantages(rewards, scale_by_std=True), strict=True):
        logprobs = -np.abs(generator.normal(size=length)) - 0.01
        rollouts.append(
            {
                "advantage": advantage,
                "logprobs": logprobs.tolist(),
                "generator_logprobs": (logprobs + 0.4 * generator.normal(size=length)).tolist(),
                "ref_logprobs": (logprobs + 0.4 * generator.normal(size=length)).tolist(),
            }
        )
    return rollouts


def main() -> None:
    generator = np.random.default_rng(SEED)
    groups = [
        [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0],
        [0.1, 0.1, 0.1],
        [0.31, 0.62, 0.4999, 0.0],
        generator.normal(size=6).tolist(),
    ]
    rollouts = make_rollouts(generator)
    loss, clip_frac = policy_loss(rollouts)
    golden = {
        "provenance": PROVENANCE
        | {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "float": "IEEE 754 double",
        },
        "advantages": [
            {
                "rewards": rewards,
                "grpo": advantages(rewards, scale_by_std=True),
                "dr_grpo": advantages(rewards, scale_by_std=False),
            }
            for rewards in groups
        ],
        "losses": {
            "rollouts": rollouts,
            "policy_loss": loss,
            "clip_frac": clip_frac,
            "kl": penalties(rollouts),
        },
    }
    target = Path(__file__).with_name("rl_losses.json")
    target.write_text(json.dumps(golden, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
