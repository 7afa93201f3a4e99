"""Real processes are killed or stopped; the run goes on as if nothing had happened."""

import asyncio
import os
import signal

import pytest
import ray
import torch

from tests.rl_runs import RL, assert_every_group_trained_once, run_grpo, runtime
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=True)


def pid_of(actor) -> int:
    """Pid of an actor's process."""
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    weights, rows, restarts, requeued = run_grpo(folder, tmp_path_factory.mktemp("whole"))
    assert (restarts, requeued) == (0, 0)
    assert len(rows) == RL.num_steps
    return weights


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name


def killer(role: str, after: int, sent: list, signal_number=signal.SIGKILL):
    """Kill the process of ``role`` a moment after step ``after``, while the next one is sampled."""

    async def disturb(session, row):
        if row["step"] == after and not sent:
            sent.append(role)
            handle = {
                "generator": lambda: session.generators[0].handle,
                "worker": lambda: session.workers[0].handle,
                "learner": lambda: session._learners.handles[0],
            }[role]()
            pid = await asyncio.to_thread(pid_of, handle)
            os.kill(pid, signal_number)

    return disturb


@pytest.mark.parametrize("role", ["generator", "worker", "learner"])
def test_a_killed_process_changes_no_bit_of_a_synchronous_run(folder, undisturbed, tmp_path, role):
    sent: list = []
    weights, _, restarts, _ = run_grpo(folder, tmp_path, disturb=killer(role, 3, sent))
    assert sent
    assert restarts >= 1
    assert_every_group_trained_once(tmp_path)
    assert_same(weights, undisturbed)


def test_a_stopped_generator_is_found_by_its_heartbeat(folder, undisturbed, tmp_path):
    sent: list = []
    disturb = killer("generator", 2, sent, signal.SIGSTOP)
    weights, _, restarts, _ = run_grpo(
        folder, tmp_path, disturb=disturb, config=runtime(heartbeat_timeout_s=2)
    )
    assert restarts >= 1
    assert_same(weights, undisturbed)


def test_an_asynchronous_run_loses_and_repeats_no_group(folder, tmp_path):
    rl = RL.model_copy(update={"max_staleness": 1})
    sent: list = []
    _, rows, restarts, _ = run_grpo(folder, tmp_path, rl=rl, disturb=killer("generator", 2, sent))
    assert restarts >= 1
    assert_every_group_trained_once(tmp_path, rl)
    assert max(row["staleness_max"] for row in rows) <= 1


def test_a_replaced_generator_has_the_current_weights(folder, tmp_path):
    seen: list = []

    async def disturb(session, row):
        if row["step"] == 3:
            generator = session.generators[0]
            os.kill(await asyncio.to_thread(pid_of, generator.handle), signal.SIGKILL)
        if session.generators[0].num_restarts and session.generators[0].is_ready:
            stats = await session.generators[0].handle.ping.remote()
            seen.append((stats.policy_version, row["step"]))

    _, rows, _, _ = run_grpo(folder, tmp_path, disturb=disturb)
    assert seen
    assert all(version >= step for version, step in seen)
    assert all(row["logprob_gap"] < 1e-4 for row in rows)
