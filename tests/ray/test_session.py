"""Real actors: vLLM generator, learner, weight sync through the object store."""

import asyncio
from functools import partial

import pytest
import torch

from past_ray.config.algorithm import KLConfig
from past_ray.config.rl import RLConfig
from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.errors import ClusterError, ParityError
from past_ray.rl.types import SamplingParams
from past_ray.runtime.rollout_worker import GroupTask, RolloutPlan
from past_ray.runtime.session import RLSession
from past_ray.skill.checkpoint import load_weights
from past_ray.tasks.examples import QAExample
from past_ray.tasks.grading import exact_match
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

RL = RLConfig(kl=KLConfig(coefficient=0.0), temperature=0.7)
MAKE_ENV = partial(ClosedBookQA, grade=exact_match)
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=4)
EXAMPLES = [
    QAExample(question_id=f"q{i}", messages=({"role": "user", "content": text},), answer="paris")
    for i, text in enumerate(["where does anna live ?", "what pet has ben ?"])
]
PROBE = [[4, 8, 12, 5], [4, 9, 20, 11, 5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=1, tie_word_embeddings=True)


def runtime(**generator) -> RuntimeConfig:
    return RuntimeConfig(
        cpus_per_generator=0.5,
        cpus_per_learner=0.5,
        placement_timeout_s=60,
        generator=GeneratorConfig(**{"max_model_len": 64, "kv_cache_gib": 0.125, **generator}),
    )


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def session(cluster, folder, loop):
    opened = RLSession(runtime(), RL, model_folder=folder, make_env=MAKE_ENV)
    loop.run(opened.open())
    yield opened
    opened.close()


def collect(session, loop, *, group_size: int):
    tasks = [GroupTask(group_id=f"0/{e.question_id}", example=e) for e in EXAMPLES]
    plan = RolloutPlan(group_size=group_size, sampling=GREEDY, seed=0, env_timeout_s=10)
    return loop.run(session.collect(tasks, plan, is_exact=True))


def answers(session, loop) -> list[list[int]]:
    groups = collect(session, loop, group_size=1)
    return [group.rollouts[0].turns[0].completion.token_ids for group in groups]


def test_generator_and_learner_agree_after_a_sync_of_other_weights(session, other, loop):
    loop.run(session.load_learners(other, reference=None, resume_from=None))
    result = loop.run(session.sync_weights(0, probe=PROBE))
    assert 0 < result.logprob_gap < 1e-4


def test_evaluated_weights_answer_like_the_folder_they_came_from(session, folder, other, loop):
    loop.run(session.load_generators(load_weights(folder), policy_version=1))
    first = answers(session, loop)
    loop.run(session.load_generators(load_weights(other), policy_version=2))
    assert answers(session, loop) != first
    loop.run(session.load_generators(load_weights(folder), policy_version=3))
    assert answers(session, loop) == first


def test_rollouts_carry_the_version_of_the_weights(session, folder, loop):
    loop.run(session.load_generators(load_weights(folder), policy_version=17))
    groups = collect(session, loop, group_size=2)
    assert [group.question_id for group in groups] == ["q0", "q1"]
    assert {rollout.policy_version for group in groups for rollout in group.rollouts} == {17}


def test_a_missed_tensor_fails_the_sync_with_its_name(session, folder, loop):
    weights = load_weights(folder)
    del weights["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ClusterError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        loop.run(session.load_generators(weights, policy_version=4))


def test_a_generator_in_16_bit_fails_the_parity_probe(cluster, folder, loop, session):
    session.close()  # Makes room; this is the last test that needs it.
    coarse = RLSession(
        runtime(backend="transformers", dtype="bfloat16"),
        RL,
        model_folder=folder,
        make_env=MAKE_ENV,
    )
    loop.run(coarse.open())
    try:
        loop.run(coarse.load_learners(folder, reference=None, resume_from=None))
        with pytest.raises(ParityError, match=r"must agree within 0\.0001 nats.*rl\.precision"):
            loop.run(coarse.sync_weights(0, probe=PROBE))
    finally:
        coarse.close()
    assert torch.get_default_dtype() == torch.float32


def test_actors_that_cannot_be_placed_fail_with_numbers_not_with_a_hang(cluster, folder, loop):
    wanting = RLSession(
        runtime().model_copy(update={"cpus_per_generator": 7.0, "placement_timeout_s": 3.0}),
        RL,
        model_folder=folder,
        make_env=MAKE_ENV,
    )
    with pytest.raises(ClusterError, match=r"they ask for 7\.6 CPUs.*free now are"):
        loop.run(wanting.open())
