"""Hundreds of LoRA adapters through one vLLM engine, each on the same base weights.

::

    waiting   A A A | B B | C | D D D D ...     one group of requests per adapter
    open      max_loras groups, and beside them that of the base alone
    done      a group whose last request ended; the next waiting one is loaded in its place

The base is ``theta_base + scale * v`` and an adapter adds ``scaling * B @ A`` of one passage, so a
request is answered by the sum of the two, and one engine serves every passage.

vLLM keys its prefix cache by an adapter's name. A name holds the folder, a digest of its files and
the version of the base, so nothing is reused across any of them. vLLM keeps ``max_loras`` adapters
and forgets the one that was used least recently.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from past_ray.config.runtime import GeneratorConfig
from past_ray.engine.generator_checks import (
    PromptLimits,
    check_prompts,
    eos_token_ids,
    vocab_size,
)
from past_ray.engine.vllm_adapters import vllm_lora_rank
from past_ray.engine.vllm_engine import VLLMEngine, start_engine
from past_ray.engine.vllm_generator import require_vllm
from past_ray.errors import (
    ClusterError,
    ConfigError,
    GenerationError,
    PastRayError,
    SkillVectorError,
)
from past_ray.locations import open_folder
from past_ray.rl.types import Completion, SamplingParams
from past_ray.skill.adapter import NUM_NAMES_SHOWN, Adapter
from past_ray.skill.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, read_adapter

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

ResultT = TypeVar("ResultT")


class VLLMAdapterBank:
    """Samples every request with its own adapter; used by one thread only."""

    def __init__(
        self, model_folder: Path, config: GeneratorConfig, *, max_rank: int, max_loras: int
    ) -> None:
        """Start the engine on the weights of ``model_folder``; returns when it is ready.

        Args:
            model_folder: Hugging Face folder.
            config: Engine and its limits; weights are handed over in this process.
            max_rank: Largest rank of an adapter.
            max_loras: Adapters that are decoded together; all of them are held in memory.

        Raises:
            ConfigError: If vLLM is not installed or refuses these settings.
        """
        require_vllm()
        _check_settings(config, max_rank=max_rank, max_loras=max_loras)
        self._limits = PromptLimits(
            max_model_len=config.max_model_len, vocab_size=vocab_size(model_folder)
        )
        self._max_rank = max_rank
        self._max_loras = max_loras
        self._vllm: LLMEngine = start_engine(
            model_folder, config, lora_rank=max_rank, max_loras=max_loras
        )
        # The bank names the adapter of each request itself: the engine has none "in use".
        self._engine = VLLMEngine(self._vllm, eos_token_ids(model_folder), lora_rank=None)
        self._shapes: dict[str, tuple[int, ...]] = self._vllm.collective_rpc(
            "past_ray_checkpoint_shapes"
        )[0]
        self._named: dict[str, LoRARequest] = {}
        self._num_named = 0
        # Index of its prompt in the call, and its adapter, by the id of a request.
        self._in_flight: dict[str, tuple[int, LoRARequest | None]] = {}
        self._num_admitted = 0
        self._failure: Exception | None = None

    @property
    def base_version(self) -> int:
        """Version of the base weights in use; -1 for those of the model folder."""
        return self._engine.policy_version

    def update_base(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace all base weights; every adapter and cached prefix is forgotten.

        Raises:
            ClusterError: If a parameter is missing, unknown or of another shape (the old weights
                stay in use), or if loading failed (the bank refuses everything from then on).
            ParityError: If a tensor did not reach the model.
        """
        self._require_idle()
        self._call(self._forget_adapters)
        self._call(lambda: self._engine.sync({"weights": weights}, version))
        self._call(lambda: self._engine.check_in_use(version))

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sequence[SamplingParams],
        adapters: Sequence[Path | None],
    ) -> list[Completion]:
        """Complete every prompt with its adapter; see ``stream``."""
        completions = dict(self.stream(prompts, sampling, adapters))
        return [completions[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[list[int]],
        sampling: Sequence[SamplingParams],
        adapters: Sequence[Path | None],
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the index of each prompt with its completion, as they end.

        Args:
            prompts: Token ids.
            sampling: One per prompt.
            adapters: PEFT folder of each prompt, None for the base alone; the folders must not
                change until all are done.

        Raises:
            GenerationError: If a prompt does not fit; nothing is sampled then.
            StorageError: If an adapter's folder is missing or a file of it cut off; as above.
            SkillVectorError: If an adapter does not fit this base or ``max_rank``; as above. Also
                if vLLM refuses one: what has been yielded by then is good.
            ClusterError: If the engine has failed, or another call is not done.
        """
        self._require_idle()
        check_prompts(prompts, sampling, self._limits)
        if len(adapters) != len(prompts):
            raise GenerationError(
                f"every prompt needs its adapter or None; found {len(prompts)} prompts and "
                f"{len(adapters)} adapters"
            )
        named = {folder: self._name(folder) for folder in dict.fromkeys(adapters) if folder}
        groups: dict[Path | None, list[int]] = {}
        for index, folder in enumerate(adapters):
            groups.setdefault(folder, []).append(index)
        waiting = deque((named[f] if f else None, groups[f]) for f in groups)
        return self._run(waiting, prompts, sampling)

    def close(self) -> None:
        """Free the engine."""
        self._engine.shutdown()

    def _run(
        self,
        waiting: "deque[tuple[LoRARequest | None, list[int]]]",
        prompts: Sequence[list[int]],
        sampling: Sequence[SamplingParams],
    ) -> Iterator[tuple[int, Completion]]:
        self._require_idle()
        try:
            while waiting or self._in_flight:
                while waiting and self._has_room():
                    adapter, indices = waiting.popleft()
                    if adapter is not None:
                        self._load(adapter)
                    for index in indices:
                        request_id = str(self._num_admitted)
                        self._num_admitted += 1
                        self._in_flight[request_id] = index, adapter
                        self._engine.admit(request_id, prompts[index], sampling[index], adapter)
                for request_id, completion in self._call(self._engine.step):
                    index, _ = self._in_flight.pop(request_id)
                    yield index, completion
        finally:
            self._engine.abort(list(self._in_flight))
            self._in_flight.clear()

    def _has_room(self) -> bool:
        """Whether one more adapter may join the requests in flight."""
        names = {adapter.lora_name for _, adapter in self._in_flight.values() if adapter}
        return len(names) < self._max_loras

    def _name(self, folder: Path) -> "LoRARequest":
        """Check an adapter and return the request that vLLM knows it by."""
        from vllm.lora.request import LoRARequest

        path = folder.resolve()
        adapter = read_adapter(open_folder(path))
        check_adapter(adapter, path, max_rank=self._max_rank, shapes=self._shapes)
        name = f"{path}-{_digest(path)}-base-v{self.base_version}"
        if name not in self._named:
            self._num_named += 1
            self._named[name] = LoRARequest(name, self._num_named, str(path))
        return self._named[name]

    def _load(self, adapter: "LoRARequest") -> None:
        """Bring an adapter into the engine before any request that names it.

        vLLM would load it by itself, but within a step, where an error ends all requests.
        """
        try:
            self._vllm.add_lora(adapter)
        except Exception as error:
            raise SkillVectorError(
                f"vLLM must be able to serve the adapter in {adapter.lora_path}, it refused:"
                f" {error}. Merge it into its base model, or train other target modules."
            ) from error

    def _forget_adapters(self) -> None:
        for adapter_id in self._vllm.list_loras():
            self._vllm.remove_lora(adapter_id)
        self._named.clear()

    def _call(self, work: Callable[[], ResultT]) -> ResultT:
        """Use the engine; after an error that is not ours its state is unknown."""
        try:
            return work()
        except PastRayError:
            raise
        except Exception as error:
            self._failure = error
            raise ClusterError(f"the engine failed: {error!r}. Start a new bank.") from error

    def _require_idle(self) -> None:
        if self._failure is not None:
            raise ClusterError(
                f"the engine must be working; it failed before: {self._failure!r}. Start a new one."
            )
        if self._in_flight:
            raise ClusterError(
                f"a bank serves one call at a time; {len(self._in_flight)} requests of another are "
                "in flight. Take all of its completions first."
            )


def check_adapter(
    adapter: Adapter, folder: Path, *, max_rank: int, shapes: Mapping[str, Sequence[int]]
) -> None:
    """Refuse an adapter that an engine could not serve, or would serve as something else.

    vLLM ignores the factors of a layer that its model does not have.

    Args:
        adapter: As read from ``folder``.
        folder: For the message.
        max_rank: Largest rank that the engine was started for.
        shapes: Shape of every weight of the base, by Hugging Face name.

    Raises:
        SkillVectorError: Naming what does not fit.
    """
    rank = max(module.rank for module in adapter.modules.values())
    if rank > max_rank:
        raise SkillVectorError(
            f"an adapter must have at most the rank that the engine was started for, {max_rank};"
            f" {folder} has {rank}. Raise max_rank, or train a smaller adapter."
        )
    misfits = [
        f"{name} {module.shape}, the base has {tuple(shapes[name]) if name in shapes else 'none'}"
        for name, module in adapter.modules.items()
        if name not in shapes or tuple(shapes[name]) != module.shape
    ]
    if misfits:
        raise SkillVectorError(
            f"an adapter must only change weights of its base; {folder} has {len(misfits)} that"
            f" do not fit (first: {'; '.join(misfits[:NUM_NAMES_SHOWN])}). Use adapters that were"
            " trained on this architecture."
        )


def _check_settings(config: GeneratorConfig, *, max_rank: int, max_loras: int) -> None:
    if max_loras < 1 or max_rank < 1 or vllm_lora_rank(max_rank) is None:
        raise ConfigError(
            "an adapter bank needs max_loras of at least 1 and max_rank of 1 to 512 (vLLM's"
            f" largest), found {max_loras} and {max_rank}."
        )
    if config.backend != "vllm" or config.weight_transfer != "object_store":
        raise ConfigError(
            "an adapter bank needs runtime.generator.backend=vllm and weight_transfer="
            f"object_store, found {config.backend} and {config.weight_transfer}."
        )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
