"""Stands where ``RLSession`` stands: no Ray, no model, and every wait as long as a test wants.

It keeps what must hold of the real one: a rollout has the version that was synced last when its
group began, and what the learner trains is written down.
"""

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path

from past_ray.engine.learner_checkpoint import write_manifest
from past_ray.rl.types import Completion, Rollout, RolloutGroup, RolloutStatus, Turn
from past_ray.runtime.controller import RLRun, train_grpo
from past_ray.runtime.learner_group import LearnersLostError
from past_ray.runtime.weight_sync import SyncResult
from past_ray.tasks.examples import QAExample


def examples(count: int) -> list[QAExample]:
    return [
        QAExample(question_id=f"q{i}", messages=({"role": "user", "content": "?"},), answer="a")
        for i in range(count)
    ]


class FakeSession:
    """Records events; fails and waits on demand."""

    def __init__(
        self,
        *,
        version_lag: int = 0,
        num_failed: int = 0,
        rewards=(0.0, 1.0),
        constant_questions: set[str] = frozenset(),
        delays: random.Random | None = None,
        lose_learner_at: list[int] | None = None,
    ) -> None:
        self.events: list[str] = []
        self.questions: list[list[str]] = []
        self.trained: list[tuple[int, list[str]]] = []
        """Version before each step and the ids of the rollouts that it trained."""

        self.num_requeued = 0
        self.num_restarts = 0
        self._version_lag = version_lag
        self._num_failed = num_failed
        self._rewards = rewards
        self._constant_questions = constant_questions
        self._delays = delays
        self._lose_learner_at = lose_learner_at or []
        self._synced = -1
        self._version = 0
        self._pending: dict[str, list[str]] = {}

    async def _wait(self) -> None:
        await asyncio.sleep(self._delays.random() * 0.01 if self._delays else 0)

    async def load_learners(self, checkpoint, *, reference, resume_from):
        self.events.append(f"load {resume_from.name if resume_from else checkpoint.name}")
        self._version = 0
        if resume_from:
            self._version = json.loads((resume_from / "learner.json").read_text())
        return self._version

    async def restart_learners(self):
        self.events.append("restart learners")
        self.num_restarts += 1

    async def collect(self, tasks, plan, *, is_exact):
        step = tasks[0].group_id.split("/")[0]
        self.events.append(f"collect {step}")
        self.questions.append([task.example.question_id for task in tasks])
        version = self._synced - self._version_lag
        await self._wait()
        failures = iter([True] * self._num_failed)
        return [
            RolloutGroup(
                question_id=task.example.question_id,
                rollouts=[
                    self._rollout(task, i, version, is_failed=next(failures, False))
                    for i in range(plan.group_size)
                ],
            )
            for task in tasks
        ]

    def _rollout(self, task, index: int, version: int, *, is_failed: bool) -> Rollout:
        is_constant = task.example.question_id in self._constant_questions
        reward = 0.0 if is_constant else self._rewards[index % len(self._rewards)]
        # The sampled token tells the learner whose it is.
        token = 10 + int(task.example.question_id.removeprefix("q"))
        completion = Completion(
            token_ids=[token], logprobs=[-0.1], finish_reason="stop", policy_version=version
        )
        rollout = Rollout(
            rollout_id=f"{task.group_id}/{index}",
            turns=[Turn(prompt_ids=[1], completion=completion, reward=reward)],
            answer="a",
            reward=reward,
            status=RolloutStatus.COMPLETED,
            policy_version=version,
        )
        if not is_failed:
            return rollout
        return replace(
            rollout,
            turns=[],
            reward=None,
            status=RolloutStatus.GENERATION_ERROR,
            policy_version=-1,
            error="prompt too long",
        )

    async def train_step(self, samples):
        self.events.append(f"train {len(samples)}")
        await self._wait()
        if self._version in self._lose_learner_at:
            self._lose_learner_at.remove(self._version)
            raise LearnersLostError("a learner died")
        self.trained.append((self._version, [f"q{s.token_ids[-1] - 10}" for s in samples]))
        self._version += 1
        return {"loss": 0.5}

    async def sync_weights(self, policy_version, *, probe):
        await self._wait()
        self.events.append(f"sync {policy_version}")
        self._synced = policy_version
        return SyncResult(seconds=0.0, logprob_gap=0.0)

    async def save_learners(self, folder: Path, *, extra_files):
        self.events.append(f"save {folder.name}")
        folder.mkdir(parents=True)
        (folder / "learner.json").write_text(json.dumps(self._version))
        for name, content in extra_files.items():
            (folder / name).write_bytes(content)
        write_manifest(folder)

    async def generator_busy_s(self) -> float:
        return 0.0


def train(session, work_dir: Path, *, rl, examples, keep=()):
    """Run the real loop to its end; returns the last checkpoint and the rows."""
    run = RLRun(
        init_folder=Path("init"),
        reference_folder=Path("sft"),
        work_dir=work_dir,
        seed=0,
        keep_steps=keep,
    )
    rows: list[dict] = []
    train_rl = train_grpo(session, run, rl, examples=examples, probe=[[1]], on_step=rows.append)
    return asyncio.run(train_rl), rows
