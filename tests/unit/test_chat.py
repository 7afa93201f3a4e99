import asyncio
import itertools

import pytest

from past_ray.envs.base import EnvStep
from past_ray.envs.chat import chat_codec
from past_ray.envs.rollout import run_group
from past_ray.errors import ConfigError
from past_ray.rl.types import Completion, SamplingParams
from past_ray.tasks.examples import QAExample
from tests.chat_tokenizers import (
    CHATML,
    DROPS_REASONING,
    GEMMA,
    LLAMA2,
    LLAMA3,
    MOVES_SYSTEM_PROMPT,
    NUMBERS_ANSWERS,
    OPENS_REASONING,
    make_chat_tokenizer,
)
from tests.tiny_model import CHAT_TEMPLATE, make_tiny_tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def tokenizer_of(template):
    return make_tiny_tokenizer() if template == CHAT_TEMPLATE else make_chat_tokenizer(template)


def plain_ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


# What the policy itself samples in front of its text, and the text that closes it.
TEMPLATES = {
    "chatml": (CHATML, "", "<|im_end|>"),
    "llama3": (LLAMA3, "", "<|eot_id|>"),
    "llama2": (LLAMA2, " ", " </s>"),
    "gemma": (GEMMA, "", "<end_of_turn>"),
    "world": (CHAT_TEMPLATE, " ", "<eos>"),
}


@pytest.mark.parametrize(("template", "space", "closing"), TEMPLATES.values(), ids=TEMPLATES)
def test_prompt_answers_and_replies_make_up_the_conversation_as_the_template_renders_it(
    template, space, closing
):
    tokenizer = tokenizer_of(template)
    codec = chat_codec(tokenizer, max_turns=3)
    assert list(codec.closing_ids) == plain_ids(tokenizer, closing)
    token_ids = codec.render([user("who is anna ?")])
    for answer, reply in (("anna likes bread .", "where ?"), ("berlin", "is david a baker ?")):
        token_ids += plain_ids(tokenizer, space + answer)
        token_ids += codec.closing_ids
        token_ids += codec.render_reply([user(reply)])
    conversation = [
        user("who is anna ?"),
        assistant("anna likes bread ."),
        user("where ?"),
        assistant("berlin"),
        user("is david a baker ?"),
    ]
    assert token_ids == tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=False
    )


def test_a_reply_is_what_stands_between_the_end_of_an_answer_and_the_next_answer():
    tokenizer = make_chat_tokenizer(CHATML)
    codec = chat_codec(tokenizer, max_turns=2)
    text = "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n"
    reply = codec.render_reply([{"role": "tool", "content": "42"}, user("go on")])
    assert reply == plain_ids(tokenizer, text + "<|im_start|>assistant\n")


def test_an_empty_reply_only_opens_the_next_answer():
    tokenizer = make_chat_tokenizer(CHATML)
    reply = chat_codec(tokenizer, max_turns=2).render_reply([])
    assert reply == plain_ids(tokenizer, "\n<|im_start|>assistant\n")


@pytest.mark.parametrize("template", [LLAMA3, LLAMA2, GEMMA])
def test_the_beginning_of_sequence_comes_once_though_the_tokenizer_adds_one_to_every_text(template):
    tokenizer = make_chat_tokenizer(template)
    assert tokenizer.encode("hi")[0] == tokenizer.bos_token_id
    codec = chat_codec(tokenizer, max_turns=2)
    prompt = codec.render([user("hi")])
    assert prompt.index(tokenizer.bos_token_id) == 0
    assert prompt.count(tokenizer.bos_token_id) == 1
    # Llama 2 opens every user message with one; the others have none in a reply.
    num_expected = 1 if template == LLAMA2 else 0
    assert codec.render_reply([user("hi")]).count(tokenizer.bos_token_id) == num_expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (DROPS_REASONING, "drops reasoning"),
        (MOVES_SYSTEM_PROMPT, "rewrites what came before"),
        (OPENS_REASONING, "rewrites what came before"),
        (NUMBERS_ANSWERS, "different text behind an answer"),
    ],
)
def test_a_template_that_rewrites_history_is_refused_for_several_turns_but_not_for_one(
    template, reason
):
    tokenizer = make_chat_tokenizer(template)
    with pytest.raises(ConfigError, match=rf"must only ever append.*{reason}"):
        chat_codec(tokenizer, max_turns=2)
    assert chat_codec(tokenizer).render_reply is None


