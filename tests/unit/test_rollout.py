import asyncio
import math

import pytest

from past_ray.envs.base import EnvStep
from past_ray.envs.rollout import Codec, completion_seed
from past_ray.errors import ActorLostError, GenerationError
from past_ray.rl.types import Completion, RolloutStatus
from tests.rollout_groups import (
    EXAMPLE,
    answer_ids,
    group_coroutine,
    letters,
    roll_out,
    say_yes,
    text,
)


def test_a_completed_rollout_holds_prompt_completion_answer_reward_and_version():
    group = roll_out(say_yes)
    assert group.question_id == "q1"
    assert [rollout.rollout_id for rollout in group.rollouts] == ["5/q1/0", "5/q1/1"]
    for rollout in group.rollouts:
        assert rollout.status is RolloutStatus.COMPLETED
        assert (rollout.answer, rollout.reward, rollout.policy_version) == ("yes", 1.0, 7)
        assert rollout.turns[0].prompt_ids == [ord("a"), ord("b")]
        assert rollout.turns[0].completion == answer_ids("yes")


def test_a_generator_that_raises_gives_a_status_and_no_reward():
    async def generate(prompt, sampling):
        raise GenerationError("prompt too long")

    rollout = roll_out(generate).rollouts[0]
    assert rollout.status is RolloutStatus.GENERATION_ERROR
    assert (rollout.reward, rollout.turns, rollout.policy_version) == (None, [], -1)
    assert rollout.error == "GenerationError: prompt too long"


def test_an_aborted_completion_is_a_generation_error():
    async def generate(prompt, sampling):
        return answer_ids("yes", finish_reason="abort")

    assert roll_out(generate).rollouts[0].status is RolloutStatus.GENERATION_ERROR


def test_a_completion_that_hit_its_limit_is_graded_like_any_other():
    async def generate(prompt, sampling):
        return answer_ids("yes", finish_reason="length")

    assert roll_out(generate).rollouts[0].reward == 1.0


def test_a_grader_that_raises_excludes_the_rollout_but_keeps_what_was_sampled():
    def grade(answer, gold):
        raise ZeroDivisionError("empty gold answer")

    rollout = roll_out(say_yes, grade=grade).rollouts[0]
    assert rollout.status is RolloutStatus.GRADING_ERROR
    assert (rollout.reward, rollout.answer, rollout.policy_version) == (None, "yes", 7)
    assert rollout.turns[0].completion == answer_ids("yes")
    assert "empty gold answer" in rollout.error


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, None, "much"])
def test_a_reward_that_is_no_finite_number_is_a_grading_error(reward):
    rollout = roll_out(say_yes, grade=lambda answer, gold: reward).rollouts[0]
    assert (rollout.status, rollout.reward) == (RolloutStatus.GRADING_ERROR, None)
    assert rollout.turns[0].completion == answer_ids("yes")


def test_one_failed_rollout_leaves_the_rest_of_its_group_alone():
    calls = []

    async def generate(prompt, sampling):
        calls.append(sampling.seed)
        if len(calls) == 1:
            raise GenerationError("lost")
        return answer_ids("no")

    statuses = [rollout.status for rollout in roll_out(generate, group_size=3).rollouts]
    assert sorted(statuses) == ["completed", "completed", "generation_error"]


def test_rollouts_of_a_group_are_driven_concurrently():
    waiting = []

    async def generate(prompt, sampling):
        everybody = asyncio.get_running_loop().create_future()
        waiting.append(everybody)
        if len(waiting) == 4:
            for future in waiting:
                future.set_result(None)
        await everybody
        return answer_ids("yes")

    assert len(roll_out(generate, group_size=4).rollouts) == 4


def test_seeds_do_not_depend_on_who_is_answered_first():
    def seed_by_rollout(delays):
        delays = iter(delays)

        async def generate(prompt, sampling):
            await asyncio.sleep(next(delays))
            return answer_ids(str(sampling.seed))

        return {rollout.rollout_id: rollout.answer for rollout in roll_out(generate).rollouts}

    seeds = seed_by_rollout([0.0, 0.02])
    assert seeds == seed_by_rollout([0.02, 0.0])
    assert seeds["5/q1/0"] == str(completion_seed(3, "5/q1/0", 0))


