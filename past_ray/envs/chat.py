"""Turns chat messages into token ids by a tokenizer's chat template, for one turn or several.

In an episode of several turns the sampled ids stay as they are, so the template must be *append
only*: what it writes before and behind an assistant's message may depend on nothing that comes
later. Templates that drop earlier reasoning, or that move the system prompt to the last message,
would show the policy another history than the one it is trained on. They are refused::

    rendered          <user> hi <eos> <assistant>  PROBE  <eos> <user> more <eos> <assistant>
                      |---- history, checked ----|        |--|  |-------- reply ----------|
                                                      closing_ids
"""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from past_ray.envs.rollout import Codec
from past_ray.errors import ConfigError
from past_ray.tasks.examples import Message

_PROBE = "probe"
_THOUGHT_PROBE = "<think>\nprobing\n</think>\n\nprobe"
"""Answers whose place in the text is looked up; templates cut the second kind."""


def chat_codec(tokenizer: PreTrainedTokenizerBase, *, max_turns: int = 1) -> Codec:
    """Render messages by the tokenizer's chat template and decode without special tokens.

    Args:
        tokenizer: Has a chat template and an end of sequence.
        max_turns: Above 1 the codec also renders replies, if the template allows it.

    Raises:
        ConfigError: If the tokenizer lacks either, or its template cannot render several turns.
    """
    _check_tokenizer(tokenizer)
    chat = _Chat(tokenizer)
    if max_turns == 1:
        return Codec(render=chat.render, decode=chat.decode)
    replies = _Replies(chat)
    return Codec(
        render=chat.render,
        decode=chat.decode,
        render_reply=replies.render,
        closing_ids=replies.closing_ids,
    )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer in {tokenizer.name_or_path} must have a chat template; it has none. "
            "Save one with the model: tokenizer.chat_template = ..."
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer in {tokenizer.name_or_path} must have an end-of-sequence token, or no "
            "completion ever ends by itself; it has none. Save one: tokenizer.eos_token = ..."
        )


class _Chat:
    """A tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = tokenizer.name_or_path
        self.eos_id = tokenizer.eos_token_id
        self._tokenizer = tokenizer

    def render(self, messages: Sequence[Message]) -> list[int]:
        return self.encode(self.text(messages))

    def decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Return ids; a beginning of sequence is the template's to write, once."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        text: Any = self._tokenizer.apply_chat_template(
            [{"role": message["role"], "content": message["content"]} for message in messages],
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return str(text)


class _Replies:
    """What a template writes behind an answer: closing ids, messages, and the next opening."""

    def __init__(self, chat: _Chat) -> None:
        """Check that histories only ever grow.

        Raises:
            ConfigError: If the template rewrites them.
        """
        self._chat = chat
        tails = {
            tail
            for start in self._starts()
            for answer in (_PROBE, _THOUGHT_PROBE)
            for tail in self._first_and_second_tail(start, answer)
        }
        if len(tails) != 1:
            raise self._refusal("puts different text behind an answer, depending on where it is")
        self.closing_ids = self._find_closing_ids()
        self.render([_user("more")])

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids from the end of a closed answer to where the policy answers again.

        Raises:
            ConfigError: If these messages would change what is in front of them.
        """
        tail_ids = self._chat.encode(self._tail([_user("hi")], _PROBE, messages))
        length = len(self.closing_ids)
        if tuple(tail_ids[:length]) != self.closing_ids:
            raise self._refusal("closes an answer differently once a reply follows")
        return tail_ids[length:]

    def _starts(self) -> list[list[Message]]:
        """Return conversations up to the first answer: with a system prompt too, if allowed."""
        plain = [_user("hi")]
        with_system: list[Message] = [{"role": "system", "content": "be brief"}, *plain]
        try:
            self._chat.text(with_system)
        except TemplateError:
            return [plain]
        return [plain, with_system]

    def _first_and_second_tail(self, start: list[Message], answer: str) -> list[str]:
        reply = [_user("more")]
        longer = [*start, _assistant(answer), *reply]
        return [self._tail(history, answer, reply) for history in (start, longer)]

    def _tail(self, history: list[Message], answer: str, reply: Sequence[Message]) -> str:
        """Return the text from the end of ``answer`` on.

        White space in front of the answer is the policy's to sample.
        """
        head = self._chat.text(history)
        whole = self._chat.text([*history, _assistant(answer), *reply])
        rest = whole[len(head) :].lstrip()
        if not (whole.startswith(head) and rest.startswith(answer)):
            raise self._refusal("rewrites what came before (drops reasoning, say) after a reply")
        return rest[len(answer) :]

    def _find_closing_ids(self) -> tuple[int, ...]:
        """Return the ids behind a last answer, up to the end of sequence, or else the first one."""
        alone = self._chat.text([_user("hi"), _assistant(_PROBE)], add_generation_prompt=False)
        own_ids = self._chat.encode(alone.rpartition(_PROBE)[2])
        eos_id = self._chat.eos_id
        return tuple(own_ids[: own_ids.index(eos_id) + 1] if eos_id in own_ids else own_ids[:1])

    def _refusal(self, what: str) -> ConfigError:
        return ConfigError(
            "with more than one turn a chat template must only ever append, but that of "
            f"{self._chat.name} {what}. Sampled tokens would be trained in another context than "
            "they were sampled in. Change tokenizer.chat_template or use one turn."
        )


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
