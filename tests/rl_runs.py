"""Short GRPO runs on a real Ray with real learners, for the tests of tests/ray."""

import asyncio
from functools import partial

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

MAKE_ENV = partial(ClosedBookQA, grade=LENGTH_REWARD)


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


def run_grpo(folder, work_dir, *, rl=RL, disturb=None, config=None, make_env=MAKE_ENV):
    """Train; ``disturb(session, row)`` is awaited after every step."""
    rows: list[dict] = []

    async def train():
        session = RLSession(
            config or runtime(),
            rl,
            model_folder=folder,
            make_env=make_env,
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