def test_the_seed_differs_by_run_seed_rollout_and_turn_and_is_stable_across_versions_of_python():
    seeds = {
        completion_seed(0, "5/q1/0", 0),
        completion_seed(1, "5/q1/0", 0),
        completion_seed(0, "5/q1/1", 0),
        completion_seed(0, "6/q1/0", 0),
        completion_seed(0, "5/q1/0", 1),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    # First 8 bytes of `printf 0/5/q1/0/0 | sha256sum`, shifted right by one bit.
    assert completion_seed(0, "5/q1/0", 0) == SEED_BY_SHA256SUM


SEED_BY_SHA256SUM = 1025339287226458620


class TwoQuestions:
    """Asks back once; rewards add up."""

    def __init__(self, example):
        self._example = example
        self._answers = []

    def reset(self):
        return list(self._example.messages)

    def step(self, answer):
        self._answers.append(answer)
        if len(self._answers) == 1:
            return EnvStep(reward=0.25, is_done=False, messages=[{"role": "user", "content": "c"}])
        return EnvStep(reward=0.5, is_done=True)


def test_a_later_turn_holds_only_the_reply_while_the_generator_sees_everything():
    prompts = []

    async def generate(prompt, sampling):
        prompts.append(prompt)
        return answer_ids("x")

    group = roll_out(generate, make_env=TwoQuestions, group_size=1, max_turns=2)
    rollout = group.rollouts[0]
    assert [turn.prompt_ids for turn in rollout.turns] == [[ord("a"), ord("b")], [ord("c")]]
    assert prompts[1] == [ord("a"), ord("b"), ord("x"), 0, ord("c")]
    assert rollout.reward == 0.75


def test_an_environment_that_does_not_end_in_time_is_a_failed_rollout():
    rollout = roll_out(say_yes, make_env=TwoQuestions, max_turns=1).rollouts[0]
    assert rollout.status is RolloutStatus.GENERATION_ERROR
    assert "within 1 turns" in rollout.error


def test_several_turns_without_a_way_to_render_replies_is_a_failed_rollout():
    codec = Codec(render=letters, decode=text)
    rollout = roll_out(say_yes, make_env=TwoQuestions, codec=codec, max_turns=2).rollouts[0]
    assert "render_reply" in rollout.error


def test_every_turn_keeps_its_reward_and_the_parts_add_up_over_turns():
    class Parts:
        def __init__(self, example):
            self._steps = iter(
                [
                    EnvStep(reward=0.25, is_done=False, reward_parts={"form": 0.25}),
                    EnvStep(reward=-1, is_done=True, reward_parts={"form": 0.5, "facts": -1.5}),
                ]
            )

        def reset(self):
            return list(EXAMPLE.messages)

        def step(self, answer):
            return next(self._steps)

    rollout = roll_out(say_yes, make_env=Parts, group_size=1, max_turns=2).rollouts[0]
    assert [turn.reward for turn in rollout.turns] == [0.25, -1.0]
    assert rollout.reward == -0.75
    assert rollout.reward_parts == {"form": 0.75, "facts": -1.5}


def test_a_lost_generator_ends_the_group_and_leaves_no_rollout_running():
    cancelled = []

    async def generate(prompt, sampling):
        if sampling.seed == completion_seed(3, "5/q1/1", 0):
            await asyncio.sleep(0.05)
            raise ActorLostError("generator 0 died")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(sampling.seed)
            raise

    async def lose():
        with pytest.raises(ActorLostError, match="generator 0 died"):
            await group_coroutine(generate=generate, group_size=4)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(lose()) == set()
    assert len(cancelled) == 3


def test_a_group_that_is_asked_for_again_repeats_exactly():
    async def generate(prompt, sampling):
        return answer_ids(str(sampling.seed))

    def record(**kwargs):
        return [(r.rollout_id, r.turns, r.reward) for r in roll_out(generate, **kwargs).rollouts]

    assert record() == record()
    assert record(group_id="6/q1") != record()


def test_the_version_of_a_rollout_is_that_of_its_oldest_turn():
    versions = iter([7, 6])

    async def generate(prompt, sampling):
        return answer_ids("x", policy_version=next(versions))

    group = roll_out(generate, make_env=TwoQuestions, group_size=1, max_turns=2)
    assert group.rollouts[0].policy_version == 6


@pytest.mark.parametrize(
    ("finish_reason", "sampled", "added"),
    [("stop", [120, 0], [99]), ("length", [120], [0, 99]), ("length", [120, 0], [99])],
)
def test_a_reply_closes_an_answer_exactly_if_the_policy_did_not(finish_reason, sampled, added):
    async def generate(prompt, sampling):
        return Completion(
            token_ids=sampled,
            logprobs=[-0.5] * len(sampled),
            finish_reason=finish_reason,
            policy_version=0,
        )

    group = roll_out(generate, make_env=TwoQuestions, group_size=1, max_turns=2)
    assert group.rollouts[0].turns[1].prompt_ids == added
