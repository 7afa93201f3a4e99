"""Real processes are killed or stopped; the run goes on as if nothing had happened."""

import asyncio
import os
import signal
from functools import partial

import pytest
import ray
import torch

from past_ray.config.algorithm import KLConfig
from past_ray.config.rl import RLConfig
from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.rl.rollout_table import read_rollouts
from past_ray.runtime.controller import RLRun, train_grpo
from past_ray.runtime.session import RLSession
from past_ray.skill.checkpoint import load_weights
from past_ray.storage import read_jsonl
from past_ray.tasks.examples import QAExample
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

RL = RLConfig(
    num_steps=6,
    prompts_per_step=3,
    group_size=4,
    learning_rate=1e-3,
    max_new_tokens=8,
    kl=KLConfig(coefficient=0.01),
    checkpoint_every_steps=2,
)
EXAMPLES = [
    QAExample(question_id=f"q{i}", messages=({"role": "user", "content": word},), answer="")
    for i, word in enumerate(["anna", "ben", "clara", "david", "emma", "felix", "cat", "dog"])
]
PROBE = [[4, 8, 12, 5], [4, 9, 20, 11, 5]]


LENGTH_REWARD = lambda answer, gold: float(len(answer) % 7)  # noqa: E731 - pickled by value
"""Groups of a random model have answers of different lengths."""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        _temp_dir="/tmp/r_faults",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=True)


def runtime(**changes) -> RuntimeConfig:
    shares = {
        "cpus_per_generator": 0.5,
        "cpus_per_learner": 0.5,
        "heartbeat_interval_s": 0.3,
        "heartbeat_timeout_s": 5,
        "restart_backoff_s": 0.1,
    }
    generator = GeneratorConfig(
        backend="transformers", max_model_len=64, max_num_seqs=16, kv_cache_gib=0.1
    )
    return RuntimeConfig(**{**shares, "generator": generator, **changes})


def pid_of(actor) -> int:
    """Pid of an actor's process."""
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def run_grpo(folder, work_dir, *, rl=RL, disturb=None, config=None):
    """Train; ``disturb(session, row)`` is awaited after every step."""
    rows: list[dict] = []

    async def train():
        session = RLSession(
            config or runtime(),
            rl,
            model_folder=folder,
            make_env=partial(ClosedBookQA, grade=LENGTH_REWARD),
        )
        pending = []

        def on_step(row):
            rows.append(row)
            if disturb is not None:
                pending.append(asyncio.ensure_future(disturb(session, row)))

        try:
            await session.open()
            run = RLRun(init_folder=folder, reference_folder=folder, work_dir=work_dir, seed=0)
            last = await train_grpo(
                session, run, rl, examples=EXAMPLES, probe=PROBE, on_step=on_step
            )
            await asyncio.gather(*pending)
            return last, session.num_restarts, session.num_requeued
        finally:
            session.close()

    last, restarts, requeued = asyncio.run(asyncio.wait_for(train(), 240))
    return load_weights(last), rows, restarts, requeued


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


def assert_every_group_trained_once(work_dir, rl=RL):
    ids = [
        rollout.rollout_id
        for step in range(rl.num_steps)
        for group in read_rollouts(work_dir, step + 1)
        for rollout in group.rollouts
    ]
    assert len(ids) == len(set(ids)) == rl.num_steps * rl.prompts_per_step * rl.group_size
    assert [row["step"] for row in read_jsonl(work_dir / "metrics.jsonl")] == list(
        range(1, rl.num_steps + 1)
    )


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
