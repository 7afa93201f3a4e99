"""Random inputs of the RL loss, every algorithm, and what the loss does with them."""

import torch
from torch import Tensor

from past_ray.config.algorithm import (
    AlgorithmConfig,
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    KLConfig,
)
from past_ray.config.rl import RLConfig
from past_ray.rl.objective import StepTotals, rl_loss

Batch = dict[str, Tensor]

ALGORITHMS = {
    "grpo": GRPOConfig(),
    "dr_grpo": DrGRPOConfig(),
    "dapo": DAPOConfig(),
    "gspo": GSPOConfig(clip_low=0.1, clip_high=0.15),
    "cispo": CISPOConfig(max_ratio=1.2),
}
"""GSPO's published bounds clip every ratio of these batches, so it gets wider ones."""

TOKEN_LIMIT = 9
NO_KL = KLConfig(coefficient=0.0)


def settings(algorithm: str | AlgorithmConfig, **others: object) -> RLConfig:
    """Return a configuration without a KL penalty unless one is given."""
    chosen = ALGORITHMS[algorithm] if isinstance(algorithm, str) else algorithm
    return RLConfig.model_validate({"algorithm": chosen, "kl": NO_KL, **others})


def make_batch(seed: int = 0, shape: tuple[int, int] = (5, 7)) -> Batch:
    """Draw a batch whose first row always trains."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs = -normal().abs()
    loss_mask = torch.rand(*shape, generator=generator) < 0.6
    loss_mask[0, 0] = True
    return {
        "logprobs": logprobs,
        "generator_logprobs": logprobs + 0.3 * normal(),
        "ref_logprobs": logprobs + 0.3 * normal(),
        "entropy": normal().abs(),
        "advantages": normal(),
        "loss_mask": loss_mask,
    }


def on_policy(batch: Batch) -> Batch:
    """Return the batch as if the generator had the learner's own probabilities."""
    return {**batch, "generator_logprobs": batch["logprobs"].clone()}


def one_token(ratio: float, advantage: float) -> Batch:
    """Return a batch of one token with a given ratio learner / generator."""
    return {
        "logprobs": torch.tensor([[ratio]], dtype=torch.float64).log(),
        "generator_logprobs": torch.zeros(1, 1, dtype=torch.float64),
        "advantages": torch.full((1, 1), advantage, dtype=torch.float64),
        "loss_mask": torch.ones(1, 1, dtype=torch.bool),
    }


def totals_of(loss_mask: Tensor) -> StepTotals:
    """Count a mask as one whole step."""
    return StepTotals(
        num_loss_tokens=int(loss_mask.sum()),
        num_rollouts=int(loss_mask.any(dim=1).sum()),
        rollout_token_limit=TOKEN_LIMIT,
    )


def evaluate(
    batch: Batch, rl: RLConfig, totals: StepTotals | None = None
) -> tuple[Tensor, Batch, Tensor]:
    """Return loss, metrics and the gradient by log-probabilities."""
    logprobs = batch["logprobs"].clone().requires_grad_()
    loss, metrics = rl_loss(
        logprobs,
        generator_logprobs=batch["generator_logprobs"],
        advantages=batch["advantages"],
        loss_mask=batch["loss_mask"],
        ref_logprobs=batch.get("ref_logprobs"),
        entropy=batch.get("entropy"),
        totals=totals or totals_of(batch["loss_mask"]),
        rl=rl,
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), metrics, gradient
