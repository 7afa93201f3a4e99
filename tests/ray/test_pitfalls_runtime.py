"""Known pitfalls of RL systems, those of processes: one session of real actors for all of them.

Each test is named after the pitfall's number: 6 a sync that hangs, 15 placement, 16 a dead actor.
"""

import asyncio
import os
import signal
import time
from functools import partial

import pytest
import ray

from past_ray.config.algorithm import KLConfig
from past_ray.config.rl import RLConfig
from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.errors import ClusterError
from past_ray.rl.types import SamplingParams
from past_ray.runtime.placement import place
from past_ray.runtime.rollout_worker import GroupTask, RolloutPlan
from past_ray.runtime.session import RLSession
from past_ray.tasks.examples import QAExample
from past_ray.tasks.grading import exact_match
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

PROBE = [[3, 6, 7, 4], [3, 10, 11, 4]]
SYNC_TIMEOUT_S = 2.0
EXAMPLES = [
    QAExample(question_id=f"q{i}", messages=({"role": "user", "content": word},), answer="paris")
    for i, word in enumerate(["anna", "ben"])
]


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def session(cluster, loop, tmp_path_factory):
    """Heartbeats come rarely: what is found here is found by who waits."""
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    config = RuntimeConfig(
        cpus_per_generator=0.5,
        cpus_per_learner=0.5,
        sync_timeout_s=60.0,
        heartbeat_interval_s=100,
        heartbeat_timeout_s=100,
        restart_backoff_s=0.1,
        generator=GeneratorConfig(backend="transformers", max_model_len=64),
    )
    rl = RLConfig(kl=KLConfig(coefficient=0.0), temperature=0.7)
    opened = RLSession(
        config, rl, model_folder=folder, make_env=partial(ClosedBookQA, grade=exact_match)
    )
    loop.run(opened.open())
    loop.run(opened.load_learners(folder, reference=None, resume_from=None))
    loop.run(opened.sync_weights(1, probe=PROBE))
    yield opened
    opened.close()


def pid_of(session) -> int:
    handle = session.generators[0].handle
    return ray.get(handle.__ray_call__.remote(lambda self: os.getpid()))


def collect(session):
    plan = RolloutPlan(
        group_size=2,
        sampling=SamplingParams(temperature=1.0, max_new_tokens=4),
        seed=0,
        env_timeout_s=10,
    )
    tasks = [GroupTask(group_id=f"0/{e.question_id}", example=e) for e in EXAMPLES]
    return session.collect(tasks, plan)


def test_pitfall_16_a_killed_generator_comes_back_with_the_current_weights_and_loses_no_group(
    session, loop
):
    async def disturbed():
        before = await collect(session)
        os.kill(await asyncio.to_thread(pid_of, session), signal.SIGKILL)
        return before, await collect(session)

    before, after = loop.run(asyncio.wait_for(disturbed(), 60))
    assert session.generators[0].num_restarts == 1
    # The very rollouts again: same ids, same version, same tokens.
    for old, new in zip(before, after, strict=True):
        for left, right in zip(old.rollouts, new.rollouts, strict=True):
            assert (left.rollout_id, left.policy_version) == (right.rollout_id, 1)
            assert left.turns == right.turns
    assert 0 < loop.run(session.sync_weights(2, probe=PROBE)).logprob_gap < 1e-4


def test_pitfall_06_a_sync_to_a_generator_that_hangs_fails_in_time_and_the_next_one_works(
    session, loop, monkeypatch
):
    pid = pid_of(session)
    short = session._sync._config.model_copy(update={"sync_timeout_s": SYNC_TIMEOUT_S})
    monkeypatch.setattr(session._sync, "_config", short)
    os.kill(pid, signal.SIGSTOP)
    started = time.perf_counter()
    try:
        with pytest.raises(ClusterError, match=r"must end within 2 s, version 3 did not"):
            loop.run(session.sync_weights(3, probe=PROBE))
        assert time.perf_counter() - started < SYNC_TIMEOUT_S + 5
    finally:
        os.kill(pid, signal.SIGCONT)
    monkeypatch.undo()
    assert 0 < loop.run(session.sync_weights(4, probe=PROBE)).logprob_gap < 1e-4
    assert {r.policy_version for group in loop.run(collect(session)) for r in group.rollouts} == {4}


def test_pitfall_15_what_cannot_be_placed_fails_in_time_with_numbers_and_keeps_nothing_reserved(
    cluster,
):
    config = RuntimeConfig(num_generators=3, placement_timeout_s=1.0)
    started = time.perf_counter()
    with pytest.raises(ClusterError, match=r"within 1 s; they ask for 4\.1 CPUs .* free now are"):
        place(config)
    assert time.perf_counter() - started < 10
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert "PENDING" not in states
