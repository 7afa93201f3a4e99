"""Two ranks as two processes with gloo, without Ray."""

import json
from pathlib import Path

import pytest
import torch

from past_ray.config.sft import LoraConfig, SFTConfig
from past_ray.engine.sft_loop import SFTLearner
from past_ray.engine.sharding import full_state_dict, optimizer_state
from past_ray.sft.examples import SFTExample
from past_ray.skill.checkpoint import load_weights
from tests.ranks import run_ranks
from tests.tiny_model import make_tiny_model

BATCH = [
    SFTExample(token_ids=tuple(range(3, 3 + length)), num_prompt_tokens=1)
    for length in (12, 9, 6, 3, 3, 2)
]
RECIPES = {
    # A budget of 12 tokens gives rank 0 three micro-batches and rank 1 two.
    "full": {"max_tokens_per_micro_batch": 12},
    "lora": {"lora": LoraConfig(rank=2, alpha=4)},
}


def learner(folder, recipe):
    sft = SFTConfig(num_steps=4, learning_rate=1e-3, warmup_frac=0.0, **RECIPES[recipe])
    return SFTLearner(Path(folder), sft, seed=3, device="cpu")


def train_and_resume(rank, world_size, model_folder, out):
    """Train 4 steps, and 2 steps twice with a checkpoint between; write what rank 0 has."""
    for recipe in RECIPES:
        whole, first, second = (learner(model_folder, recipe) for _ in range(3))
        share = BATCH[rank::world_size]
        losses = [whole.train_step(share).loss for _ in range(4)]
        for _ in range(2):
            first.train_step(share)
        folder = out / f"{recipe}-state"
        folder.mkdir(exist_ok=True)
        first.save(folder)
        if world_size > 1:
            torch.distributed.barrier()
        second.load(folder)
        for _ in range(2):
            second.train_step(share)
        whole.export(out / recipe)
        second.export(out / f"{recipe}-resumed")
        states = full_state_dict(whole._model), optimizer_state(whole._model, whole._optimizer)
        is_whole = [bool(state) for state in states]
        (out / f"{recipe}-{rank}.json").write_text(json.dumps([losses, is_whole]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Outputs of one rank and of two ranks."""
    root = tmp_path_factory.mktemp("sharded")
    model = make_tiny_model(root / "model", tie_word_embeddings=True)
    for world_size in (1, 2):
        (root / str(world_size)).mkdir()
        run_ranks(train_and_resume, world_size, model, root / str(world_size))
    return root


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_equal_one(runs, recipe):
    (one, _), (two, _), (other, _) = (
        json.loads((runs / f"{world}/{recipe}-{rank}.json").read_text())
        for world, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert two == other
    assert two == pytest.approx(one, abs=1e-4)
    torch.testing.assert_close(
        load_weights(runs / "2" / recipe), load_weights(runs / "1" / recipe), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_resuming_equals_no_interruption_bit_for_bit(runs, recipe, world_size):
    whole, resumed = (
        load_weights(runs / str(world_size) / name) for name in (recipe, f"{recipe}-resumed")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_only_rank_0_gathers_a_full_state(runs):
    holds = [json.loads((runs / f"2/full-{rank}.json").read_text())[1] for rank in (0, 1)]
    assert holds == [[True, True], [False, False]]
