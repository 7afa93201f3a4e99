"""Whole GRPO runs through real actors, under the settings that change what the actors do."""

import time

import pytest
import torch

from past_ray.config.runtime import GeneratorConfig
from past_ray.config.sft import LoraConfig
from past_ray.envs.base import EnvStep
from past_ray.rl.rollout_table import read_rollouts
from tests.rl_runs import RL, assert_every_group_trained_once, run_grpo, runtime
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

SHORT = RL.model_copy(update={"num_steps": 3, "checkpoint_every_steps": 3})
VLLM = GeneratorConfig(max_model_len=128, max_num_seqs=32, kv_cache_gib=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=True)


def test_two_learners_take_the_steps_of_one(folder, tmp_path):
    one, rows_of_one, *_ = run_grpo(folder, tmp_path / "one", rl=SHORT)
    two, rows_of_two, *_ = run_grpo(
        folder, tmp_path / "two", rl=SHORT, config=runtime(num_learners=2, cpus_per_learner=0.25)
    )
    for left, right in zip(rows_of_one, rows_of_two, strict=True):
        assert left["reward"] == right["reward"]
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
    # Adam follows the sign of a gradient that is rounding noise; all others agree.
    for name in one:
        differing = (one[name] - two[name]).abs() > 1e-5
        assert differing.float().mean() < 1e-2, name


def test_an_adapter_run_syncs_the_adapter_alone_into_vllm(folder, tmp_path):
    rl = SHORT.model_copy(
        update={
            "lora": LoraConfig(rank=4, alpha=8, target_modules=("q_proj", "v_proj")),
            "learning_rate": 1e-2,
        }
    )
    weights, rows, *_ = run_grpo(
        folder, tmp_path, rl=rl, config=runtime(generator=VLLM, sync_timeout_s=120)
    )
    assert all(row["logprob_gap"] < 1e-4 for row in rows)
    versions = {
        rollout.policy_version
        for step in range(3)
        for group in read_rollouts(tmp_path, step + 1)
        for rollout in group.rollouts
    }
    assert versions == {0, 1, 2}
    assert max(row["grad_norm"] for row in rows) > 0
    assert not any(".lora_" in name for name in weights)


def counting_env():
    """Return a class that is pickled by value, as workers cannot import this file."""

    class CountingEnv:
        """Three turns; each waits a little and rewards a longer answer."""

        def __init__(self, example):
            self._example = example
            self._num_turns = 0

        def reset(self):
            return list(self._example.messages)

        def step(self, answer):
            time.sleep(0.02)
            self._num_turns += 1
            return EnvStep(
                reward=float(len(answer) % 5),
                is_done=self._num_turns == 3,
                messages=[{"role": "user", "content": "yes ?"}],
                reward_parts={"length": float(len(answer))},
            )

    return CountingEnv


@pytest.mark.parametrize("on_sync", ["finish", "resume"])
def test_several_turns_ahead_of_the_learner_with_turn_advantages(folder, tmp_path, on_sync):
    rl = RL.model_copy(
        update={"max_staleness": 2, "max_turns": 3, "advantage": "turn", "num_steps": 5}
    )
    generator = VLLM.model_copy(update={"on_sync": on_sync})
    _, rows, *_ = run_grpo(
        folder, tmp_path, rl=rl, config=runtime(generator=generator), make_env=counting_env()
    )
    assert_every_group_trained_once(tmp_path, rl)
    assert 1 <= max(row["staleness_max"] for row in rows) <= 2
    assert all(0 <= row["generator_idle_frac"] <= 1 for row in rows)
    assert all(0 <= row["learner_idle_frac"] <= 1 for row in rows)
    rollout = read_rollouts(tmp_path, 5)[0].rollouts[0]
    assert len(rollout.turns) == 3
    assert rollout.reward == sum(turn.reward for turn in rollout.turns)
    assert rollout.reward_parts["length"] > 0
    assert rollout.environment_s >= 0.06


def test_a_synchronous_run_is_the_same_twice_bit_for_bit_with_vllm(folder, tmp_path):
    config = runtime(generator=VLLM)
    first, *_ = run_grpo(folder, tmp_path / "a", rl=SHORT, config=config)
    again, *_ = run_grpo(folder, tmp_path / "b", rl=SHORT, config=config)
    assert all(torch.equal(first[name], again[name]) for name in first)
