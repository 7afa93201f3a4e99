"""Writes ``rl_losses.json``: reference numbers for advantages and for the RL loss's every variant.

The reference is this file: the published formulas as float64 scalar loops over lists, without
tensors, masks or vectorised operations. Gradients are central differences of those formulas, so no
derivative was worked out by hand; what a paper holds fixed (a stop-gradient) is computed at the
point itself. No other library's code is run or copied. Run it again only if a formula was wrong:

    python tests/golden/make_rl_losses.py
"""

import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20260111
LENGTHS = (6, 3, 5, 1)
SHIFTS = (0.0, -0.3, 0.1, 0.6)
"""Mean log ratio learner / generator of each rollout; the noise around it is 0.3."""

TOKEN_LIMIT = 8
DIFFERENCE = 1e-5

PROVENANCE = {
    "method": "scalar float64 loops over the published formulas; no third-party implementation",
    "gradients": f"central differences of the same loops, step {DIFFERENCE}",
    "formulas": {
        "grpo advantages": "arXiv 2402.03300 section 4.1.2; sample deviation plus 1e-6 as in verl",
        "dr_grpo advantages": "arXiv 2503.20783 section 3: no division by the deviation",
        "turn advantages": "returns-to-go, then the grpo formula per turn index",
        "overlong": "arXiv 2503.14476 eq. 13",
        "grpo": "arXiv 1707.06347 eq. 7, mean over the step's tokens (verl's loss_agg_mode "
        "token-mean)",
        "dr_grpo": "arXiv 2503.20783 section 3.2: sum over rollouts * token limit (TRL's loss_type "
        "dr_grpo, verl's seq-mean-token-sum-norm)",
        "dapo": "arXiv 2503.14476 eq. 8",
        "gspo": "arXiv 2507.18071 eq. 5 to 7; with weights per token eq. 13 and 14, as in verl",
        "cispo": "arXiv 2506.13585 eq. 4 and 5, no lower bound (TRL's loss_type cispo)",
        "k1 k2 k3": "http://joschu.net/blog/kl-approx.html; k3 is arXiv 2402.03300 eq. 4",
        "importance_weighted": "gradient of ratio * k3 with the ratio differentiated, arXiv "
        "2512.02556 section 3.1 (TRL's use_bias_correction_kl)",
        "correction": "verl docs/algo/rollout_corr.md: token truncation, geometric sequence mask",
    },
    "script": "tests/golden/make_rl_losses.py",
    "seed": SEED,
    "token_limit": TOKEN_LIMIT,
}

CLIPPED = {"clip_low": 0.2, "clip_high": 0.2}
WEIGHTED_KL = {"coefficient": 0.3, "estimator": "k3", "gradient": "importance_weighted"}
TRUNCATED = {"anchor": "learner", "truncate_at": 1.2}
MASKED = {"anchor": "generator", "min_sequence_ratio": 0.85, "max_sequence_ratio": 1.5}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"kind": "grpo", **CLIPPED},
    "dr_grpo": {"kind": "dr_grpo", **CLIPPED},
    "dapo": {"kind": "dapo", "clip_low": 0.2, "clip_high": 0.28},
    "gspo": {"kind": "gspo", "clip_low": 0.1, "clip_high": 0.15},
    "cispo": {"kind": "cispo", "max_ratio": 1.2},
}

Rollouts = list[dict[str, Any]]
Loss = Callable[[Rollouts, Rollouts], float]


