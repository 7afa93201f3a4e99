"""The RL loop over a session that records what it is asked to do."""

import json
import os
import signal

import pytest

from past_ray.config.rl import RLConfig
from past_ray.errors import ClusterError, DataError, PastRayError
from past_ray.rl.rollout_table import read_rollouts
from tests.fake_session import FakeSession, examples, train

RL = RLConfig(num_steps=4, prompts_per_step=2, group_size=2, checkpoint_every_steps=2)


def test_every_step_samples_with_the_weights_of_the_step_before(tmp_path):
    session = FakeSession()
    train(session, tmp_path, rl=RL.model_copy(update={"num_steps": 2}), examples=examples(5))
    assert session.events == [
        "load init",
        "sync 0",
        *("collect 0", "train 4", "sync 1"),
        *("collect 1", "train 4", "sync 2", "save step-000002"),
    ]


def test_an_epoch_asks_every_question_once(tmp_path):
    session = FakeSession()
    train(session, tmp_path, rl=RL, examples=examples(4))
    first_epoch = session.questions[0] + session.questions[1]
    assert sorted(first_epoch) == ["q0", "q1", "q2", "q3"]


def test_a_run_continues_from_its_newest_checkpoint_with_the_same_questions(tmp_path):
    whole = FakeSession()
    train(whole, tmp_path / "whole", rl=RL, examples=examples(5))
    first = FakeSession()
    short = RL.model_copy(update={"num_steps": 2})
    train(first, tmp_path / "cut", rl=short, examples=examples(5))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "loss": 9.0}) + "\n")  # Its checkpoint was never written.
    second = FakeSession()
    train(second, tmp_path / "cut", rl=RL, examples=examples(5))
    assert second.events[:3] == ["load step-000002", "sync 2", "collect 2"]
    assert first.questions + second.questions == whole.questions
    logged = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2, 3, 4]
    assert json.loads(logged[2])["loss"] == 0.5


def test_only_the_newest_and_the_wanted_checkpoints_stay(tmp_path):
    last, _ = train(FakeSession(), tmp_path, rl=RL, examples=examples(5), keep=(1,))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000001", "step-000004"]
    assert last == tmp_path / "step-000004"


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    train(FakeSession(), tmp_path, rl=RL, examples=examples(5), keep=(2,))
    (tmp_path / "step-000004" / "learner.json").write_text("4444")
    again = FakeSession()
    train(again, tmp_path, rl=RL, examples=examples(5))
    assert again.events[:2] == ["load step-000002", "sync 2"]
    assert (tmp_path / "torn-step-000004").is_dir()
    assert (tmp_path / "step-000004").is_dir()


def test_rollouts_of_older_weights_stop_the_run(tmp_path):
    with pytest.raises(ClusterError, match=r"found versions \[-1\].*missed a weight sync"):
        train(FakeSession(version_lag=1), tmp_path, rl=RL, examples=examples(5))


def test_too_many_failed_rollouts_stop_the_run_with_the_first_error(tmp_path):
    with pytest.raises(ClusterError, match=r"1 of 4 did in step 0; first: prompt too long"):
        train(FakeSession(num_failed=1), tmp_path, rl=RL, examples=examples(5))


def test_few_failed_rollouts_are_data(tmp_path):
    rl = RL.model_copy(update={"max_rollout_error_frac": 0.5})
    _, rows = train(FakeSession(num_failed=1), tmp_path, rl=rl, examples=examples(5))
    assert rows[0]["error_frac"] == 0.25


def test_more_prompts_than_questions_are_refused(tmp_path):
    with pytest.raises(DataError, match="got 2 over 1 questions"):
        train(FakeSession(), tmp_path, rl=RL, examples=examples(1))


def test_a_run_without_any_spread_stops_with_a_diagnosis(tmp_path):
    rl = RL.model_copy(update={"max_constant_steps": 2})
    with pytest.raises(DataError) as error:
        train(FakeSession(rewards=(0.0,)), tmp_path, rl=rl, examples=examples(5))
    message = str(error.value)
    assert "in 2 steps in a row up to step 1" in message
    assert "Mean reward 0" in message
    assert "raise rl.temperature" in message
    assert "'a'" in message


def test_a_step_with_spread_in_between_resets_the_count(tmp_path):
    rl = RL.model_copy(update={"max_constant_steps": 3})
    constant = {"q0", "q1", "q2"}  # Two of five questions have a spread, so some steps do.
    train(FakeSession(constant_questions=constant), tmp_path, rl=rl, examples=examples(5))


def test_lost_learners_go_back_to_the_last_checkpoint_by_themselves(tmp_path):
    session = FakeSession(lose_learner_at=[3])
    train(session, tmp_path, rl=RL, examples=examples(5))
    at = session.events.index("restart learners")
    assert session.events[at - 2 : at] == ["collect 3", "train 4"]
    assert session.events[at + 1 : at + 4] == ["load step-000002", "sync 2", "collect 2"]
    assert [version for version, _ in session.trained] == [0, 1, 2, 2, 3]
    logged = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2, 3, 4]


def test_learners_lost_before_the_first_checkpoint_begin_anew(tmp_path):
    session = FakeSession(lose_learner_at=[0])
    train(session, tmp_path, rl=RL, examples=examples(5))
    assert [version for version, _ in session.trained] == [0, 1, 2, 3]


def test_the_rollouts_of_every_step_are_on_disk(tmp_path):
    session = FakeSession()
    train(session, tmp_path, rl=RL, examples=examples(5))
    for step in range(4):
        groups = read_rollouts(tmp_path, step + 1)
        ids = [rollout.rollout_id for group in groups for rollout in group.rollouts]
        assert ids == [f"{step}/{q}/{i}" for q in session.questions[step] for i in range(2)]


def test_sigterm_saves_a_checkpoint_and_the_same_command_continues(tmp_path):
    class Terminated(FakeSession):
        async def train_step(self, samples):
            if self._version == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return await super().train_step(samples)

    rl = RL.model_copy(update={"checkpoint_every_steps": 100})
    with pytest.raises(PastRayError, match=r"saved step 3\. The same command continues it"):
        train(Terminated(), tmp_path, rl=rl, examples=examples(5))
    again = FakeSession()
    train(again, tmp_path, rl=rl, examples=examples(5))
    assert again.events[:2] == ["load step-000003", "sync 3"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_notice_while_a_step_is_sampled_is_answered_at_once(tmp_path):
    class Slow(FakeSession):
        async def collect(self, tasks, plan, *, is_exact):
            groups = await super().collect(tasks, plan, is_exact=is_exact)
            if self._version == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                await __import__("asyncio").sleep(3600)
            return groups

    rl = RL.model_copy(update={"checkpoint_every_steps": 100})
    with pytest.raises(PastRayError, match="saved step 1"):
        train(Slow(), tmp_path, rl=rl, examples=examples(5))
