import asyncio
import random
import time
from dataclasses import replace
from functools import partial

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.fake import FakeGenerator, scripted
from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.errors import ActorLostError, ClusterError
from past_ray.rl.types import RolloutStatus, SamplingParams
from past_ray.runtime.generator_actor import GeneratorActor, GeneratorShell
from past_ray.runtime.rollout_worker import (
    GenerateBatcher,
    GroupTask,
    RolloutPlan,
    RolloutWorkerActor,
    RolloutWorkerShell,
)
from past_ray.tasks.examples import QAExample
from past_ray.tasks.grading import exact_match
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

MAKE_ENV = partial(ClosedBookQA, grade=exact_match)
CONFIG = GeneratorConfig(backend="transformers", max_model_len=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def generators(cluster, folder):
    """A real vLLM engine and a transformers one behind the same actor."""
    actors = [
        GeneratorActor.options(num_cpus=0.5).remote(config, folder)
        for config in (GeneratorConfig(max_model_len=32, kv_cache_gib=0.125), CONFIG)
    ]
    ray.get([actor.setup.remote() for actor in actors])
    return actors


class Worker:
    """A worker actor and the generators it is told to use."""

    def __init__(self, folder, generators):
        self.actor = RolloutWorkerActor.options(num_cpus=0.1).remote(folder, MAKE_ENV)
        self.generators = generators
        ray.get(self.actor.setup.remote())


@pytest.fixture(scope="module")
def worker(generators, folder):
    return Worker(folder, generators)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def examples(num_examples, *, answer="oslo"):
    words = ["anna", "ben", "clara", "david", "emma", "felix"]
    return [
        QAExample(
            question_id=f"q{index}",
            messages=({"role": "user", "content": f"where does {words[index]} lives ?"},),
            answer=answer,
        )
        for index in range(num_examples)
    ]


def sampling(*, temperature=1.0, max_new_tokens=4):
    return SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens)


def plan(*, group_size=4, params=None, seed=11):
    return RolloutPlan(
        group_size=group_size, sampling=params or sampling(), seed=seed, env_timeout_s=10
    )


def tasks(asked, *, step=2):
    return [GroupTask(group_id=f"{step}/{e.question_id}", example=e) for e in asked]


def collect(worker, asked, *, step=2, **settings):
    share = ray.get(
        worker.actor.collect.remote(tasks(asked, step=step), worker.generators, plan(**settings))
    )
    assert share.lost_generators == []
    return list(share.groups.values())


def test_groups_come_in_order_with_every_rollout_completed_and_versioned(
    worker, generators, folder
):
    weights = ray.put(dict(load(folder).named_parameters()))
    ray.get([actor.update_weights.remote(weights, 6) for actor in generators])
    assert ray.get([actor.version.remote() for actor in generators]) == [6, 6]
    groups = collect(worker, examples(3))
    assert [group.question_id for group in groups] == ["q0", "q1", "q2"]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert [r.rollout_id for r in rollouts[:4]] == ["2/q0/0", "2/q0/1", "2/q0/2", "2/q0/3"]
    assert {rollout.status for rollout in rollouts} == {RolloutStatus.COMPLETED}
    assert {rollout.policy_version for rollout in rollouts} == {6}
    assert {rollout.reward for rollout in rollouts} <= {0.0, 1.0}


