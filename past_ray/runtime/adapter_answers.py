"""Answers to many requests, each from the base with its own adapter, by several engines.

::

    AdapterAnswers --share of the requests--> AdapterAnswersShell[k] around VLLMAdapterBank
         ^                                        |
         +---- one completion after the other ----+

All requests of an adapter go to one engine, which so loads it once. Waits for: the next completion
of any engine. Unblocked by: a completion, or the death of an actor, which ends the call.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import ray
from ray.exceptions import RayActorError, RayTaskError
from torch import Tensor

from past_ray.config.runtime import GeneratorConfig, RuntimeConfig
from past_ray.engine.shared_weights import SharedWeights
from past_ray.engine.vllm_adapter_bank import VLLMAdapterBank
from past_ray.errors import ClusterError, PastRayError
from past_ray.rl.types import Completion, SamplingParams
from past_ray.runtime.placement import process_environment

CLOSE_TIMEOUT_S = 30.0
"""An engine that has not ended by then is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRequest:
    """One prompt and whose weights answer it."""

    request_id: str
    """Given back with the completion."""

    prompt_ids: list[int]
    """Token ids."""

    adapter: Path | None
    """PEFT folder, on a disk that every node sees; None for the base alone."""


class AdapterAnswersShell:
    """What runs inside an actor process."""

    def __init__(
        self, model_folder: Path, config: GeneratorConfig, *, max_rank: int, max_loras: int
    ) -> None:
        """Store the settings, those of ``VLLMAdapterBank``; ``setup`` starts it.

        An error of a constructor would reach the caller as the death of the actor.
        """
        self._start = lambda: VLLMAdapterBank(
            model_folder, config, max_rank=max_rank, max_loras=max_loras
        )
        self._bank: VLLMAdapterBank

    def setup(self) -> None:
        """Start the engine on the weights of the model folder."""
        self._bank = self._start()

    def load_base(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace the base weights; Ray resolves an object ref given as ``weights``."""
        self._bank.update_base(weights, version)

    def answer(
        self,
        prompts: Sequence[list[int]],
        sampling: Sequence[SamplingParams],
        adapters: Sequence[Path | None],
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the index of each prompt with its completion, as they end."""
        yield from self._bank.stream(prompts, sampling, adapters)

    def close(self) -> None:
        """Free the engine."""
        self._bank.close()


AdapterAnswersActor = ray.remote(AdapterAnswersShell)


class AdapterAnswers:
    """Adapter banks in ``num_generators`` actors; a context manager that ends them."""

    def __init__(
        self, config: RuntimeConfig, model_folder: Path, *, max_rank: int, max_loras: int
    ) -> None:
        """Start the actors; returns when all engines are ready.

        Args:
            config: Number and share of the actors (``num_generators``, ``cpus_per_generator``),
                and the engine of each.
            model_folder: Hugging Face folder of the base.
            max_rank: Largest rank of an adapter.
            max_loras: Adapters that one engine decodes together.

        Raises:
            ConfigError: If vLLM is not installed or refuses these settings.
            ClusterError: If an actor is not ready within ``setup_timeout_s``.
        """
        self._config = config
        options = {
            "num_cpus": config.cpus_per_generator,
            "num_gpus": config.generator.tensor_parallel_size if config.use_gpu else 0,
            "runtime_env": {"env_vars": process_environment(config)},
        }
        self._actors: list[Any] = [
            AdapterAnswersActor.options(**options).remote(
                model_folder.resolve(), config.generator, max_rank=max_rank, max_loras=max_loras
            )
            for _ in range(config.num_generators)
        ]
        try:
            self._all([actor.setup.remote() for actor in self._actors], config.setup_timeout_s)
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all actors."""
        self.close()

    def load_base(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace the base weights of all engines, through one copy in Ray's object store.

        Raises:
            ClusterError: If the weights do not fit, or an actor died.
        """
        shared = ray.put(SharedWeights(weights))
        self._all(
            [actor.load_base.remote(shared, version) for actor in self._actors],
            self._config.sync_timeout_s,
        )

    def answer(
        self,
        requests: Sequence[AdapterRequest],
        sampling: Sequence[SamplingParams],
        on_done: Callable[[str, Completion], None],
    ) -> list[Completion]:
        """Complete all requests; they come in the order of ``requests``.

        Args:
            requests: What to complete; dealt to the engines by ``deal``.
            sampling: One per request.
            on_done: Told the id and the completion of each request, in this thread, as they end.

        Raises:
            GenerationError, StorageError, SkillVectorError: As for ``VLLMAdapterBank.stream``; an
                engine refuses its share, others may have answered some of theirs.
            ClusterError: Naming an actor that died.
        """
        if len(requests) != len(sampling):
            raise ClusterError(
                f"every request needs its sampling parameters; found {len(requests)} requests and "
                f"{len(sampling)} parameters."
            )
        shares = deal([request.adapter for request in requests], num_shares=len(self._actors))
        streams: dict[Any, int] = {
            self._actors[number].answer.remote(
                [requests[index].prompt_ids for index in share],
                [sampling[index] for index in share],
                [requests[index].adapter for index in share],
            ): number
            for number, share in enumerate(shares)
            if share
        }
        found: dict[int, Completion] = {}
        while streams:
            # Ray waits for streams too; its types know references only.
            (stream,), _ = cast("tuple[list[Any], Any]", ray.wait(list(streams)))
            number = streams[stream]
            try:
                reference = next(stream)
            except StopIteration:
                del streams[stream]
                continue
            place, completion = self._result(number, reference)
            index = shares[number][place]
            found[index] = completion
            on_done(requests[index].request_id, completion)
        return [found[index] for index in range(len(requests))]

    def close(self) -> None:
        """End all actors and their engines. Safe to call again."""
        closing = [actor.close.remote() for actor in self._actors]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        self._kill()

    def _kill(self) -> None:
        while self._actors:
            ray.kill(self._actors.pop())

    def _all(self, references: Sequence[Any], timeout_s: float) -> None:
        """Wait for one call per actor."""
        done, waiting = ray.wait(list(references), num_returns=len(references), timeout=timeout_s)
        for number, reference in enumerate(references):
            if reference in done:
                self._result(number, reference)
        if waiting:
            numbers = [references.index(reference) for reference in waiting]
            raise ClusterError(
                f"adapter answers actors must be done within {timeout_s:.0f} s, {numbers} of "
                f"{len(references)} are not. Free CPUs on the cluster, lower num_generators, or "
                "raise runtime.setup_timeout_s or runtime.sync_timeout_s."
            )

    def _result(self, number: int, reference: Any) -> Any:  # noqa: ANN401 - of any method
        try:
            return ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, PastRayError):
                raise error.cause from None
            raise ClusterError(
                f"adapter answers actor {number} must not fail, but it raised {error.cause!r}."
                " Please report it with this message."
            ) from error
        except RayActorError as error:
            raise ClusterError(
                f"adapter answers actor {number} of {len(self._actors)} must stay alive, but it"
                f" died: {error}. Open new adapter answers and ask for what is missing."
            ) from error


def deal(adapters: Sequence[Path | None], *, num_shares: int) -> list[list[int]]:
    """Return the indices of each share's requests: an adapter is never split, the base may be.

    Each adapter, in order, goes to the share with the fewest requests so far.

    Example: ``deal([a, b, a, b, None, None], num_shares=2) == [[0, 2, 4], [1, 3, 5]]``.

    Args:
        adapters: One per request.
        num_shares: At least 1.
    """
    groups: dict[Path | int, list[int]] = {}
    for index, adapter in enumerate(adapters):
        groups.setdefault(index if adapter is None else adapter, []).append(index)
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for group in groups.values():
        min(shares, key=len).extend(group)
    return shares
