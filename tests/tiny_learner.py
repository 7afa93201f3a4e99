"""A GRPO learner of a tiny model, samples for it, and what its steps do."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from past_ray.config.rl import RLConfig
from past_ray.config.sft import LoraConfig
from past_ray.engine.learner import GRPOLearner
from past_ray.rl.objective import count_totals
from past_ray.rl.types import TrainSample
from tests.tiny_model import make_tiny_model

LORA = LoraConfig(rank=4, alpha=8)
SHAPES = ((9, 3), (5, 1), (12, 6), (7, 2), (3, 2))
"""Tokens and sampled tokens of each sample."""


@pytest.fixture(name="checkpoint", scope="module")
def checkpoint_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model."""
    return make_tiny_model(tmp_path_factory.mktemp("learner") / "model")


@pytest.fixture(name="other_checkpoint", scope="module")
def other_checkpoint_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model of other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("learner") / "other", seed=1)


def make_learner(checkpoint: Path, *, resume_from: Path | None = None, **settings) -> GRPOLearner:
    """Load a learner whose gradients are not clipped, with a penalty only where settings say so."""
    reference = settings.pop("reference", None)
    config = RLConfig(**{"kl": {"coefficient": 0.0}, "max_grad_norm": 1e9, **settings})
    learner = GRPOLearner(config, device="cpu")
    learner.load(checkpoint, reference=reference, resume_from=resume_from)
    return learner


def make_samples(seed: int = 0) -> list[TrainSample]:
    """Draw samples of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length, num_sampled in SHAPES:
        mask = [index >= length - num_sampled for index in range(length)]
        advantage = torch.randn((), generator=generator).item()
        samples.append(
            TrainSample(
                token_ids=torch.randint(6, 60, (length,), generator=generator).tolist(),
                loss_mask=mask,
                generator_logprobs=[0.0] * length,
                advantages=[advantage if trains else 0.0 for trains in mask],
            )
        )
    return samples


def on_policy(learner: GRPOLearner, samples: list[TrainSample]) -> list[TrainSample]:
    """Give the samples the log-probabilities of the learner's own weights."""
    return [
        TrainSample(
            token_ids=sample.token_ids,
            loss_mask=sample.loss_mask,
            generator_logprobs=[
                value if trains else 0.0
                for value, trains in zip(row, sample.loss_mask, strict=True)
            ],
            advantages=sample.advantages,
        )
        for sample, row in zip(samples, learner.token_logprobs(samples), strict=True)
    ]


def step(learner: GRPOLearner, samples: list[TrainSample]) -> dict[str, float]:
    """Take a step on samples."""
    return learner.train_step(samples, totals=count_totals(samples, rollout_token_limit=8))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, atol: float) -> None:
    """Compare names and values."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, atol=atol, rtol=0, msg=lambda m, name=name: f"{name} {m}"
        )


def plain_logprobs(folder: Path, sample: TrainSample, temperature: float) -> Tensor:
    """Score one sample without padding, batches or any code of ours."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([sample.token_ids])
    with torch.no_grad():
        table = torch.log_softmax(model(ids).logits[0] / temperature, dim=-1)
    return torch.tensor([0.0] + [table[t - 1, ids[0, t]].item() for t in range(1, ids.shape[1])])
