"""past_ray's real session and loop on the benchmark's workload."""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer

from benchmarks.rl.workload import Workload, hashed_reward, questions
from past_ray.config.algorithm import KLConfig
from past_ray.config.rl import RLConfig
from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.envs.base import EnvStep
from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.runtime.controller import RLRun, train_grpo
from past_ray.runtime.rollout_worker import MakeEnv, chat_codec
from past_ray.runtime.session import RLSession
from past_ray.tasks.examples import Message, QAExample

WARM_UP = 2
"""Steps that are not counted; with ``max_staleness`` 1 the pipeline is full after the first."""

GENERATOR_DTYPE: Mapping[str, Literal["float32", "bfloat16"]] = {
    "fp32": "float32",
    "bf16": "bfloat16",
}
PARITY_TOLERANCE = {"fp32": 1e-4, "bf16": 0.5}
"""Nats. The probe of a 16-bit generator can tell missing weights from rounding, no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is varied on our side."""

    workload: Workload
    """Sizes, shared with TRL."""

    num_steps: int
    """Steps, those of the warm-up and the last one included."""

    max_staleness: int = 0
    """0 is synchronous, as TRL is."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute of learner and generator; masters are fp32 either way."""

    num_turns: int = 1
    """Answers of one rollout."""

    wait_s: float = 0.0
    """What the environment waits each turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One counted step."""

    seconds: float
    """From the end of the step before to its own end, as the caller sees it."""

    num_tokens: float
    """Completion tokens that it trained on."""

    metrics: dict[str, float]
    """What the loop reported."""


class WaitingEnv:
    """Poses the question, then waits for each answer as a tool or a judge would."""

    def __init__(self, example: QAExample, *, num_turns: int, wait_s: float) -> None:
        """Begin before the first turn."""
        self._example = example
        self._num_turns = num_turns
        self._wait_s = wait_s
        self._turn = 0

    def reset(self) -> list[Message]:
        """Return the question."""
        return list(self._example.messages)

    def step(self, answer: str) -> EnvStep:
        """Wait, grade, and go on until the last turn."""
        time.sleep(self._wait_s)
        self._turn += 1
        return EnvStep(
            reward=hashed_reward(answer),
            is_done=self._turn == self._num_turns,
            messages=[{"role": "user", "content": "w1 w2 w3"}],
        )


def run_past_ray(settings: Settings, *, model: Path) -> list[StepRow]:
    """Open a session, train, close it; return the counted steps."""
    with tempfile.TemporaryDirectory(prefix="bench-rl-") as work_dir:
        return asyncio.run(_run(settings, model, Path(work_dir)))


def tokens_per_s(rows: list[StepRow]) -> float:
    """Return the median over steps."""
    return statistics.median(row.num_tokens / row.seconds for row in rows)


def rl_config(settings: Settings) -> RLConfig:
    """GRPO without a KL penalty, as TRL's default."""
    workload = settings.workload
    return RLConfig(
        num_steps=settings.num_steps,
        prompts_per_step=workload.prompts_per_step,
        group_size=workload.group_size,
        learning_rate=workload.learning_rate,
        max_new_tokens=workload.completion_tokens,
        kl=KLConfig(coefficient=0.0),
        max_staleness=settings.max_staleness,
        max_turns=settings.num_turns,
        precision=settings.precision,
        checkpoint_every_steps=settings.num_steps,
        parity_tolerance=PARITY_TOLERANCE[settings.precision],
    )


def runtime_config(
    *, max_model_len: int = 512, dtype: Literal["float32", "bfloat16"] = "float32"
) -> RuntimeConfig:
    """One generator and one learner of one thread each: the same two cores that TRL gets."""
    return RuntimeConfig(
        address="local",
        cpus_per_generator=0.8,
        cpus_per_learner=0.8,
        cpus_per_rollout_worker=0.2,
        cpus_per_sft_worker=0.5,
        object_store_gib=2.5,
        generator=GeneratorConfig(max_model_len=max_model_len, kv_cache_gib=0.5, dtype=dtype),
    )


async def _run(settings: Settings, model: Path, work_dir: Path) -> list[StepRow]:
    rl = rl_config(settings)
    examples = [
        QAExample(question_id=f"q{index}", messages=({"role": "user", "content": text},), answer="")
        for index, text in enumerate(questions(settings.workload))
    ]
    codec = chat_codec(AutoTokenizer.from_pretrained(model))
    ended: list[float] = []
    metrics: list[dict[str, float]] = []

    def on_step(row: dict[str, float]) -> None:
        ended.append(time.perf_counter())
        metrics.append(row)

    config = runtime_config(dtype=GENERATOR_DTYPE[settings.precision])
    session = RLSession(config, rl, model_folder=model, make_env=_make_env(settings))
    try:
        await session.open()
        await train_grpo(
            session,
            RLRun(init_folder=model, reference_folder=model, work_dir=work_dir, seed=0),
            rl,
            examples=examples,
            probe=[codec.render(list(e.messages)) for e in examples[: rl.num_parity_prompts]],
            on_step=on_step,
        )
    finally:
        session.close()
    # The last step writes a checkpoint, and samples nothing ahead: neither is a usual step.
    return [
        StepRow(
            seconds=ended[index] - ended[index - 1],
            num_tokens=metrics[index]["num_tokens"],
            metrics=metrics[index],
        )
        for index in range(WARM_UP, len(ended) - 1 - settings.max_staleness)
    ]


def _make_env(settings: Settings) -> MakeEnv:
    if settings.num_turns == 1 and settings.wait_s == 0:
        return partial(ClosedBookQA, grade=_grade)
    return partial(WaitingEnv, num_turns=settings.num_turns, wait_s=settings.wait_s)


def _grade(answer: str, gold: str) -> float:
    del gold
    return hashed_reward(answer)
