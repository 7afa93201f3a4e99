"""Two learners as two processes with gloo take the steps of one, without Ray."""

import json
from pathlib import Path

import pytest
import torch

from past_ray.config.rl import RLConfig
from past_ray.config.sft import LoraConfig
from past_ray.engine.learner import GRPOLearner
from past_ray.engine.learner_checkpoint import verify_checkpoint
from past_ray.rl.batching import split_over_ranks
from past_ray.rl.objective import count_totals
from past_ray.rl.types import TrainSample
from past_ray.skill.checkpoint import load_weights
from tests.ranks import run_ranks
from tests.tiny_learner import make_samples, on_policy
from tests.tiny_model import make_tiny_model

LEARNING_RATE = 1e-4
"""Adam turns rounding noise in a gradient near 0 into a visible part of the learning rate."""

RECIPES = {
    # A budget of 16 tokens gives the ranks different numbers of packs.
    "grpo": {"max_tokens_per_micro_batch": 16},
    "gspo": {"algorithm": {"kind": "gspo"}, "max_tokens_per_micro_batch": 16},
    "lora": {"lora": LoraConfig(rank=4, alpha=8), "max_tokens_per_micro_batch": 16},
    "checkpointed": {
        "gradient_checkpointing": True,
        "entropy_coefficient": 0.01,
        "kl": {"coefficient": 0.1},
    },
}


def batches() -> list[list[TrainSample]]:
    """Uneven shares; one sample, so that the second rank has none; three, not divisible by two."""
    return [make_samples(0), make_samples(1)[:1], make_samples(2)[:3]]


def make(folder: Path, recipe: str, **more: object) -> GRPOLearner:
    settings = {"kl": {"coefficient": 0.0}, "learning_rate": LEARNING_RATE, **RECIPES[recipe]}
    learner = GRPOLearner(RLConfig(**{**settings, **more}), device="cpu")
    learner.load(folder, reference=folder, resume_from=None)
    return learner


def run(learner: GRPOLearner, rank: int, world_size: int) -> list[dict[str, float]]:
    learned_from = [on_policy(learner, batch) for batch in batches()]
    return [
        learner.train_step(
            split_over_ranks(batch, world_size)[rank],
            totals=count_totals(batch, rollout_token_limit=8),
        )
        for batch in learned_from
    ]


def train(rank: int, world_size: int, model: Path, out: Path) -> None:
    """Take the steps of every recipe; save weights, metrics and what the other methods return."""
    for recipe in RECIPES:
        learner = make(model, recipe)
        metrics = run(learner, rank, world_size)
        learner.save(out / recipe, extra_files={"position.json": b"7"})
        adapter = learner.export_adapter()
        report = {
            "metrics": metrics,
            "logprobs": learner.token_logprobs(make_samples(3)),
            "adapter": None if adapter is None else sorted(adapter.tensors),
            "exports": len(learner.export_weights()),
        }
        (out / f"{recipe}-{rank}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of one rank and of two."""
    root = tmp_path_factory.mktemp("sharded")
    model = make_tiny_model(root / "model", tie_word_embeddings=True)
    for world_size in (1, 2):
        (root / str(world_size)).mkdir()
        run_ranks(train, world_size, model, root / str(world_size))
    return root


def report(runs: Path, world_size: int, recipe: str, rank: int = 0) -> dict:
    return json.loads((runs / f"{world_size}/{recipe}-{rank}.json").read_text())


def assert_same_steps(ours: Path, theirs: Path) -> None:
    """Compare weights and gradients' running means within 1e-5, of the largest for the latter.

    Where a gradient is rounding noise (always in a key bias, which moves no attention; elsewhere
    in single elements), Adam steps by the learning rate in the direction of its sign.
    """
    means = [torch.load(folder / "optimizer.pt")["state"] for folder in (ours, theirs)]
    assert means[0].keys() == means[1].keys()
    largest = max(float(state["exp_avg"].abs().max()) for state in means[1].values())
    for name, state in means[1].items():
        atol = 1e-5 * largest
        torch.testing.assert_close(means[0][name]["exp_avg"], state["exp_avg"], atol=atol, rtol=0)
    weights, expected = load_weights(ours), load_weights(theirs)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        difference = (weights[name] - weight).abs()
        assert difference.max() <= 2 * len(batches()) * LEARNING_RATE + 1e-5, name
        if not name.endswith("k_proj.bias"):
            assert (difference > 1e-5).float().mean() < 1e-3, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_take_the_steps_of_one(runs: Path, recipe: str):
    one, two = (report(runs, world_size, recipe) for world_size in (1, 2))
    for ours, theirs in zip(two["metrics"], one["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert_same_steps(runs / "2" / recipe, runs / "1" / recipe)


@pytest.mark.parametrize("recipe", ["grpo", "gspo", "lora"])
@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_any_split_into_packs_takes_the_steps_of_two_ranks(
    runs: Path, tmp_path: Path, recipe: str, max_tokens: int
):
    learner = make(runs / "model", recipe, max_tokens_per_micro_batch=max_tokens)
    run(learner, 0, 1)
    learner.save(tmp_path / "saved")
    assert_same_steps(tmp_path / "saved", runs / "2" / recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_moved_the_weights_ten_times_the_tolerance(runs: Path, recipe: str):
    before, after = load_weights(runs / "model"), load_weights(runs / "2" / recipe)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (after[name] - before[name]).abs().max() > LEARNING_RATE


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_rank_has_the_metrics_of_the_step_and_rank_0_alone_the_weights(
    runs: Path, recipe: str
):
    first, second = (report(runs, 2, recipe, rank) for rank in (0, 1))
    assert first["metrics"] == second["metrics"]
    assert first["logprobs"] == second["logprobs"]
    assert first["exports"] > 0 == second["exports"]
    assert second["adapter"] is None
    assert first["adapter"] == report(runs, 1, recipe)["adapter"]
    assert (first["adapter"] is not None) == (recipe == "lora")


@pytest.mark.parametrize("recipe", ["grpo", "lora"])
def test_one_rank_continues_what_two_saved(runs: Path, tmp_path: Path, recipe: str):
    saved = runs / "2" / recipe
    verify_checkpoint(saved)
    learner = make(runs / "model", recipe)
    assert learner.load(runs / "model", reference=None, resume_from=saved) == 3
    learner.save(tmp_path / "again")
    assert_same_steps(tmp_path / "again", saved)
