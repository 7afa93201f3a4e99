import asyncio
import math
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from past_ray.envs.base import EnvStep
from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.errors import ActorLostError
from past_ray.rl.types import RolloutStatus
from tests.rollout_groups import answer_ids, group_coroutine, roll_out, say_yes


def test_a_reward_part_that_is_not_finite_is_a_grading_error():
    class Part(ClosedBookQA):
        def step(self, answer):
            return EnvStep(reward=1.0, is_done=True, reward_parts={"style": math.nan})

    rollout = roll_out(say_yes, make_env=lambda example: Part(example, float)).rollouts[0]
    assert rollout.status is RolloutStatus.GRADING_ERROR
    assert "style = nan" in rollout.error


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit("no"), StopIteration("no")])
def test_an_environment_that_raises_anything_where_it_starts_or_steps_is_a_grading_error(error):
    def raise_error(*arguments):
        raise error

    class Raises(ClosedBookQA):
        def reset(self):
            raise error

    for make_env in (
        lambda example: Raises(example, float),
        lambda example: ClosedBookQA(example, raise_error),
        raise_error,
    ):
        rollout = roll_out(say_yes, make_env=make_env).rollouts[0]
        assert (rollout.status, rollout.reward) == (RolloutStatus.GRADING_ERROR, None)
        assert rollout.error == f"GradingError: {type(error).__name__}: no"


def test_an_environment_that_hangs_is_a_grading_error_after_its_timeout():
    release = threading.Event()
    started = time.perf_counter()
    rollout = roll_out(
        say_yes, grade=lambda answer, gold: release.wait(30), env_timeout_s=0.2
    ).rollouts[0]
    assert time.perf_counter() - started < 5
    release.set()
    assert (rollout.status, rollout.reward) == (RolloutStatus.GRADING_ERROR, None)
    assert "within 0.2 s" in rollout.error
    assert rollout.turns[0].completion == answer_ids("yes")
    assert 0.2 <= rollout.environment_s < 5


HANGS = """
    import threading
    from tests.rollout_groups import roll_out, say_yes

    hang = lambda answer, gold: threading.Event().wait()
    print(roll_out(say_yes, grade=hang, env_timeout_s=0.2).rollouts[0].status)
"""


def test_an_environment_that_never_returns_does_not_keep_the_process_from_ending():
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANGS)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert process.stdout.strip() == "grading_error"


def test_environments_that_wait_do_not_wait_for_each_other():
    def grade(answer, gold):
        time.sleep(0.2)
        return 1.0

    started = time.perf_counter()
    group = roll_out(say_yes, grade=grade, group_size=256)
    # One after the other they take 51 s, in the threads of asyncio.to_thread on two cores 9 s.
    assert time.perf_counter() - started < 3.0
    assert all(rollout.reward == 1.0 for rollout in group.rollouts)
    assert all(rollout.environment_s >= 0.2 for rollout in group.rollouts)


def test_hung_environments_leave_the_others_of_the_process_alone():
    release = threading.Event()

    def grade(answer, gold):
        return float(release.wait(30)) if answer == "hang" else 1.0

    answers = iter(["hang", "yes"] * 32)

    async def generate(prompt, sampling):
        return answer_ids(next(answers))

    rollouts = roll_out(generate, grade=grade, group_size=64, env_timeout_s=1.5).rollouts
    release.set()
    statuses = [rollout.status for rollout in rollouts]
    assert statuses.count(RolloutStatus.GRADING_ERROR) == 32
    assert [rollout.reward for rollout in rollouts if rollout.answer == "yes"] == [1.0] * 32


def test_the_event_loop_goes_on_while_an_environment_blocks():
    async def ticks_during_a_group():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        await group_coroutine(grade=lambda answer, gold: time.sleep(0.3) or 1.0)
        ticking.cancel()
        return ticks

    assert asyncio.run(ticks_during_a_group()) >= 10


def test_time_is_booked_on_the_side_that_was_waited_for():
    async def generate(prompt, sampling):
        await asyncio.sleep(0.1)
        return answer_ids("yes")

    rollout = roll_out(generate, grade=lambda answer, gold: time.sleep(0.3) or 1.0).rollouts[0]
    assert 0.1 <= rollout.generation_s < rollout.environment_s
    assert rollout.environment_s >= 0.3


def test_an_environment_cannot_pretend_that_a_generator_was_lost():
    def grade(answer, gold):
        raise ActorLostError("my tool server died")

    assert roll_out(say_yes, grade=grade).rollouts[0].status is RolloutStatus.GRADING_ERROR
