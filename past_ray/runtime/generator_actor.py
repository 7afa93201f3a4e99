"""A generator as an asynchronous Ray actor.

Calls that wait for the engine do so in threads of the actor's own pool. The event loop only hands
them over, so hundreds of calls wait at once and ``ping`` answers whatever the engine is doing.
"""

import asyncio
import contextvars
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ray
from torch import Tensor

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.generator_checks import PromptLimits, prompt_error, vocab_size
from past_ray.engine.generators import build_generator
from past_ray.engine.vllm_generator import VLLMGenerator
from past_ray.errors import ClusterError, GenerationError
from past_ray.rl.adapter_weights import AdapterWeights
from past_ray.rl.generator_stats import GeneratorStats
from past_ray.rl.protocols import Generator
from past_ray.rl.types import Completion, SamplingParams

ResultT = TypeVar("ResultT")

MAX_WAITING_CALLS = 1024
"""Threads that may wait for the engine: more than the 1,000 calls that Ray lets run at once, so no
call, a weight sync least of all, ever queues behind generation for want of a thread."""


class GeneratorShell:
    """What runs inside the actor process."""

    def __init__(
        self, config: GeneratorConfig, model_folder: Path, *, lora_rank: int | None = None
    ) -> None:
        """Store the settings; ``setup`` starts the engine.

        Args:
            config: Engine and its limits.
            model_folder: Hugging Face folder.
            lora_rank: Largest rank that ``load_adapter`` will be given; None for no adapters.
        """
        self._config = config
        self._model_folder = model_folder
        self._lora_rank = lora_rank
        self._generator: Generator | None = None
        self._threads = ThreadPoolExecutor(MAX_WAITING_CALLS, thread_name_prefix="call")

    async def setup(self) -> None:
        """Start the engine on the weights of the model folder.

        Raises:
            ConfigError: If the backend is not installed or refuses the settings.
        """
        self._limits = PromptLimits(
            max_model_len=self._config.max_model_len, vocab_size=vocab_size(self._model_folder)
        )
        self._generator = await self._in_thread(
            lambda: build_generator(self._config, self._model_folder, lora_rank=self._lora_rank)
        )

    async def ping(self) -> GeneratorStats:
        """Answer at once, also during setup, generation and weight sync."""
        return GeneratorStats() if self._generator is None else self._generator.stats()

    async def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete every prompt, or raise for the first that does not fit."""
        generator = self._running()
        return await self._in_thread(lambda: generator.generate(prompts, sampling))

    async def generate_each(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion | GenerationError]:
        """Complete every prompt that fits; the others get their error in place of a completion."""
        self._running()
        outcomes: list[Completion | GenerationError | None] = [
            prompt_error(prompt, params, self._limits)
            for prompt, params in zip(prompts, sampling, strict=True)
        ]
        fitting = [index for index, outcome in enumerate(outcomes) if outcome is None]
        completions = iter(
            await self.generate(
                [prompts[index] for index in fitting], [sampling[index] for index in fitting]
            )
        )
        return [next(completions) if outcome is None else outcome for outcome in outcomes]

    async def probe(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams], policy_version: int
    ) -> list[Completion]:
        """Complete fixed prompts right after a sync, whose parts are checked on the way."""
        generator = self._running()
        return await self._in_thread(lambda: generator.probe(prompts, sampling, policy_version))

    async def update_weights(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        """Replace all weights; Ray resolves an object ref given as ``weights``."""
        generator = self._running()
        await self._in_thread(lambda: generator.update_weights(weights, policy_version))

    async def load_adapter(self, adapter: AdapterWeights, policy_version: int) -> None:
        """Put an adapter on the base weights; Ray resolves an object ref given as ``adapter``."""
        generator = self._running()
        await self._in_thread(lambda: generator.load_adapter(adapter, policy_version))

    async def join_transfer_group(self, init_info: dict[str, Any]) -> None:
        """Prepare for weights that come straight from the learner (``nccl``, ``ipc``)."""
        generator = self._vllm()
        await self._in_thread(lambda: generator.join_transfer_group(init_info))

    async def receive_weights(self, update_info: dict[str, Any], policy_version: int) -> None:
        """Receive one sync while the learner sends it (``nccl``, ``ipc``)."""
        generator = self._vllm()
        await self._in_thread(lambda: generator.receive_weights(update_info, policy_version))

    async def sleep(self) -> None:
        """Give the GPU's memory to a learner on the same GPU, once nothing is in flight."""
        await self._in_thread(self._running().sleep)

    async def wake_up(self) -> None:
        """Make room for weights again; they have to be synced before the next request."""
        await self._in_thread(self._running().wake_up)

    async def version(self) -> int:
        """Version of the weights in use; -1 before the first update."""
        return self._running().policy_version

    async def close(self) -> None:
        """Free the engine; the actor can be set up again."""
        if self._generator is not None:
            generator, self._generator = self._generator, None
            await self._in_thread(generator.close)

    async def _in_thread(self, call: Callable[[], ResultT]) -> ResultT:
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, context.run, call)

    def _running(self) -> Generator:
        if self._generator is None:
            raise ClusterError("a generator actor must be set up before it is used; call setup()")
        return self._generator

    def _vllm(self) -> VLLMGenerator:
        generator = self._running()
        if not isinstance(generator, VLLMGenerator):
            raise ClusterError(
                "weights come straight from a learner only with runtime.generator.backend=vllm; "
                f"this is {type(generator).__name__}. Use weight_transfer=object_store."
            )
        return generator


GeneratorActor = ray.remote(GeneratorShell)
