"""How well a model predicts texts: what it forgot shows on texts that have nothing to do with it.

A long text is cut into windows that share one token, so that every token but the first of a text is
scored exactly once::

    tokens            t0 t1 t2 t3 t4 t5 t6           max_length 4
    window 1          t0 t1 t2 t3                    scores t1 t2 t3
    window 2                   t3 t4 t5 t6           scores t4 t5 t6

The first tokens of a window see little of what came before, so perplexities compare only at equal
``max_length``. The same windows are scored before and after injection.

Shapes: B = windows, T = token positions, V = vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from past_ray.errors import ConfigError, DataError, SkillVectorError
from past_ray.rl.logprobs import chosen_logprobs
from past_ray.skill.weights import HEAD

PADDING_ID = 0
"""Any id will do: padding is masked, stands right of what is scored and is not scored itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenNLL:
    """Negative log-likelihood of texts."""

    nll: float
    """Summed over the scored tokens, in nats."""

    num_scored: int
    """Tokens that had a token before them."""

    num_read: int
    """Tokens of all texts: ``num_scored`` and the first of each text."""

    num_predicted: int
    """Scored tokens that were the most likely ones."""

    @property
    def perplexity(self) -> float:
        """``exp(nll / num_scored)``; infinite where that overflows."""
        try:
            return math.exp(self.nll / self.num_scored)
        except OverflowError:
            return math.inf

    @property
    def accuracy(self) -> float:
        """Share of the scored tokens that were the most likely ones."""
        return self.num_predicted / self.num_scored


def token_nll(
    model_folder: Path,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_tokens: int,
    device: str,
    weights: Mapping[str, Tensor] | None = None,
) -> TokenNLL:
    """Score every token of ``texts`` in fp32; nothing is cut off.

    Args:
        model_folder: A causal language model and its tokenizer.
        texts: Documents; each is scored on its own.
        max_length: Tokens of a window, at least 2 and within the model's context.
        batch_tokens: Padded tokens of one forward pass; a single window may exceed it.
        device: Where to compute, e.g. ``cuda``.
        weights: Parameters to use instead of the folder's, under Hugging Face names.

    Raises:
        ConfigError: ``max_length`` does not suit the model.
        DataError: No token can be scored.
        SkillVectorError: ``weights`` are not those of this model.
    """
    tokenizer = cast("Tokenizer", AutoTokenizer.from_pretrained(model_folder))
    token_ids = [_encode(tokenizer, text) for text in texts]
    model = _load(model_folder, weights)
    cast("nn.Module", model).to(device)
    _check_length(model, max_length)
    windows = [window for ids in token_ids for window in cut_windows(ids, max_length)]
    if not windows:
        raise DataError(
            f"scoring needs a text of at least two tokens, found none in {len(texts)} texts."
            " Give longer texts."
        )
    nll, num_predicted = 0.0, 0
    for batch in batch_windows(windows, batch_tokens):
        batch_nll, batch_predicted = _score(model, batch)
        nll += batch_nll
        num_predicted += batch_predicted
    return TokenNLL(
        nll=nll,
        num_scored=sum(len(window) - 1 for window in windows),
        num_read=sum(map(len, token_ids)),
        num_predicted=num_predicted,
    )


def cut_windows(token_ids: Sequence[int], max_length: int) -> list[Sequence[int]]:
    """Return windows of at most ``max_length`` ids; each begins with the last id of the one before.

    Example: ``cut_windows([1, 2, 3, 4], 3)`` is ``[[1, 2, 3], [3, 4]]``.
    """
    step = max_length - 1
    return [token_ids[start : start + max_length] for start in range(0, len(token_ids) - 1, step)]


def batch_windows(windows: Sequence[Sequence[int]], batch_tokens: int) -> list[list[Sequence[int]]]:
    """Return windows in batches of similar length whose padded size is within ``batch_tokens``."""
    batches: list[list[Sequence[int]]] = []
    for window in sorted(windows, key=len, reverse=True):
        # Longest first, so the first window of a batch is as wide as the batch.
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0]) <= batch_tokens:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize with the special tokens the model was trained with; long texts are no mistake."""
    return cast("list[int]", tokenizer(text, truncation=False, verbose=False)["input_ids"])


@torch.inference_mode()
def _score(model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Return summed NLL and the number of tokens predicted right."""
    lengths = [len(window) for window in windows]
    rows = [[*window, *[PADDING_ID] * (lengths[0] - len(window))] for window in windows]
    token_ids = torch.tensor(rows, device=model.device)  # [B, T]
    positions = torch.arange(lengths[0], device=model.device)
    mask = positions < torch.tensor(lengths, device=model.device)[:, None]  # [B, T]
    logits = model(input_ids=token_ids, attention_mask=mask.long(), use_cache=False).logits
    nll, num_predicted = 0.0, 0
    for row, ids, length in zip(logits, token_ids, lengths, strict=True):
        predicting, targets = row[: length - 1], ids[1:length]
        logprobs, _ = chosen_logprobs(predicting, targets, temperature=1.0)
        nll -= logprobs.double().sum().item()
        num_predicted += int((predicting.argmax(dim=-1) == targets).sum())
    return nll, num_predicted


def _load(folder: Path, weights: Mapping[str, Tensor] | None) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    model = cast(
        "PreTrainedModel",
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True),
    ).eval()
    if weights is not None:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        is_tied = bool(model.config.get_text_config().tie_word_embeddings)
        missing = [name for name in missing if not (is_tied and name == HEAD)]
        if missing or unexpected:
            raise SkillVectorError(
                f"weights must be those of the model in {folder}, {len(missing)} are missing"
                f" (first: {missing[:3]}) and {len(unexpected)} unknown (first: {unexpected[:3]})."
                " Give every parameter once, adapters merged."
            )
    return model


def _check_length(model: PreTrainedModel, max_length: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", max_length)
    if not 2 <= max_length <= context:
        raise ConfigError(
            f"max_length must be from 2 to the {context} positions of the model, got {max_length}."
        )
