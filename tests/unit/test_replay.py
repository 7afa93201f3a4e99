"""A step trained again from stored rollouts is the step that the run took."""

import asyncio
import dataclasses
import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from past_ray.cli import app
from past_ray.config.rl import RLConfig
from past_ray.engine.learner import GRPOLearner
from past_ray.errors import ConfigError, DataError
from past_ray.pipelines.replay import replay_step
from past_ray.rl.objective import count_totals
from past_ray.rl.rollout_table import read_rollouts, write_rollouts
from past_ray.runtime.controller import RLRun, train_grpo
from past_ray.skill.checkpoint import load_weights
from tests.fake_session import FakeSession, examples
from tests.tiny_model import make_tiny_model

RL = RLConfig(
    num_steps=5,
    prompts_per_step=2,
    group_size=2,
    checkpoint_every_steps=2,
    learning_rate=1e-3,
    kl={"coefficient": 0.01},
)


class TrainingSession(FakeSession):
    """A fake session with a real learner behind it."""

    def _rollout(self, task, index, version, *, is_failed):
        """Answers of a group differ, or their advantages would cancel."""
        rollout = super()._rollout(task, index, version, is_failed=is_failed)
        turn = rollout.turns[0]
        token_ids = [turn.completion.token_ids[0] + 20 * index, 1]
        completion = dataclasses.replace(
            turn.completion, token_ids=token_ids, logprobs=[-0.1, -1.5]
        )
        turns = [dataclasses.replace(turn, completion=completion)]
        return dataclasses.replace(rollout, turns=turns)

    async def load_learners(self, checkpoint, *, reference, resume_from):
        self.learner = GRPOLearner(RL, device="cpu")
        return self.learner.load(checkpoint, reference=reference, resume_from=resume_from)

    async def train_step(self, samples):
        totals = count_totals(samples, rollout_token_limit=RL.max_new_tokens)
        return self.learner.train_step(samples, totals=totals)

    async def save_learners(self, folder, *, extra_files):
        self.learner.save(folder, extra_files=extra_files)


@pytest.fixture(name="run", scope="module")
def run_fixture(tmp_path_factory):
    """The work directory of a real RL loop with checkpoints after steps 3 and 5."""
    folder = tmp_path_factory.mktemp("replay")
    run = RLRun(
        init_folder=make_tiny_model(folder / "init"),
        reference_folder=make_tiny_model(folder / "sft", seed=1),
        work_dir=folder / "work",
        seed=0,
        keep_steps=(3,),
    )
    loop = train_grpo(
        TrainingSession(), run, RL, examples=examples(5), probe=[[1]], on_step=lambda row: None
    )
    asyncio.run(loop)
    kept = sorted(path.name for path in run.work_dir.glob("step-*"))
    assert kept == ["step-000003", "step-000005"]
    return run.work_dir


def same_weights(ours, theirs):
    left, right = load_weights(ours), load_weights(theirs)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(("step", "start"), [(1, 0), (3, 0), (4, 3), (5, 3)])
def test_a_replayed_step_has_the_metrics_that_the_run_logged(run, step, start):
    replay = replay_step(run, step)
    assert (replay.start, replay.is_changed) == (start, False)
    assert {"loss", "grad_norm", "reward", "staleness_mean"} <= replay.logged.keys()
    assert replay.metrics == replay.logged
    assert replay.differing == []


@pytest.mark.parametrize("step", [3, 5])
def test_a_replayed_step_leaves_the_weights_of_the_run_bit_for_bit(run, tmp_path, step):
    replay_step(run, step, out=tmp_path / "out")
    assert same_weights(tmp_path / "out", run / f"step-{step:06d}")


def test_another_loss_acts_on_the_asked_step_alone(run, tmp_path):
    before = replay_step(run, 5, overrides=["rl.max_grad_norm=1e-12"], out=tmp_path / "out")
    plain = replay_step(run, 5)
    # Loss and gradient are computed before clipping, on weights that step 4 left as in the run.
    assert before.metrics == plain.metrics
    assert before.is_changed
    assert not same_weights(tmp_path / "out", run / "step-000005")


