import asyncio

import pytest

from past_ray.envs.base import EnvStep
from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.envs.rollout import Codec, completion_seed, run_group
from past_ray.errors import GenerationError
from past_ray.rl.types import Completion, RolloutStatus, SamplingParams
from past_ray.tasks.examples import QAExample

EXAMPLE = QAExample(question_id="q1", messages=({"role": "user", "content": "ab"},), answer="yes")
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=4)


def letters(messages):
    return [ord(letter) for message in messages for letter in message["content"]]


def text(token_ids):
    return "".join(chr(token_id) for token_id in token_ids if token_id)


CODEC = Codec(render=letters, decode=text, render_reply=letters)


def answer_ids(answer, *, finish_reason="stop", policy_version=7):
    token_ids = [*map(ord, answer), 0]
    return Completion(
        token_ids=token_ids,
        logprobs=[-0.5] * len(token_ids),
        finish_reason=finish_reason,
        policy_version=policy_version,
    )


def roll_out(generate, *, grade=lambda answer, gold: float(answer == gold), codec=CODEC, **kwargs):
    arguments = {
        "make_env": lambda example: ClosedBookQA(example, grade),
        "generate": generate,
        "codec": codec,
        "group_size": 2,
        "sampling": SAMPLING,
        "seed": 3,
        "step": 5,
    }
    return asyncio.run(run_group(EXAMPLE, **(arguments | kwargs)))


async def say_yes(prompt, sampling):
    return answer_ids("yes")


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


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_a_grading_error(reward):
    rollout = roll_out(say_yes, grade=lambda answer, gold: reward).rollouts[0]
    assert (rollout.status, rollout.reward) == (RolloutStatus.GRADING_ERROR, None)


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
