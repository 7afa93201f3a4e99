"""vLLM's engine as ``EngineLoop`` steps it, and how it is started.

vLLM is imported by ``start_engine``, never by importing this module.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.generator_checks import (
    check_version,
    check_weight_names,
    check_weight_shapes,
)
from past_ray.engine.vllm_adapters import AdapterStore, vllm_lora_rank
from past_ray.errors import ClusterError, ConfigError, ParityError
from past_ray.rl.adapter_weights import AdapterWeights
from past_ray.rl.types import Completion, FinishReason, SamplingParams

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

logger = logging.getLogger(__name__)

GIB = 1 << 30

FINISH_REASONS: Mapping[str | None, FinishReason] = {"stop": "stop", "length": "length"}
"""vLLM's other reasons (abort, error, repetition) are ``abort`` to us."""

CPU_BATCHED_TOKENS = 8192
"""Prompt tokens that a CPU engine prefills together."""

MAX_ADAPTERS = 2
"""Versions that are decoded together: the newest, and the one that is still in flight."""


class VLLMEngine:
    """What ``EngineLoop`` steps, and the commands that run in its thread."""

    def __init__(
        self, engine: "LLMEngine", stop_token_ids: Sequence[int], *, lora_rank: int | None
    ) -> None:
        """Take over a started engine.

        Args:
            engine: vLLM's.
            stop_token_ids: Ids that end a completion.
            lora_rank: Largest rank of an adapter; None for none.
        """
        self.policy_version = -1
        """Version of the weights that new requests get."""

        self.num_cached_prompt_tokens = 0
        """Prompt tokens served from the prefix cache so far."""

        self.is_probed = False
        """Whether the probe's prompts may be in the cache of the current version."""

        self._engine = engine
        self._stop_token_ids = list(stop_token_ids)
        self._adapters = AdapterStore(engine, max_rank=lora_rank)
        self._versions: dict[str, int] = {}
        self._sleep_level = 1 if lora_rank is not None else 2
        self._is_cache_asleep = False

    @property
    def cache_block_size(self) -> int:
        """Tokens of the shortest prefix that the cache keeps."""
        return int(self._engine.vllm_config.cache_config.block_size)

    def admit(
        self,
        request_id: str,
        prompt: list[int],
        sampling: SamplingParams,
        adapter: "LoRARequest | None" = None,
    ) -> None:
        """Take one request; without an ``adapter`` of its own it keeps the one in use now."""
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.sampling_params import SamplingParams as VLLMSamplingParams

        if self._is_cache_asleep:
            raise ClusterError("weights must be synced after wake_up before anything is sampled")
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
        self._versions[request_id] = self.policy_version
        self._engine.add_request(
            request_id,
            tokens_input(list(prompt)),
            params,
            lora_request=adapter or self._adapters.begin(request_id),
        )

    def take_out(self, request_id: str) -> Completion:
        """Drop a request in flight and return what it has sampled."""
        from vllm.v1.engine import FinishReason as VLLMFinishReason

        # vLLM hands an aborted request's tokens to its asynchronous front end only, from this
        # state; the engine itself has no call for them.
        processor: Any = self._engine.output_processor
        (internal_id,) = processor.external_req_ids[request_id]
        output: Any = processor.request_states[internal_id].make_request_output(
            new_token_ids=[],
            pooling_output=None,
            finish_reason=VLLMFinishReason.ABORT,
            stop_reason=None,
        )
        completion = _completion(output, self._versions[request_id])
        self.abort([request_id])
        return completion

    def abort(self, request_ids: list[str]) -> None:
        """Drop requests, including one that ``admit`` has just refused."""
        self._engine.abort_request(request_ids)
        for request_id in request_ids:
            self._versions.pop(request_id, None)
            self._adapters.end(request_id)

    def step(self) -> list[tuple[str, Completion]]:
        """Decode one token of every request; return those that ended."""
        ended: list[tuple[str, Completion]] = []
        outputs: list[Any] = self._engine.step()
        for output in outputs:
            if output.finished:
                self.num_cached_prompt_tokens += output.num_cached_tokens or 0
                version = self._versions.pop(output.request_id)
                ended.append((output.request_id, _completion(output, version)))
                self._adapters.end(output.request_id)
        return ended

    def shutdown(self) -> None:
        """Free everything."""
        self._adapters.close()
        self._engine.engine_core.shutdown()

    def join_transfer_group(self, init_info: dict[str, Any]) -> None:
        """Let vLLM's own transfer engine meet its sender."""
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

    def check_announced(self, update_info: dict[str, Any]) -> None:
        """Refuse weights by the names and shapes that their sender announces."""
        expected = self._engine.collective_rpc("past_ray_checkpoint_shapes")[0]
        check_weight_names(update_info["names"], expected)
        shapes = zip(update_info["names"], update_info["shapes"], strict=True)
        check_weight_shapes({name: tuple(shape) for name, shape in shapes}, expected)

    def sync(self, update_info: dict[str, Any], policy_version: int) -> None:
        """Run one update of vLLM's weight-transfer protocol on the idle engine."""
        begin = time.perf_counter()
        # vLLM forgets all adapters when the weights under them change.
        self._adapters.drop()
        self._engine.collective_rpc("start_weight_update")
        self._engine.collective_rpc("update_weights", kwargs={"update_info": update_info})
        self._engine.collective_rpc("finish_weight_update")
        if self._is_cache_asleep:
            # Only now, so that old and new weights and the cache never share the memory.
            self._engine.wake_up(["kv_cache"])
            self._is_cache_asleep = False
        self._start_version(policy_version)
        seconds = time.perf_counter() - begin
        logger.info("weights of version %d in use after %.3f s", policy_version, seconds)

    def load_adapter(self, adapter: AdapterWeights, policy_version: int) -> None:
        """Put an adapter on the base weights for all new requests."""
        if self._is_cache_asleep:
            self._engine.wake_up(["kv_cache"])
            self._is_cache_asleep = False
        self._adapters.load(adapter, policy_version)
        if self._versions:
            # Blocks in use cannot be dropped; those of older versions have another key.
            self.policy_version, self.is_probed = policy_version, False
        else:
            self._start_version(policy_version)

    def check_in_use(self, policy_version: int) -> None:
        """Check that the weights of a version are what this engine samples with.

        Raises:
            ParityError: Naming the part of the last sync that did not happen.
        """
        check_version(self.policy_version, policy_version)
        self._adapters.check_current()
        if missed := self._engine.collective_rpc("past_ray_missed_weights")[0]:
            raise ParityError(
                f"every tensor of policy version {policy_version} must be in use, {len(missed)} "
                f"kept other values: {', '.join(missed[:8])}. vLLM's loader does not reach them in "
                "this architecture; use runtime.generator.backend=transformers."
            )

    def sleep(self) -> None:
        """Free the GPU; weights without an adapter on them are dropped, the next sync brings all.

        Under an adapter the base weights move to the CPU instead, since no sync brings them.
        """
        self._adapters.drop()
        self._engine.sleep(level=self._sleep_level)

    def wake_up(self) -> None:
        """Take back memory for the weights; the sync that follows takes that of the cache."""
        self._engine.wake_up(["weights"])
        self._is_cache_asleep = True

    def _start_version(self, policy_version: int) -> None:
        # Blocks computed by the old weights would be reused for equal prefixes (vLLM issue 9744).
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache although no request was in flight")
        self._engine.set_weight_version(str(policy_version))
        self.policy_version, self.is_probed = policy_version, False