@pytest.mark.parametrize("kind", ["dr_grpo", "dapo", "gspo", "cispo"])
def test_every_algorithm_takes_rollouts_of_another_with_its_own_defaults(run, kind):
    replay = replay_step(run, 4, overrides=[f"rl.algorithm.kind={kind}"])
    assert replay.is_changed
    assert replay.metrics["num_loss_tokens"] == replay.logged["num_loss_tokens"]


def test_another_algorithm_brings_its_own_defaults_and_takes_other_settings(run):
    def loss(*settings):
        return replay_step(run, 5, overrides=[f"rl.algorithm.{text}" for text in settings]).metrics

    published = loss("kind=gspo")
    assert published == loss("clip_low=3e-4", "kind=gspo", "clip_high=4e-4")
    # The run's own bounds, GRPO's, must not survive the change of the algorithm.
    assert published["loss"] != loss("kind=gspo", "clip_low=0.2", "clip_high=0.2")["loss"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.learning_rate=1", "must set a key of rl other than learning_rate"),
        ("rl.lora.rank=2", "must set a key of rl other than"),
        ("seed=3", "must set a key of rl"),
        ("rl.algorithm.kind=ppo", "rl.algorithm.kind must be one of"),
        ("rl.algoritm.kind=gspo", "Did you mean rl.algorithm"),
    ],
)
def test_settings_that_cannot_act_on_one_step_are_refused(run, override, message):
    with pytest.raises(ConfigError, match=message):
        replay_step(run, 4, overrides=[override])


def test_the_reference_may_be_changed_to_the_start_but_not_to_the_unknown(run, tmp_path):
    start = replay_step(run, 1, overrides=["rl.kl.reference=init"])
    # Before the first step the policy is theta_init itself.
    assert start.metrics["ref_kl"] == 0.0
    assert replay_step(run, 1).metrics["ref_kl"] > 0.0
    copy = shutil.copytree(run, tmp_path / "copy")
    record = json.loads((copy / "rl.json").read_text())
    record["rl"]["kl"]["reference"] = "init"
    (copy / "rl.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="does not name the model after SFT"):
        replay_step(copy, 1, overrides=["rl.kl.reference=sft"])


def test_a_torn_checkpoint_is_passed_over(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "step-000003" / "learner.json").write_text("{}")
    replay = replay_step(copy, 4)
    assert replay.start == 0
    assert replay.differing == []
    assert (copy / "step-000003").is_dir()


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (0, ConfigError, "--step must be at least 1, got 0"),
        (6, DataError, "step=000006/rollouts.parquet must be a Parquet file"),
    ],
)
def test_steps_that_the_run_has_not_are_named(run, step, error, message):
    with pytest.raises(error, match=message):
        replay_step(run, step)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must be the work directory of an RL run"):
        replay_step(tmp_path, 1)


def tampered(run, folder):
    """Copy a run and turn the rewards of its step 4 around."""
    copy = shutil.copytree(run, folder / "copy")
    groups = [
        dataclasses.replace(
            group,
            rollouts=[dataclasses.replace(r, reward=1 - r.reward) for r in group.rollouts],
        )
        for group in read_rollouts(copy, 4)
    ]
    write_rollouts(copy, 4, groups)
    return copy


def test_rollouts_that_were_changed_are_noticed(run, tmp_path):
    replay = replay_step(tampered(run, tmp_path), 4)
    assert "loss" in replay.differing
    assert "reward" not in replay.differing


def test_the_command_prints_the_metrics_and_says_that_they_are_equal(run, tmp_path):
    done = CliRunner().invoke(
        app, ["replay", str(run), "--step", "4", "--out", str(tmp_path / "o")]
    )
    assert done.exit_code == 0, done.output
    assert "step 4, replayed from step 3: equal to the logged metrics" in done.stdout
    assert "grad_norm" in done.stdout
    assert (tmp_path / "o" / "model.safetensors").is_file()


def test_the_command_fails_where_metrics_differ(run, tmp_path):
    done = CliRunner().invoke(app, ["replay", str(tampered(run, tmp_path)), "--step", "4"])
    assert done.exit_code == 1
    assert "differs from the logged metrics in " in done.stdout


def test_the_command_gives_json_and_accepts_other_settings(run):
    arguments = ["replay", str(run), "--step", "4", "--json", "--set", "rl.algorithm.kind=gspo"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert (values["step"], values["start"], values["is_changed"]) == (4, 3, True)
    assert values["metrics"].keys() >= values["logged"].keys()
