"""Who decides whether an answer is correct: a rule, a local model or an endpoint."""

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from past_ray.config.base import StrictConfig
from past_ray.config.runtime import GeneratorConfig

RuleName = Literal["exact_match", "token_f1", "gold_token_recall"]
"""The rules of ``past_ray.tasks.grading``."""


class RuleJudgeConfig(StrictConfig):
    """A pure function of the answer and the gold answer."""

    kind: Literal["rule"] = "rule"
    """Selects this judge."""

    rule: RuleName = "gold_token_recall"
    """What scores an answer."""

    correct_at: float = Field(default=0.67, gt=0, le=1)
    """An answer with at least this score is correct."""

    max_words: int | None = Field(default=48, ge=1)
    """Only so many words of an answer are graded, so that a long one cannot collect every word; a
    longer gold answer gets as many words as it has itself. None grades all. On SEAL's answers of
    64 tokens at most, 48 words agree with GPT-4.1 as well as all; 32 lose 0.15 points."""


class ModelJudgeConfig(StrictConfig):
    """A local model that is asked whether the answer is correct, greedily."""

    kind: Literal["model"] = "model"
    """Selects this judge."""

    path: Path
    """Hugging Face folder with a chat template."""

    max_new_tokens: int = Field(default=16, ge=1)
    """Longest verdict; a model that reasons first needs hundreds."""

    generator: GeneratorConfig = GeneratorConfig(max_model_len=2048, max_num_seqs=32)
    """The engine; ``max_model_len`` holds instruction, question, both answers and the verdict."""

    @model_validator(mode="after")
    def _check_lengths(self) -> "ModelJudgeConfig":
        if self.max_new_tokens >= self.generator.max_model_len:
            raise ValueError(
                f"max_new_tokens must be below generator.max_model_len, got {self.max_new_tokens} "
                f"and {self.generator.max_model_len}. Raise the latter."
            )
        return self


class EndpointJudgeConfig(StrictConfig):
    """Any endpoint that speaks OpenAI's chat completions."""

    # A key that was pasted where its variable's name belongs must not be printed.
    model_config = ConfigDict(hide_input_in_errors=True)

    kind: Literal["endpoint"] = "endpoint"
    """Selects this judge."""

    base_url: str
    """Address up to and including the version, e.g. ``https://api.openai.com/v1``."""

    model: str = Field(min_length=1)
    """Name of the model at the endpoint."""

    api_key_env: str | None = None
    """Name of the environment variable that holds the key, never the key; None sends none."""

    max_new_tokens: int = Field(default=16, ge=1)
    """Longest verdict; a model that reasons first needs hundreds."""

    requests_per_minute: float = Field(default=60.0, gt=0)
    """Requests are sent at least this far apart, retries included."""

    max_concurrent: int = Field(default=8, ge=1)
    """Requests that may wait for their answer at once."""

    timeout_s: float = Field(default=30.0, gt=0)
    """Longest wait for one answer."""

    max_retries: int = Field(default=5, ge=0)
    """Further attempts after a failed one."""

    cache_dir: Path | None = None
    """Where verdicts are kept, one file each; several judges may share it. None keeps none."""

    price_per_million_input: float = Field(default=0.0, ge=0)
    """Price of a million prompt tokens, in any currency."""

    price_per_million_output: float = Field(default=0.0, ge=0)
    """Price of a million sampled tokens, in the same currency."""

    @field_validator("base_url")
    @classmethod
    def _check_base_url(cls, base_url: str) -> str:
        parts = urlsplit(base_url)
        is_plain = not (parts.username or parts.password or parts.query or parts.fragment)
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
            raise ValueError(
                "must be an http:// or https:// address without credentials or query, found "
                "another text. The key belongs into the variable that api_key_env names."
            )
        return base_url

    @field_validator("api_key_env")
    @classmethod
    def _check_api_key_env(cls, api_key_env: str | None) -> str | None:
        if api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", api_key_env):
            raise ValueError(
                "must be the name of an environment variable in capitals, such as OPENAI_API_KEY, "
                "found another text. Put the key into that variable, not here."
            )
        return api_key_env


JudgeConfig = Annotated[
    RuleJudgeConfig | ModelJudgeConfig | EndpointJudgeConfig, Field(discriminator="kind")
]


class CalibrationConfig(StrictConfig):
    """What ``past-ray judge calibrate`` reads."""

    judge: JudgeConfig = RuleJudgeConfig()
    """The judge whose verdicts are compared with the graded files."""