def start_engine(
    model_folder: Path,
    config: GeneratorConfig,
    *,
    lora_rank: int | None,
    max_loras: int = MAX_ADAPTERS,
) -> Any:  # noqa: ANN401 - LLMEngine
    """Start vLLM's engine in this process and return it.

    Args:
        model_folder: Hugging Face folder.
        config: Engine and its limits.
        lora_rank: Largest rank of an adapter; None for no adapters.
        max_loras: Adapters that are decoded together.

    Raises:
        ConfigError: If vLLM refuses the settings.
    """
    # All read by vLLM while it is imported or started.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    from past_ray.engine import weight_transfer

    weight_transfer.register()
    settings: dict[str, Any] = {
        "model": str(model_folder),
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": config.enforce_eager,
        "enable_sleep_mode": config.sleep_between_steps,
        **_device_settings(config, is_cpu=current_platform.is_cpu()),
        **_lora_settings(lora_rank, max_loras),
    }
    is_in_process = config.weight_transfer == "object_store"
    backend = weight_transfer.IN_PROCESS if is_in_process else config.weight_transfer
    extension = weight_transfer.WorkerExtension
    is_single = config.tensor_parallel_size == 1
    try:
        engine = LLMEngine.from_engine_args(
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
    if lora_rank is not None and current_platform.is_cpu():
        from past_ray.engine.vllm_cpu_lora import use_runs

        engine.collective_rpc(use_runs)
    return engine


def _device_settings(config: GeneratorConfig, *, is_cpu: bool) -> dict[str, Any]:
    import torch

    if not is_cpu:
        return {"gpu_memory_utilization": config.gpu_memory_frac}
    if config.enforce_eager:
        # vLLM compiles small sampling kernels even then, which costs the first call 10 s and more
        # of C++ compilation and is no faster on CPU.
        torch.compiler.set_stance("force_eager")
    return {
        "kv_cache_memory_bytes": int(config.kv_cache_gib * GIB),
        # vLLM rewinds a seeded request's random numbers after a partial prefill, which a CPU
        # generator cannot do: prompts are prefilled whole.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(config.max_model_len, CPU_BATCHED_TOKENS),
    }


def _lora_settings(lora_rank: int | None, max_loras: int) -> dict[str, Any]:
    if lora_rank is None:
        return {}
    max_rank = vllm_lora_rank(lora_rank)
    if max_rank is None:
        raise ConfigError(f"rl.lora.rank must be at most 512 for vLLM, found {lora_rank}")
    return {"enable_lora": True, "max_lora_rank": max_rank, "max_loras": max_loras}


def _completion(output: "RequestOutput", policy_version: int) -> Completion:
    sampled = output.outputs[0]
    # With logprobs=0 the flat list holds the sampled token's value and nothing else.
    flat: Any = sampled.logprobs
    return Completion(
        token_ids=list(sampled.token_ids),
        logprobs=list(flat.logprobs) if flat else [],
        finish_reason=FINISH_REASONS.get(sampled.finish_reason, "abort"),
        policy_version=policy_version,
        num_cached_tokens=output.num_cached_tokens or 0,
    )