def test_a_reply_that_would_change_what_is_before_it_is_refused():
    moves_system = CHATML.replace(
        "{% for m in messages %}",
        "{{ messages | selectattr('role', 'equalto', 'system') | list | length }}"
        "{% for m in messages %}",
    )
    tokenizer = make_chat_tokenizer(CHATML)
    tokenizer.chat_template = moves_system
    codec = chat_codec(tokenizer, max_turns=2)
    with pytest.raises(ConfigError, match="rewrites what came before"):
        codec.render_reply([{"role": "system", "content": "be brief"}])


def test_a_tokenizer_without_a_template_or_without_an_end_of_sequence_is_refused():
    tokenizer = make_chat_tokenizer(CHATML)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="must have an end-of-sequence token"):
        chat_codec(tokenizer)
    tokenizer = make_chat_tokenizer(CHATML)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="must have a chat template"):
        chat_codec(tokenizer)


def test_special_tokens_are_left_out_of_the_answer_the_environment_reads():
    tokenizer = make_chat_tokenizer(CHATML)
    codec = chat_codec(tokenizer)
    assert codec.decode(plain_ids(tokenizer, "yes<|im_end|>")) == "yes"


class AsksBack:
    """Ends at the third answer; keeps what it read."""

    def __init__(self, example):
        self._example = example
        self.answers = []

    def reset(self):
        return list(self._example.messages)

    def step(self, answer):
        self.answers.append(answer)
        return EnvStep(reward=0.5, is_done=len(self.answers) == 3, messages=[user("more")])


def play(codec, completions, *, content="hi", environments=None):
    """Drive one rollout over the given completions; return it and the prompts that were asked."""
    prompts, answers = [], itertools.chain(completions)

    async def generate(prompt, sampling):
        prompts.append(list(prompt))
        return next(answers)

    def make_env(example):
        env = AsksBack(example)
        if environments is not None:
            environments.append(env)
        return env

    group = asyncio.run(
        run_group(
            QAExample(question_id="q", messages=(user(content),), answer=""),
            group_id="0/q",
            make_env=make_env,
            generate=generate,
            codec=codec,
            group_size=1,
            sampling=SamplingParams(temperature=1.0, max_new_tokens=8),
            seed=0,
            env_timeout_s=60.0,
            max_turns=3,
        )
    )
    return group.rollouts[0], prompts


def completion(token_ids, finish_reason="stop"):
    return Completion(
        token_ids=token_ids,
        logprobs=[-0.5] * len(token_ids),
        finish_reason=finish_reason,
        policy_version=0,
    )


def test_sampled_ids_reach_the_learner_though_decoding_and_encoding_gives_others():
    tokenizer = make_chat_tokenizer(CHATML)
    codec = chat_codec(tokenizer, max_turns=3)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "yes"]
    assert plain_ids(tokenizer, codec.decode(letters)) != letters
    sampled = [*letters, tokenizer.eos_token_id]
    environments = []
    rollout, prompts = play(codec, [completion(sampled)] * 3, environments=environments)
    assert [turn.completion.token_ids for turn in rollout.turns] == [sampled] * 3
    assert environments[0].answers == ["yes"] * 3
    first, reply = codec.render([user("hi")]), codec.render_reply([user("more")])
    assert prompts[2] == [*first, *sampled, *reply, *sampled, *reply]
    assert [turn.prompt_ids for turn in rollout.turns] == [first, reply, reply]


def test_an_answer_cut_at_its_limit_is_closed_by_prompt_ids_that_are_not_trained():
    tokenizer = make_chat_tokenizer(CHATML)
    codec = chat_codec(tokenizer, max_turns=3)
    cut = completion(plain_ids(tokenizer, "ye"), "length")
    ended = completion([*plain_ids(tokenizer, "yes"), tokenizer.eos_token_id])
    rollout, prompts = play(codec, [cut, ended, ended])
    reply = codec.render_reply([user("more")])
    assert rollout.turns[0].completion == cut
    assert rollout.turns[1].prompt_ids == [tokenizer.eos_token_id, *reply]
    assert rollout.turns[2].prompt_ids == reply
    conversation = [user("hi"), assistant("ye"), user("more"), assistant("yes"), user("more")]
    assert prompts[2] == tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=False
    )


def test_a_long_prompt_and_long_answers_are_never_cut():
    tokenizer = make_chat_tokenizer(CHATML)
    codec = chat_codec(tokenizer, max_turns=3)
    content = "x" * 100_000
    long_answer = [*plain_ids(tokenizer, "z" * 50_000), tokenizer.eos_token_id]
    rollout, prompts = play(codec, [completion(long_answer)] * 3, content=content)
    assert codec.decode(prompts[0]) == f"user\n{content}\nassistant\n"
    num_reply = len(codec.render_reply([user("more")]))
    assert len(prompts[2]) == len(prompts[0]) + 2 * (len(long_answer) + num_reply)
    assert rollout.turns[0].prompt_ids == prompts[0]
