"""What supervised fine-tuning trains on: token ids and how many of them are the prompt.

The loss covers every token from ``num_prompt_tokens`` on (see ``sft/loss.py``). It is never derived
from token values: a tokenizer may use one id for padding and for the end of a document.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

from past_ray.errors import ConfigError, DataError

ChatMessage = Mapping[str, str]
"""``{"role": "user", "content": "Where does Anna live ?"}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTExample:
    """One sequence.

    ::

        token_ids          [ 7,  8,  9,  4,  5,  2]     7 8 9 is the prompt, 2 ends the document
        num_prompt_tokens  3                            4, 5 and 2 are trained
    """

    token_ids: tuple[int, ...]
    """The whole sequence, prompt first."""

    num_prompt_tokens: int
    """Leading tokens without loss. The first token never has one: nothing predicts it."""

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are predicted from the ones before them and trained."""
        return max(0, len(self.token_ids) - max(1, self.num_prompt_tokens))


def document_examples(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[SFTExample]:
    """Turn documents into examples with loss on every token, each ending with end-of-sequence.

    A document longer than ``max_length`` is split into consecutive pieces of nearly equal length;
    together the pieces hold exactly the document's tokens, and only the last one ends with
    end-of-sequence. Short documents are not joined, so no document ever sees another.

    Args:
        texts: The documents, in order.
        tokenizer: Its special tokens are not added, except end-of-sequence.
        max_length: Longest piece, in tokens.

    Raises:
        DataError: A document has no tokens; the message has its position.
        ConfigError: The tokenizer has no end-of-sequence token.
    """
    eos_id = _eos_id(tokenizer)
    examples: list[SFTExample] = []
    for position, text in enumerate(texts):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        if not token_ids:
            raise DataError(
                f"Every document must have a token, document {position} of {len(texts)} has none. "
                "Remove empty documents."
            )
        pieces = _split_evenly((*token_ids, eos_id), max_length)
        examples += [SFTExample(token_ids=piece, num_prompt_tokens=0) for piece in pieces]
    return examples


def chat_example(
    messages: Sequence[ChatMessage], answer: str, tokenizer: PreTrainedTokenizerBase
) -> SFTExample:
    """Put an answer behind a chat prompt, with loss on the answer and end-of-sequence only.

    The prompt's ids are exactly those a generator is given at inference: the chat template with its
    generation prompt. The answer is tokenized on its own, as a sampled answer would be appended.

    Raises:
        DataError: The answer has no tokens.
        ConfigError: The tokenizer has no end-of-sequence token or no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "The tokenizer must have a chat template to train on questions, found none. Add "
            "chat_template.jinja to the model folder."
        )
    prompt = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    prompt_ids = tuple(cast("list[int]", prompt))
    answer_ids = tokenizer.encode(answer, add_special_tokens=False)
    if not answer_ids:
        raise DataError(
            f"An answer must have a token, {answer!r} has none. Remove the question or answer it."
        )
    return SFTExample(
        token_ids=(*prompt_ids, *answer_ids, _eos_id(tokenizer)), num_prompt_tokens=len(prompt_ids)
    )


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ConfigError(
            "The tokenizer must have one end-of-sequence token, found "
            f"{tokenizer.eos_token!r}. Set eos_token in tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def _split_evenly(token_ids: tuple[int, ...], max_length: int) -> list[tuple[int, ...]]:
    """Cut into the fewest pieces of at most ``max_length``; lengths differ by at most one."""
    num_pieces = -(-len(token_ids) // max_length)
    bounds = [len(token_ids) * index // num_pieces for index in range(num_pieces + 1)]
    return [token_ids[start:end] for start, end in itertools.pairwise(bounds)]
