"""``past-ray rollouts``: which rollouts are found and what is printed of them."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from past_ray.cli import app
from past_ray.rl.rollout_table import write_rollouts
from past_ray.rl.types import Completion, Rollout, RolloutGroup, RolloutStatus, Turn
from tests.tiny_model import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def rollout(rollout_id, answer, reward, *, version=0, num_turns=1, **changes):
    token_ids = ids(answer)
    completion = Completion(
        token_ids=token_ids,
        logprobs=[-0.5] * len(token_ids),
        finish_reason="stop",
        policy_version=version,
    )
    turn = Turn(prompt_ids=ids("<user> where lives anna ?"), completion=completion, reward=0.25)
    values = {
        "rollout_id": rollout_id,
        "turns": [turn] * num_turns,
        "answer": answer,
        "reward": reward,
        "status": RolloutStatus.COMPLETED,
        "policy_version": version,
        "reward_parts": {"correct": reward},
    }
    return Rollout(**(values | changes))


FAILED = rollout(
    "1/q2/1",
    "",
    None,
    turns=[],
    reward_parts={},
    status=RolloutStatus.GRADING_ERROR,
    policy_version=-1,
    error="ZeroDivisionError: by zero",
)
STEPS = {
    1: [
        RolloutGroup(
            question_id="q1",
            rollouts=[rollout("0/q1/0", "oslo", 1.0), rollout("0/q1/1", "anna lives in rome", 0.5)],
        )
    ],
    2: [
        RolloutGroup(question_id="q2", rollouts=[rollout("1/q2/0", "paris [bold]", 0.25), FAILED]),
    ],
    7: [
        RolloutGroup(
            question_id="q1", rollouts=[rollout("6/q1/0", "rome", 0.0, version=4, num_turns=2)]
        )
    ],
}


@pytest.fixture(name="run")
def run_fixture(tmp_path):
    """A run directory with one RL stage and its tokenizer."""
    work_dir = tmp_path / "run" / "work" / "rl_source_1"
    for step, groups in STEPS.items():
        write_rollouts(work_dir, step, groups)
    TOKENIZER.save_pretrained(tmp_path / "run" / "models" / "init")
    record = {"init_folder": str(tmp_path / "run" / "models" / "init")}
    (work_dir / "rl.json").write_text(json.dumps(record))
    return tmp_path / "run"


def call(run, *arguments):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["rollouts", str(run), *arguments])


def found(run, *arguments):
    done = call(run, "--json", *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def found_ids(run, *arguments):
    return [row["rollout_id"] for row in found(run, *arguments)["rollouts"]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["0/q1/0", "0/q1/1", "1/q2/0", "1/q2/1", "6/q1/0"]),
        (["--step", "2"], ["1/q2/0", "1/q2/1"]),
        (["--steps", "2:7"], ["1/q2/0", "1/q2/1", "6/q1/0"]),
        (["--steps", ":1"], ["0/q1/0", "0/q1/1"]),
        (["--steps", "3:"], ["6/q1/0"]),
        (["--status", "grading_error"], ["1/q2/1"]),
        (["--min-reward", "0.5"], ["0/q1/0", "0/q1/1"]),
        (["--max-reward", "0.25"], ["1/q2/0", "6/q1/0"]),
        (["--min-reward", "0.25", "--max-reward", "0.5"], ["0/q1/1", "1/q2/0"]),
        (["--question", "q1", "--max-reward", "0.9"], ["0/q1/1", "6/q1/0"]),
        (["--contains", "ROME"], ["0/q1/1", "6/q1/0"]),
        (["--contains", "[bold"], ["1/q2/0"]),
        (["--contains", "zerodivision"], ["1/q2/1"]),
        (["--sort", "reward"], ["0/q1/0", "0/q1/1", "1/q2/0", "6/q1/0", "1/q2/1"]),
        (["--sort", "length", "--limit", "2"], ["0/q1/1", "1/q2/0"]),
        (["--sort", "staleness", "--limit", "3"], ["6/q1/0", "1/q2/0", "0/q1/0"]),
        (["--contains", "nowhere"], []),
    ],
    ids=str,
)
def test_rollouts_are_filtered_and_sorted(run, arguments, expected):
    assert found_ids(run, *arguments) == expected
    assert found_ids(run / "work" / "rl_source_1", *arguments) == expected


def test_the_summary_counts_all_matches_and_leaves_failures_out_of_the_mean(run):
    values = found(run, "--limit", "1")
    assert (values["num_rollouts"], values["num_rewards"]) == (5, 4)
    assert values["mean_reward"] == (1.0 + 0.5 + 0.25 + 0.0) / 4
    assert len(values["rollouts"]) == 1


def test_lengths_and_staleness_are_those_of_the_rollout(run):
    last = found(run, "--step", "7")["rollouts"][0]
    # One word in each of two turns; version 4 trained at version 6.
    assert (last["num_tokens"], last["num_turns"], last["staleness"]) == (2, 2, 2)


def test_the_table_has_a_line_for_each_rollout_and_a_summary(run):
    lines = call(run).stdout.splitlines()
    assert len(lines) == 1 + 5 + 1
    assert lines[0].split() == ["step", "rollout", "status", "reward", "tokens", "stale", "answer"]
    assert lines[3].split()[:6] == ["2", "1/q2/0", "completed", "0.25", "2", "1"]
    # Not taken for markup.
    assert lines[3].rstrip().endswith("paris [bold]")
    assert lines[4].rstrip().endswith("ZeroDivisionError: by zero")
    assert lines[6] == "5 of 5 matching rollouts shown; mean reward 0.4375"


def test_full_shows_the_text_of_each_turn(run):
    output = call(run, "--step", "7", "--full").stdout
    assert output.count("prompt   <user> where lives anna ?") == 2
    assert output.count("answer   rome") == 2
    assert "turn 2: 1 tokens, stop, reward 0.25" in output
    assert "version  4, staleness 2" in output
    assert "reward   0 (correct 0)" in output


def test_full_shows_ids_where_the_model_is_gone(run):
    (run / "work" / "rl_source_1" / "rl.json").unlink()
    output = call(run, "--step", "7", "--full").stdout
    assert f"answer   {ids('rome')}" in output


def test_json_holds_the_turns_if_asked(run):
    assert "turns" not in found(run)["rollouts"][0]
    row = found(run, "--full")["rollouts"][1]
    assert row["turns"][0]["token_ids"] == ids("anna lives in rome")


def test_json_has_no_nan(run):
    group = RolloutGroup(question_id="q", rollouts=[rollout("8/q/0", "oslo", math.nan)])
    write_rollouts(run / "work" / "rl_source_1", 9, [group])
    assert found(run, "--step", "9")["rollouts"][0]["reward"] is None


def test_two_stages_are_told_apart(run):
    write_rollouts(run / "work" / "rl_source_2", 1, STEPS[1])
    lines = call(run, "--step", "1").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["rl_source_1"] * 2 + ["rl_source_2"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "3"], "must have rollouts of the steps asked for, found steps 1 to 7"),
        (["--steps", "3"], "--steps must have the form A:B, got '3'"),
        (["--steps", "a:b"], "--steps must have the form A:B"),
        (["--step", "1", "--steps", "1:2"], "exclude each other"),
    ],
)
def test_wrong_steps_are_explained_in_one_line(run, arguments, message):
    done = call(run, *arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("folder", "found"), [("none", "no folder"), ("empty", "no rollouts")])
def test_a_folder_without_rollouts_is_explained(tmp_path, folder, found):
    (tmp_path / "empty").mkdir()
    done = call(tmp_path / folder)
    assert done.exit_code == 1
    assert f"must be a run directory or an RL work directory with rollouts, found {found}" in (
        done.stderr
    )


def test_a_malformed_file_is_named(run):
    path = run / "work" / "rl_source_1" / "rollouts" / "step=000002" / "rollouts.parquet"
    path.write_bytes(b"not parquet")
    done = call(run)
    assert done.exit_code == 1
    assert f"{path} must be readable as Parquet" in done.stderr


def test_printing_needs_neither_torch_nor_transformers(run):
    code = (
        "import sys; from past_ray.cli.rollouts import rollouts; from pathlib import Path\n"
        f"rollouts(Path({str(run)!r}), full=True)\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "where lives anna" in done.stdout


def test_answers_that_wrap_lines_stay_on_one(run):
    long = dataclasses.replace(STEPS[1][0].rollouts[0], answer="one\ntwo\n" + "x" * 300)
    group = RolloutGroup(question_id="q", rollouts=[long])
    write_rollouts(run / "work" / "rl_source_1", 9, [group])
    lines = call(run, "--step", "9").stdout.splitlines()
    assert len(lines) == 3
    assert "one two xxx" in lines[1]
