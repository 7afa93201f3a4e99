"""Where the texts come from that are trained besides the documents themselves."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from past_ray.config.base import StrictConfig

PassageKind = Literal["implications", "implications_long", "rewrite", "self_qa"]
"""What a model writes about a short passage: its consequences as a list, the same at length, the
passage in other words, or questions with answers."""

WindowSize = Annotated[int, Field(ge=16)]
"""Tokens of one window."""


class GenerationConfig(StrictConfig):
    """How the model that is adapted writes texts."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy and makes all texts of one prompt equal."""

    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest text, in tokens. Texts that reach it are kept and counted."""

    batch_size: int = Field(default=64, ge=1)
    """Texts that a generator writes before it saves them: what a killed job repeats at most."""


class PassageTextsConfig(GenerationConfig):
    """Texts about whole documents that fit a prompt, such as SQuAD passages."""

    kind: Literal["passages"] = "passages"
    """Selects this source of texts."""

    kinds: tuple[PassageKind, ...] = Field(default=("implications",), min_length=1)
    """What is written about every passage."""

    texts_per_kind: int = Field(default=5, ge=1)
    """Texts of each kind about each passage."""


class WindowTextsConfig(GenerationConfig):
    """Texts and questions about windows of long documents, such as those of LooGLE."""

    kind: Literal["windows"] = "windows"
    """Selects this source of texts."""

    text_sizes: tuple[WindowSize, ...] = Field(default=(1024, 2048, 4096), min_length=1)
    """Sizes of the windows that are summarised and recalled, in tokens."""

    text_overlap: int = Field(default=256, ge=0)
    """Tokens that two neighbouring windows of these share."""

    texts_per_window: int = Field(default=16, ge=2, multiple_of=2)
    """Texts about each window: one half summaries, the other half recalled from a summary each."""

    pair_sizes: tuple[WindowSize, ...] = Field(default=(128, 256, 512), min_length=1)
    """Sizes of the windows that questions are asked about, in tokens."""

    pair_overlap: int = Field(default=16, ge=0)
    """Tokens that two neighbouring windows of these share."""

    pairs_per_window: int = Field(default=8, ge=1)
    """Questions with answers asked for about each window."""

    max_windows_per_document: int | None = Field(default=None, ge=1)
    """Windows of each size that are read, from the beginning of a document; null reads all. What
    is not read is counted in the report."""

    on_no_pairs: Literal["fail", "gold"] = "fail"
    """What happens where no pair about a document can be read: the run ends, or (``gold``) a
    source document lends the questions of its split in their place, counted in the report. No
    question of a target or of the validation domain is ever lent."""

    @model_validator(mode="after")
    def _check_overlaps(self) -> "WindowTextsConfig":
        for name in ("text", "pair"):
            sizes: tuple[int, ...] = getattr(self, f"{name}_sizes")
            overlap: int = getattr(self, f"{name}_overlap")
            if overlap >= min(sizes):
                raise ValueError(
                    f"{name}_overlap must be below every one of {name}_sizes, got {overlap} and "
                    f"{list(sizes)}. Lower it or leave out the smaller sizes."
                )
        return self


class GivenTextsConfig(StrictConfig):
    """Texts that were written before, by any model; nothing is generated."""

    kind: Literal["given"] = "given"
    """Selects this source of texts."""

    path: Path
    """JSON lines ``{"request_id": "p0#rewrite-0", "text": "..."}``."""


TextsConfig = Annotated[
    PassageTextsConfig | WindowTextsConfig | GivenTextsConfig, Field(discriminator="kind")
]
