"""Judges by rule, by a local model and by an endpoint, and which one a configuration asks for."""

import threading
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from past_ray.config.judge import JudgeConfig, ModelJudgeConfig, RuleJudgeConfig
from past_ray.engine.endpoint_judge import EndpointJudge
from past_ray.engine.generator_checks import PromptLimits, prompt_error, vocab_size
from past_ray.engine.generators import build_generator
from past_ray.envs.chat import chat_codec
from past_ray.envs.rollout import Codec
from past_ray.errors import GradingError
from past_ray.rl.protocols import Generator
from past_ray.rl.types import SamplingParams
from past_ray.tasks.grading import GRADERS, first_words
from past_ray.tasks.judging import (
    JudgeFailure,
    JudgeItem,
    JudgeOutcome,
    JudgeStats,
    Verdict,
    judge_distinct,
    judge_messages,
    verdict_outcome,
)


class RuleJudge:
    """Scores by a pure rule; its only failure is an empty gold answer."""

    def __init__(self, config: RuleJudgeConfig) -> None:
        """Choose the rule that ``config`` names."""
        self._config = config
        self._grade = GRADERS[config.rule]

    def judge(self, items: Sequence[JudgeItem]) -> list[JudgeOutcome]:
        """Return one outcome per item, in order."""
        return [self._judge_one(item) for item in items]

    def stats(self) -> JudgeStats:
        """Return zeros: a rule asks nobody."""
        return JudgeStats()

    def close(self) -> None:
        """Do nothing; there is nothing to free."""

    def _judge_one(self, item: JudgeItem) -> JudgeOutcome:
        config, answer = self._config, item.answer
        if config.max_words is not None:
            answer = first_words(answer, max_words=config.max_words, gold=item.gold)
        try:
            score = self._grade(answer, item.gold)
        except GradingError as error:
            return JudgeFailure(error=str(error))
        return Verdict(score=score, is_correct=score >= config.correct_at)


class ModelJudge:
    """Asks a generator for yes or no, greedily, so the same answer gets the same verdict."""

    def __init__(
        self, generator: Generator, codec: Codec, *, limits: PromptLimits, max_new_tokens: int
    ) -> None:
        """Take over the generator.

        Args:
            generator: Closed by ``close``.
            codec: Renders messages for the generator's model.
            limits: What the generator can take; an item that does not fit is a failure.
            max_new_tokens: Longest verdict.
        """
        self._generator = generator
        self._codec = codec
        self._limits = limits
        self._sampling = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
        self._lock = threading.Lock()
        self._num_calls = 0
        self._num_failures = 0

    def judge(self, items: Sequence[JudgeItem]) -> list[JudgeOutcome]:
        """Return one outcome per item, in order; equal items are asked once.

        Raises:
            ClusterError: The generator is closed.
        """
        outcomes = judge_distinct(items, self._ask)
        with self._lock:
            self._num_failures += sum(isinstance(outcome, JudgeFailure) for outcome in outcomes)
        return outcomes

    def stats(self) -> JudgeStats:
        """Return counts since the judge was built."""
        with self._lock:
            return JudgeStats(num_calls=self._num_calls, num_failures=self._num_failures)

    def close(self) -> None:
        """Free the generator."""
        self._generator.close()

    def _ask(self, items: Sequence[JudgeItem]) -> list[JudgeOutcome]:
        prompts = [self._codec.render(judge_messages(item)) for item in items]
        errors = [prompt_error(prompt, self._sampling, self._limits) for prompt in prompts]
        fitting = [prompt for prompt, error in zip(prompts, errors, strict=True) if error is None]
        with self._lock:
            self._num_calls += len(fitting)
        completions = iter(
            self._generator.generate(fitting, [self._sampling] * len(fitting)) if fitting else ()
        )
        return [
            verdict_outcome(self._codec.decode(next(completions).token_ids))
            if error is None
            else JudgeFailure(error=str(error))
            for error in errors
        ]


def build_judge(config: JudgeConfig) -> RuleJudge | ModelJudge | EndpointJudge:
    """Build the judge that ``config.kind`` names; never another one in its place.

    Raises:
        ConfigError: The model cannot be loaded by its backend, or the endpoint's key is missing.
    """
    if isinstance(config, RuleJudgeConfig):
        return RuleJudge(config)
    if isinstance(config, ModelJudgeConfig):
        tokenizer: Any = AutoTokenizer.from_pretrained(config.path)
        codec = chat_codec(tokenizer)
        limits = PromptLimits(
            max_model_len=config.generator.max_model_len, vocab_size=vocab_size(config.path)
        )
        generator = build_generator(config.generator, config.path)
        return ModelJudge(generator, codec, limits=limits, max_new_tokens=config.max_new_tokens)
    return EndpointJudge(config)