def advantages(rewards: list[float], *, scale_by_std: bool) -> list[float]:
    if all(reward == rewards[0] for reward in rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
    scale = math.sqrt(variance) + 1e-6 if scale_by_std else 1.0
    return [(reward - mean) / scale for reward in rewards]


def advantages_by_turn(rewards: list[list[float]], *, scale_by_std: bool) -> list[list[float]]:
    result = [list(row) for row in rewards]
    for turn in range(max(len(row) for row in rewards)):
        returns = {i: math.fsum(row[turn:]) for i, row in enumerate(rewards) if len(row) > turn}
        found = advantages(list(returns.values()), scale_by_std=scale_by_std)
        for i, value in zip(returns, found, strict=True):
            result[i][turn] = value
    return result


def overlong(length: int, limit: int, buffer: int) -> float:
    if length <= limit - buffer:
        return 0.0
    return (limit - buffer - length) / buffer if length <= limit else -1.0


def token_ratio(rollout: dict[str, Any], t: int, anchor: dict[str, Any] | None = None) -> float:
    """Return the ratio to the generator, or to ``anchor``'s own log-probability."""
    base = rollout["generator_logprobs"][t] if anchor is None else anchor["logprobs"][t]
    return math.exp(rollout["logprobs"][t] - base)


def clipped(ratio: float, advantage: float, algorithm: dict[str, Any]) -> float:
    bounded = min(max(ratio, 1 - algorithm["clip_low"]), 1 + algorithm["clip_high"])
    return -min(ratio * advantage, bounded * advantage)


def policy_term(new: dict[str, Any], fixed: dict[str, Any], t: int, case: dict[str, Any]) -> float:
    """Return one token's policy loss; ``fixed`` holds what carries no gradient."""
    algorithm, correction = case["algorithm"], case["correction"]
    anchor = fixed if correction["anchor"] == "learner" else None
    advantage = new["advantage"]
    if algorithm["kind"] == "cispo":
        weight = min(token_ratio(fixed, t, anchor), algorithm["max_ratio"])
        term = -weight * advantage * new["logprobs"][t]
    elif algorithm["kind"] == "gspo":
        count = len(new["logprobs"])
        # Tokens of different weight need the ratio per token, eq. 13; its value is the same.
        moving = fixed if "truncate_at" in correction else new
        ratios = [token_ratio(moving, u, anchor) for u in range(count)]
        ratio = math.prod(ratios) ** (1 / count)
        if "truncate_at" in correction:
            ratio *= token_ratio(new, t, fixed)
        term = clipped(ratio, advantage, algorithm)
    else:
        term = clipped(token_ratio(new, t, anchor), advantage, algorithm)
    if "truncate_at" in correction:
        term *= min(token_ratio(fixed, t), correction["truncate_at"])
    return term


def kl_value(rollout: dict[str, Any], t: int, estimator: str) -> float:
    ratio = math.exp(rollout["ref_logprobs"][t]) / math.exp(rollout["logprobs"][t])
    return {
        "k1": -math.log(ratio),
        "k2": math.log(ratio) ** 2 / 2,
        "k3": ratio - 1 - math.log(ratio),
    }[estimator]


def kl_descended(rollout: dict[str, Any], t: int, kl: dict[str, Any]) -> float:
    """Return what is differentiated, which for the weighted gradient is not the value."""
    if kl["gradient"] == "plain":
        return kl_value(rollout, t, kl["estimator"])
    return token_ratio(rollout, t) * kl_value(rollout, t, "k3")


def is_masked(fixed: dict[str, Any], correction: dict[str, Any]) -> bool:
    count = len(fixed["logprobs"])
    ratio = math.prod(token_ratio(fixed, t) for t in range(count)) ** (1 / count)
    low = correction.get("min_sequence_ratio", 0.0)
    return not low <= ratio <= correction.get("max_sequence_ratio", math.inf)


def total(new: Rollouts, fixed: Rollouts, case: dict[str, Any], *, for_gradient: bool) -> float:
    """Return the loss, or what has the loss's gradient."""
    kl = case["kl"]
    rows: list[list[float]] = []
    for rollout, still in zip(new, fixed, strict=True):
        row: list[float] = []
        for t in range(len(rollout["logprobs"])):
            value = policy_term(rollout, still, t, case)
            if for_gradient:
                value += kl["coefficient"] * kl_descended(rollout, t, kl)
            else:
                value += kl["coefficient"] * kl_value(rollout, t, kl["estimator"])
            row.append(value - case["entropy_coefficient"] * rollout["entropy"][t])
        rows.append([0.0] * len(row) if is_masked(still, case["correction"]) else row)
    sums = [math.fsum(row) for row in rows]
    match case["algorithm"]["kind"]:
        case "gspo":
            means = [s / len(row) for s, row in zip(sums, rows, strict=True)]
            return math.fsum(means) / len(rows)
        case "dr_grpo":
            return math.fsum(sums) / (len(rows) * TOKEN_LIMIT)
        case _:
            return math.fsum(sums) / sum(len(row) for row in rows)


def gradient(rollouts: Rollouts, case: dict[str, Any]) -> list[list[float]]:
    def shifted(i: int, t: int, by: float) -> Rollouts:
        moved = [{**rollout, "logprobs": list(rollout["logprobs"])} for rollout in rollouts]
        moved[i]["logprobs"][t] += by
        return moved

    def slope(i: int, t: int) -> float:
        above = total(shifted(i, t, DIFFERENCE), rollouts, case, for_gradient=True)
        below = total(shifted(i, t, -DIFFERENCE), rollouts, case, for_gradient=True)
        return (above - below) / (2 * DIFFERENCE)

    return [[slope(i, t) for t in range(len(r["logprobs"]))] for i, r in enumerate(rollouts)]


def make_case(rollouts: Rollouts, name: str, algorithm: str, **changes: Any) -> dict[str, Any]:
    case: dict[str, Any] = {
        "algorithm": ALGORITHMS[algorithm],
        "kl": {"coefficient": 0.0, "estimator": "k3", "gradient": "plain"},
        "correction": {"anchor": "generator"},
        "entropy_coefficient": 0.0,
        **changes,
    }
    correction = case["correction"]
    tokens = [(r, t) for r in rollouts for t in range(len(r["logprobs"]))]
    metrics: dict[str, float] = {}
    if "truncate_at" in correction:
        cut = [token_ratio(r, t) > correction["truncate_at"] for r, t in tokens]
        metrics["truncated_weight_frac"] = sum(cut) / len(cut)
    if "min_sequence_ratio" in correction:
        left_out = [is_masked(r, correction) for r in rollouts]
        metrics["masked_sequence_frac"] = sum(left_out) / len(left_out)
    return {
        "name": name,
        "settings": case,
        "loss": total(rollouts, rollouts, case, for_gradient=False),
        "gradient": gradient(rollouts, case),
        "metrics": metrics,
    }


def make_cases(rollouts: Rollouts) -> list[dict[str, Any]]:
    cases = [make_case(rollouts, name, name) for name in ALGORITHMS]
    for estimator in ("k1", "k2", "k3"):
        for kind in ("plain", "importance_weighted"):
            kl = {"coefficient": 0.3, "estimator": estimator, "gradient": kind}
            cases.append(make_case(rollouts, f"grpo {estimator} {kind}", "grpo", kl=kl))
    for name in ALGORITHMS:
        cases += [
            make_case(rollouts, f"{name} truncated", name, correction=TRUNCATED),
            make_case(rollouts, f"{name} masked", name, correction=MASKED),
            make_case(
                rollouts,
                f"{name} with everything",
                name,
                correction={**MASKED, **TRUNCATED},
                kl=WEIGHTED_KL,
                entropy_coefficient=0.05,
            ),
        ]
    return cases


def random_rollouts(rng: np.random.Generator) -> Rollouts:
    rollouts: Rollouts = []
    for length, shift, sign in zip(LENGTHS, SHIFTS, (1, -1, 1, -1), strict=True):
        logprobs = -rng.exponential(0.7, length)
        rollouts.append(
            {
                "advantage": sign * float(rng.exponential()),
                "logprobs": logprobs.tolist(),
                "generator_logprobs": (logprobs - shift + rng.normal(0, 0.3, length)).tolist(),
                "ref_logprobs": (logprobs + rng.normal(0, 0.4, length)).tolist(),
                "entropy": rng.exponential(1.0, length).tolist(),
            }
        )
    return rollouts


def main() -> None:
    rng = np.random.default_rng(SEED)
    rewards = [
        [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0],
        [0.1, 0.1, 0.1],
        [0.31, 0.62, 0.4999, 0.0],
        rng.normal(size=6).tolist(),
    ]
    turns = [
        [[0.0, 1.0], [0.0], [0.0, 2.0]],
        [[0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5]],
        [rng.normal(size=length).tolist() for length in (3, 1, 2, 4)],
    ]
    rollouts = random_rollouts(rng)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    golden = {
        "provenance": PROVENANCE | versions | {"float": "IEEE 754 double"},
        "advantages": [
            {
                "rewards": row,
                "grpo": advantages(row, scale_by_std=True),
                "dr_grpo": advantages(row, scale_by_std=False),
            }
            for row in rewards
        ],
        "turn_advantages": [
            {
                "rewards": group,
                "grpo": advantages_by_turn(group, scale_by_std=True),
                "dr_grpo": advantages_by_turn(group, scale_by_std=False),
            }
            for group in turns
        ],
        "overlong": [[n, 16, 4, overlong(n, 16, 4)] for n in (0, 11, 12, 13, 15, 16, 17)],
        "rollouts": rollouts,
        "losses": make_cases(rollouts),
    }
    target = Path(__file__).with_name("rl_losses.json")
    target.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
