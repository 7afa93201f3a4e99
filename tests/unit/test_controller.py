"""The RL loop over a session that records what it is asked to do."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from past_ray.config.rl import RLConfig
from past_ray.errors import ClusterError, DataError
from past_ray.rl.types import Completion, Rollout, RolloutGroup, RolloutStatus, Turn
from past_ray.runtime.controller import RLRun, train_grpo
from past_ray.runtime.session import SyncResult
from past_ray.tasks.examples import QAExample

EXAMPLES = [
    QAExample(question_id=f"q{i}", messages=({"role": "user", "content": "?"},), answer="a")
    for i in range(5)
]
RL = RLConfig(num_steps=4, prompts_per_step=2, group_size=2, checkpoint_every_steps=2)


class RecordingSession:
    """Stands where RLSession stands; rollouts have the version of the last sync."""

    def __init__(self, *, version_lag: int = 0, num_failed: int = 0) -> None:
        self.events: list[str] = []
        self.questions: list[list[str]] = []
        self._version_lag = version_lag
        self._num_failed = num_failed
        self._synced = -1

    async def load_learners(self, checkpoint, *, reference, resume_from):
        self.events.append(f"load {resume_from.name if resume_from else checkpoint.name}")
        return int(resume_from.name.removeprefix("step-")) if resume_from else 0

    async def collect(self, examples, *, group_size, sampling, step, seed):
        self.events.append(f"collect {step}")
        self.questions.append([example.question_id for example in examples])
        failures = iter([True] * self._num_failed)
        return [
            RolloutGroup(
                question_id=example.question_id,
                rollouts=[
                    self._rollout(i, is_failed=next(failures, False)) for i in range(group_size)
                ],
            )
            for example in examples
        ]

    def _rollout(self, index: int, *, is_failed: bool) -> Rollout:
        version = self._synced - self._version_lag
        completion = Completion(
            token_ids=[7], logprobs=[-0.1], finish_reason="stop", policy_version=version
        )
        rollout = Rollout(
            rollout_id=str(index),
            turns=[Turn(prompt_ids=[1], completion=completion)],
            answer="a",
            reward=float(index % 2),
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
        return {"loss": 0.5}

    async def sync_weights(self, policy_version, *, probe):
        self.events.append(f"sync {policy_version}")
        self._synced = policy_version
        return SyncResult(seconds=0.0, logprob_gap=0.0)

    async def save_learners(self, folder: Path):
        self.events.append(f"save {folder.name}")
        folder.mkdir(parents=True)


def train(session, work_dir: Path, *, rl: RLConfig = RL, examples=EXAMPLES, keep=()):
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


def test_every_step_samples_with_the_weights_of_the_step_before(tmp_path):
    session = RecordingSession()
    train(session, tmp_path, rl=RL.model_copy(update={"num_steps": 2}))
    assert session.events == [
        "load init",
        "sync 0",
        *("collect 0", "train 4", "sync 1"),
        *("collect 1", "train 4", "sync 2", "save step-000002"),
    ]


def test_an_epoch_asks_every_question_once(tmp_path):
    session = RecordingSession()
    train(session, tmp_path, examples=EXAMPLES[:4])
    first_epoch = session.questions[0] + session.questions[1]
    assert sorted(first_epoch) == ["q0", "q1", "q2", "q3"]


def test_a_run_continues_from_its_newest_checkpoint_with_the_same_questions(tmp_path):
    whole = RecordingSession()
    train(whole, tmp_path / "whole")
    first = RecordingSession()
    train(first, tmp_path / "cut", rl=RL.model_copy(update={"num_steps": 2}))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "loss": 9.0}) + "\n")  # Its checkpoint was never written.
    second = RecordingSession()
    train(second, tmp_path / "cut")
    assert second.events[:3] == ["load step-000002", "sync 2", "collect 2"]
    assert first.questions + second.questions == whole.questions
    logged = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2, 3, 4]
    assert json.loads(logged[2])["loss"] == 0.5


def test_only_the_newest_and_the_wanted_checkpoints_stay(tmp_path):
    last, _ = train(RecordingSession(), tmp_path, keep=(1,))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000001", "step-000004"]
    assert last == tmp_path / "step-000004"


def test_rollouts_of_older_weights_stop_the_run(tmp_path):
    with pytest.raises(ClusterError, match=r"found versions \[-1\].*missed a weight sync"):
        train(RecordingSession(version_lag=1), tmp_path)


def test_too_many_failed_rollouts_stop_the_run_with_the_first_error(tmp_path):
    with pytest.raises(ClusterError, match=r"1 of 4 did in step 0; first: prompt too long"):
        train(RecordingSession(num_failed=1), tmp_path)


def test_few_failed_rollouts_are_data(tmp_path):
    rl = RL.model_copy(update={"max_rollout_error_frac": 0.5})
    _, rows = train(RecordingSession(num_failed=1), tmp_path, rl=rl)
    assert rows[0]["error_frac"] == 0.25


def test_more_prompts_than_questions_are_refused(tmp_path):
    with pytest.raises(DataError, match="got 2 over 1 questions"):
        train(RecordingSession(), tmp_path, examples=EXAMPLES[:1])
