"""What the loop itself costs at many rollouts: every actor is a fake that answers at once."""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from past_ray.config.rl import RLConfig
from past_ray.engine.learner_checkpoint import write_manifest
from past_ray.rl.types import (
    Completion,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    TrainSample,
    Turn,
)
from past_ray.runtime.controller import RLRun, train_grpo
from past_ray.runtime.rollout_worker import GroupTask, RolloutPlan
from past_ray.runtime.session import RLSession
from past_ray.runtime.weight_sync import SyncResult
from past_ray.tasks.examples import QAExample

GROUPS, GROUP_SIZE = 125, 8
PROMPT_TOKENS, COMPLETION_TOKENS = 32, 64
NUM_STEPS, WARM_UP = 8, 2


P = ParamSpec("P")
T = TypeVar("T")


def timed(method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Book a method's time as that of the fake."""

    @wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        started = time.perf_counter()
        try:
            return await method(*args, **kwargs)
        finally:
            cast("InstantSession", args[0]).seconds += time.perf_counter() - started

    return call


class InstantSession:
    """Stands where ``RLSession`` stands and does nothing."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_requeued = 0
        self.num_restarts = 0
        self._version = 0

    @timed
    async def load_learners(self, checkpoint: Path, **_: object) -> int:
        """Begin at version 0."""
        return 0

    @timed
    async def collect(
        self, tasks: Sequence[GroupTask], plan: RolloutPlan, *, is_exact: bool
    ) -> list[RolloutGroup]:
        """Return groups of random-looking rollouts."""
        return [
            RolloutGroup(
                question_id=task.example.question_id,
                rollouts=[self._rollout(task, index) for index in range(plan.group_size)],
            )
            for task in tasks
        ]

    def _rollout(self, task: GroupTask, index: int) -> Rollout:
        completion = Completion(
            token_ids=list(range(COMPLETION_TOKENS)),
            logprobs=[-8.25 - index] * COMPLETION_TOKENS,
            finish_reason="length",
            policy_version=self._version,
        )
        turn = Turn(
            prompt_ids=list(range(PROMPT_TOKENS)), completion=completion, reward=float(index)
        )
        return Rollout(
            rollout_id=f"{task.group_id}/{index}",
            turns=[turn],
            answer="w1 " * COMPLETION_TOKENS,
            reward=float(index),
            status=RolloutStatus.COMPLETED,
            policy_version=self._version,
        )

    @timed
    async def train_step(self, samples: Sequence[TrainSample]) -> dict[str, float]:
        """Take no step."""
        assert len(samples) == GROUPS * GROUP_SIZE
        return {"loss": 0.0}

    @timed
    async def sync_weights(self, policy_version: int, *, probe: Sequence[list[int]]) -> SyncResult:
        """Take over the version alone."""
        self._version = policy_version
        return SyncResult(seconds=0.0, logprob_gap=0.0)

    @timed
    async def save_learners(self, folder: Path, *, extra_files: Mapping[str, bytes]) -> None:
        """Write an empty checkpoint."""
        folder.mkdir(parents=True)
        write_manifest(folder)

    async def generator_busy_s(self) -> float:
        """Never busy."""
        return 0.0


def measure_controller() -> dict[str, Any]:
    """Return the milliseconds of a step that no fake took."""
    session = InstantSession()
    marks: list[tuple[float, float]] = []
    rl = RLConfig(
        num_steps=NUM_STEPS,
        prompts_per_step=GROUPS,
        group_size=GROUP_SIZE,
        max_new_tokens=COMPLETION_TOKENS,
        checkpoint_every_steps=NUM_STEPS,
        max_constant_steps=NUM_STEPS,
    )
    with tempfile.TemporaryDirectory(prefix="bench-rl-") as folder:
        run = RLRun(
            init_folder=Path("init"),
            reference_folder=Path("init"),
            work_dir=Path(folder),
            seed=0,
        )
        training = train_grpo(
            cast("RLSession", session),
            run,
            rl,
            examples=[
                QAExample(question_id=f"q{i}", messages=(), answer="") for i in range(GROUPS)
            ],
            probe=[[1]],
            on_step=lambda _: marks.append((time.perf_counter(), session.seconds)),
        )
        asyncio.run(training)
    own = [
        1000 * (end - start - (fakes_end - fakes_start))
        for (start, fakes_start), (end, fakes_end) in pairwise(marks)
    ]
    counted = own[WARM_UP - 1 : -1]  # The last step writes a checkpoint.
    return {
        "controller_overhead_ms": statistics.median(counted),
        "rollouts": GROUPS * GROUP_SIZE,
        "tokens_per_rollout": PROMPT_TOKENS + COMPLETION_TOKENS,
        "raw_ms": own,
    }
