"""The driver that ``benchmarks.chaos`` kills: one short GRPO run with real engines.

    python -m benchmarks.chaos_run WORK_DIR --max-staleness 0

The same command continues a run that was killed. The reward is a function of the sampled text
alone, so that groups of a random model have a spread.
"""

import argparse
import asyncio
import hashlib
from functools import partial
from pathlib import Path

from past_ray.config.algorithm import KLConfig
from past_ray.config.rl import RLConfig
from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.engine.models import init_scratch_model
from past_ray.envs.chat import chat_codec
from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.runtime.cluster import ray_cluster
from past_ray.runtime.controller import RLRun, train_grpo
from past_ray.runtime.session import RLSession
from past_ray.tasks.examples import QAExample
from past_ray.tasks.world import build_tokenizer

NUM_QUESTIONS = 40
SEED = 0


def rl_config(*, max_staleness: int, num_steps: int) -> RLConfig:
    """A small GRPO run that checkpoints every second step."""
    return RLConfig(
        num_steps=num_steps,
        prompts_per_step=4,
        group_size=4,
        learning_rate=1e-3,
        max_new_tokens=12,
        kl=KLConfig(coefficient=0.01),
        checkpoint_every_steps=2,
        max_staleness=max_staleness,
    )


def runtime_config() -> RuntimeConfig:
    """Two cores: one process of each role, with short heartbeats."""
    return RuntimeConfig(
        address="local",
        cpus_per_generator=0.5,
        cpus_per_learner=0.5,
        cpus_per_rollout_worker=0.2,
        cpus_per_sft_worker=0.5,
        heartbeat_interval_s=0.5,
        heartbeat_timeout_s=30,
        restart_backoff_s=0.1,
        max_restarts=100,
        object_store_gib=0.2,
        generator=GeneratorConfig(max_model_len=64, max_num_seqs=32, kv_cache_gib=0.05),
    )


def examples() -> list[QAExample]:
    """Questions of one word each."""
    return [
        QAExample(
            question_id=f"q{index}",
            messages=({"role": "user", "content": f"what is {index} ?"},),
            answer="",
        )
        for index in range(NUM_QUESTIONS)
    ]


def hashed_reward(answer: str, gold: str) -> float:
    """A number in [0, 1) that only the answer decides."""
    del gold
    return hashlib.sha256(answer.encode()).digest()[0] / 256


def make_model(folder: Path) -> None:
    """Write the random model, once."""
    if not folder.exists():
        init_scratch_model(
            folder,
            tokenizer=build_tokenizer(),
            hidden_size=64,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            intermediate_size=128,
            max_position_embeddings=128,
            seed=SEED,
        )


async def run(work_dir: Path, rl: RLConfig) -> None:
    """Train to the end, from wherever the last process got to."""
    from transformers import AutoTokenizer

    model = (work_dir / "model").resolve()
    make_model(model)
    session = RLSession(
        runtime_config(),
        rl,
        model_folder=model,
        make_env=partial(ClosedBookQA, grade=hashed_reward),
    )
    codec = chat_codec(AutoTokenizer.from_pretrained(model))
    questions = examples()
    try:
        await session.open()
        await train_grpo(
            session,
            RLRun(
                init_folder=model,
                reference_folder=model,
                work_dir=(work_dir / "rl").resolve(),
                seed=SEED,
            ),
            rl,
            examples=questions,
            probe=[codec.render(list(q.messages)) for q in questions[:2]],
            on_step=lambda row: None,
        )
    finally:
        session.close()


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--max-staleness", type=int, required=True)
    parser.add_argument("--num-steps", type=int, required=True)
    args = parser.parse_args()
    rl = rl_config(max_staleness=args.max_staleness, num_steps=args.num_steps)
    with ray_cluster(runtime_config()):
        asyncio.run(run(args.work_dir, rl))


if __name__ == "__main__":
    # Workers must import what is pickled to them by its real name.
    from benchmarks import chaos_run

    chaos_run.main()
