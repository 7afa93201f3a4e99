"""A generator as a Ray actor: several threads that forward to one engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.generator_checks import PromptLimits, prompt_error, vocab_size
from past_ray.engine.generators import build_generator
from past_ray.engine.vllm_generator import VLLMGenerator
from past_ray.errors import ClusterError, GenerationError
from past_ray.rl.protocols import Generator
from past_ray.rl.types import Completion, SamplingParams


class GeneratorShell:
    """What runs inside the actor process.

    Methods may run in several threads at once (``max_concurrency``): calls that wait for their
    completions do not keep others out of the engine's batch.
    """

    def __init__(self, config: GeneratorConfig, model_folder: Path) -> None:
        """Store the settings; ``setup`` starts the engine."""
        self._config = config
        self._model_folder = model_folder
        self._generator: Generator | None = None

    def setup(self) -> None:
        """Start the engine on the weights of the model folder.

        Raises:
            ConfigError: If the backend is not installed or refuses the settings.
        """
        self._limits = PromptLimits(
            max_model_len=self._config.max_model_len, vocab_size=vocab_size(self._model_folder)
        )
        self._generator = build_generator(self._config, self._model_folder)

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete every prompt, or raise for the first that does not fit."""
        return self._running().generate(prompts, sampling)

    def generate_each(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion | GenerationError]:
        """Complete every prompt that fits; the others get their error in place of a completion."""
        generator = self._running()
        outcomes: list[Completion | GenerationError | None] = [
            prompt_error(prompt, params, self._limits)
            for prompt, params in zip(prompts, sampling, strict=True)
        ]
        fitting = [index for index, outcome in enumerate(outcomes) if outcome is None]
        completions = iter(
            generator.generate(
                [prompts[index] for index in fitting], [sampling[index] for index in fitting]
            )
        )
        return [next(completions) if outcome is None else outcome for outcome in outcomes]

    def update_weights(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        """Replace all weights; Ray resolves an object ref given as ``weights``."""
        self._running().update_weights(weights, policy_version)

    def join_transfer_group(self, init_info: dict[str, Any]) -> None:
        """Join the learner's NCCL group (``weight_transfer: nccl``)."""
        self._vllm().join_transfer_group(init_info)

    def receive_weights(self, update_info: dict[str, Any], policy_version: int) -> None:
        """Receive one sync over NCCL while the learner sends it."""
        self._vllm().receive_weights(update_info, policy_version)

    def version(self) -> int:
        """Version of the weights in use; -1 before the first update."""
        return self._running().policy_version

    def close(self) -> None:
        """Free the engine; the actor can be set up again."""
        if self._generator is not None:
            self._generator.close()
            self._generator = None

    def _running(self) -> Generator:
        if self._generator is None:
            raise ClusterError("a generator actor must be set up before it is used; call setup()")
        return self._generator

    def _vllm(self) -> VLLMGenerator:
        generator = self._running()
        if not isinstance(generator, VLLMGenerator):
            raise ClusterError(
                "weights arrive over NCCL only with runtime.generator.backend=vllm; this is "
                f"{type(generator).__name__}. Use weight_transfer=object_store."
            )
        return generator


GeneratorActor = ray.remote(GeneratorShell)
