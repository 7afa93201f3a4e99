"""Groups over a codec of one id per letter, with 0 for the end of an answer."""

import asyncio

from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.envs.rollout import Codec, run_group
from past_ray.rl.types import Completion, SamplingParams
from past_ray.tasks.examples import QAExample

EXAMPLE = QAExample(question_id="q1", messages=({"role": "user", "content": "ab"},), answer="yes")
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=4)


def letters(messages):
    return [ord(letter) for message in messages for letter in message["content"]]


def text(token_ids):
    return "".join(chr(token_id) for token_id in token_ids if token_id)


CODEC = Codec(render=letters, decode=text, render_reply=letters, closing_ids=(0,))


def answer_ids(answer, *, finish_reason="stop", policy_version=7):
    token_ids = [*map(ord, answer), 0]
    return Completion(
        token_ids=token_ids,
        logprobs=[-0.5] * len(token_ids),
        finish_reason=finish_reason,
        policy_version=policy_version,
    )


def group_coroutine(
    *, generate=None, grade=lambda answer, gold: float(answer == gold), codec=CODEC, **kwargs
):
    arguments = {
        "make_env": lambda example: ClosedBookQA(example, grade),
        "generate": generate or say_yes,
        "codec": codec,
        "group_size": 2,
        "sampling": SAMPLING,
        "seed": 3,
        "group_id": "5/q1",
        "env_timeout_s": 60.0,
    }
    return run_group(EXAMPLE, **(arguments | kwargs))


def roll_out(generate, **kwargs):
    return asyncio.run(group_coroutine(generate=generate, **kwargs))


async def say_yes(prompt, sampling):
    return answer_ids("yes")