def test_prompts_are_the_chat_template_and_answers_the_decoded_completion(worker, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rollout = collect(worker, examples(1))[0].rollouts[0]
    turn = rollout.turns[0]
    assert tokenizer.decode(turn.prompt_ids) == "<user> where does anna lives ? <eos> <assistant>"
    decoded = tokenizer.decode(turn.completion.token_ids, skip_special_tokens=True)
    assert rollout.answer == decoded.strip()


def test_the_same_seed_and_step_give_the_same_rollouts_and_another_step_does_not(
    worker, generators
):
    # Two engines would draw differently for one seed, so one question goes to each.
    first = collect(worker, examples(2), group_size=1)
    again = collect(worker, examples(2), group_size=1)
    other = collect(worker, examples(2), group_size=1, step=3)
    tokens = [
        [rollout.turns[0].completion.token_ids for group in groups for rollout in group.rollouts]
        for groups in (first, again, other)
    ]
    assert tokens[0] == tokens[1] != tokens[2]


def test_greedy_groups_of_one_equal_transformers_own_answer(worker, folder):
    model = load(folder)
    groups = collect(worker, examples(4), group_size=1, params=sampling(temperature=0.0))
    for group in groups:
        turn = group.rollouts[0].turns[0]
        expected = model.generate(
            torch.tensor([turn.prompt_ids]), do_sample=False, max_new_tokens=4, pad_token_id=0
        )[0, len(turn.prompt_ids) :]
        assert turn.completion.token_ids == expected.tolist()


def test_a_prompt_that_does_not_fit_fails_alone(worker):
    long = QAExample(
        question_id="long",
        messages=({"role": "user", "content": "anna " * 40},),
        answer="oslo",
    )
    groups = collect(worker, [*examples(2), long])
    statuses = [{rollout.status for rollout in group.rollouts} for group in groups]
    assert statuses == [{"completed"}, {"completed"}, {"generation_error"}]
    failed = groups[2].rollouts[0]
    assert "max_model_len=32" in failed.error
    assert (failed.reward, failed.policy_version) == (None, -1)


def test_groups_of_a_dead_generator_are_missing_and_it_is_named(generators, folder):
    dead = GeneratorActor.options(num_cpus=0.1).remote(CONFIG, folder)
    ray.get(dead.setup.remote())
    ray.kill(dead)
    worker = Worker(folder, [dead, generators[1]])
    share = ray.get(
        worker.actor.collect.remote(tasks(examples(4)), worker.generators, plan(group_size=1))
    )
    # Single-rollout groups are dealt round: every second one went to the dead generator.
    assert list(share.groups) == ["2/q1", "2/q3"]
    assert share.lost_generators == [0]


class RecordingHandle:
    """Looks like an actor handle; records the size of every call."""

    def __init__(self):
        self.calls = []
        self._generator = FakeGenerator(scripted([[5]]))
        self.generate_each = self

    async def remote(self, prompts, params):
        self.calls.append([prompt[0] for prompt in prompts])
        await asyncio.sleep(0)
        return self._generator.generate(prompts, params)


def test_prompts_of_one_tick_are_one_call_per_generator_dealt_round():
    handles = [RecordingHandle(), RecordingHandle()]

    async def run():
        batcher = GenerateBatcher(handles)
        await asyncio.gather(*(batcher.generate([index], sampling()) for index in range(5)))
        await batcher.generate([9], sampling())

    asyncio.run(run())
    # The last prompt goes to the second generator: the first one got the fifth.
    assert handles[0].calls == [[0, 2, 4]]
    assert handles[1].calls == [[1, 3], [9]]


class DawdlingEnv(ClosedBookQA):
    """Takes a random time to pose its question."""

    def __init__(self, example):
        super().__init__(example, exact_match)

    def reset(self):
        time.sleep(random.random() * 0.02)
        return super().reset()


def test_prompts_in_lockstep_wait_for_all_rollouts_that_still_run():
    handle = RecordingHandle()

    async def run():
        batcher = GenerateBatcher([handle], lockstep_of=3)
        seeded = [replace(sampling(), seed=seed) for seed in (5, 9)]
        first = asyncio.ensure_future(batcher.generate([1], seeded[1]))
        second = asyncio.ensure_future(batcher.generate([2], seeded[0]))
        await asyncio.sleep(0.01)
        assert handle.calls == []
        batcher.rollout_ended()
        await asyncio.gather(first, second)

    asyncio.run(run())
    assert handle.calls == [[2, 1]]  # By seed, not by arrival.


def test_in_lockstep_all_rollouts_leave_in_one_call_however_long_environments_take(folder):
    handle = RecordingHandle()
    shell = RolloutWorkerShell(folder, DawdlingEnv)
    lockstep = replace(plan(group_size=8), is_lockstep=True)

    async def run():
        await shell.setup()
        return await shell.collect(tasks(examples(6)), [handle], lockstep)

    share = asyncio.run(run())
    assert len(share.groups) == 6
    assert [len(call) for call in handle.calls] == [48]


def test_a_lost_generator_is_an_error_of_its_own_for_each_prompt():
    from ray.exceptions import RayActorError

    class Dead(RecordingHandle):
        async def remote(self, prompts, params):
            raise RayActorError()

    async def run():
        batcher = GenerateBatcher([Dead()])
        with pytest.raises(ActorLostError):
            await batcher.generate([1], sampling())
        assert batcher.lost == {0}

    asyncio.run(run())


def test_a_generator_actor_must_be_set_up_first(folder):
    shell = GeneratorShell(CONFIG, folder)
    with pytest.raises(ClusterError, match="setup"):
        asyncio.run(shell.generate([[5]], [sampling()]))
