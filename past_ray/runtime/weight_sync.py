"""Brings the learners' weights to every generator, and proves that they arrived.

::

    learner rank 0 --export--> one object-store ref --> GeneratorActor[k]   (object_store)
    learner rank 0 ------------- NCCL or CUDA IPC ----> GeneratorActor[k]   (nccl, ipc)

The newest ref stays here: a generator that was replaced gets it before it takes a request, so no
process ever samples with other weights than the current ones. With ``rl.lora`` the base weights
go once and each sync carries the adapter alone.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from past_ray.config.rl import RLConfig
from past_ray.config.runtime import RuntimeConfig
from past_ray.engine.shared_weights import SharedWeights
from past_ray.errors import ActorLostError, ClusterError, ParityError
from past_ray.rl.types import Completion, SamplingParams, TrainSample
from past_ray.runtime.supervisor import Handle, SupervisedActor, ready_among
from past_ray.skill.checkpoint import load_weights

PROBE_TOKENS = 8
"""Tokens that a generator samples to each prompt of the probe."""

CallLearners = Callable[[Callable[[Handle], Any]], Awaitable[list[Any]]]
"""Calls every learner and returns what they answer, by rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncResult:
    """What one weight sync cost and how exact it was."""

    seconds: float
    """From the learners' export to the last generator's new weights."""

    logprob_gap: float
    """Largest difference between generator and learner on the probe, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Current:
    """What every generator has to hold now."""

    version: int
    weights: Any
    """Object ref of a full state dict; None where weights do not pass the object store."""

    adapter: Any = None
    """Object ref of ``AdapterWeights`` on top of ``weights``."""


class WeightSync:
    """Owner of the current weights."""

    def __init__(
        self,
        config: RuntimeConfig,
        rl: RLConfig,
        *,
        generators: Sequence[SupervisedActor],
        call_learners: CallLearners,
    ) -> None:
        """Start without weights.

        Args:
            config: Transfer and timeout.
            rl: Temperature, adapter and tolerance.
            generators: Receivers.
            call_learners: How to ask the learners.
        """
        self._config = config
        self._rl = rl
        self._generators = generators
        self._call_learners = call_learners
        self._current: _Current | None = None
        self._base: Any = None
        self._have_base: set[Handle] = set()
        self._in_group: list[Handle] = []

    def forget_learners(self) -> None:
        """The learners were replaced: what only they could send again is gone."""
        self._in_group = []

    def set_adapter_base(self, checkpoint: Path) -> None:
        """Note the weights under the learners' adapter; the next sync brings them."""
        self._have_base = set()
        self._base = None if self._rl.lora is None else _put(load_weights(checkpoint))

    async def from_learners(self, version: int, *, probe: Sequence[list[int]]) -> SyncResult:
        """Give all generators the learners' weights and compare both on fixed prompts.

        Raises:
            ParityError: If the gap exceeds ``rl.parity_tolerance``.
            ClusterError: If all of it does not end within ``runtime.sync_timeout_s``.
        """
        limit = self._config.sync_timeout_s
        try:
            return await asyncio.wait_for(self._from_learners(version, probe), limit)
        except TimeoutError as error:
            raise ClusterError(
                f"a weight sync must end within {limit:.0f} s, version {version} did not. Raise "
                "runtime.sync_timeout_s or look into the generators' logs."
            ) from error

    async def _from_learners(self, version: int, probe: Sequence[list[int]]) -> SyncResult:
        started = time.perf_counter()
        if self._transfer != "object_store":
            self._current = _Current(version=version, weights=None)
            await self._send_directly(version, None)
        elif self._base is not None:
            adapters = await self._call_learners(lambda learner: learner.export_adapter.remote())
            self._current = _Current(
                version=version, weights=self._base, adapter=ray.put(adapters[0])
            )
            await self._give_all()
        else:
            ref = await self._export()
            self._current = _Current(version=version, weights=ref)
            await self._give_all()
        seconds = time.perf_counter() - started
        gap = await self._parity_gap(probe, version)
        if not gap <= self._rl.parity_tolerance:
            raise ParityError(
                f"generator and learner must agree within {self._rl.parity_tolerance:g} nats after "
                f"a weight sync, found {gap:g} at policy version {version}. Compare "
                "runtime.generator.dtype with rl.precision; in 16 bit raise rl.parity_tolerance."
            )
        return SyncResult(seconds=seconds, logprob_gap=gap)

    async def from_driver(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Give every generator weights that no learner holds, as evaluation does."""
        ref = _put(weights)
        self._have_base = set()
        self._current = _Current(version=version, weights=ref)
        if self._transfer == "object_store":
            await self._give_all()
        else:
            await self._send_directly(version, ref)

    async def give_again(self) -> None:
        """Bring all generators to the state right after a sync: same weights, nothing cached."""
        await self._give_all()

    async def give_current(self, handle: Handle) -> None:
        """Give a new process the current weights, also if they change meanwhile."""
        while (current := self._current) is not None:
            await self._give(handle, current)
            if current is self._current:
                return

    async def _export(self) -> Any:  # noqa: ANN401 - an object ref
        """Let rank 0 put its weights into the object store; the tensors never come here."""
        refs: list[Any] = []

        async def export(learner: Handle) -> None:
            refs.append(learner.export_weights.remote())
            # A dead learner must not look like a dead generator, which would wait for this ref.
            await asyncio.to_thread(ray.wait, refs[-1:], fetch_local=False)
            await learner.ping.remote()

        await self._call_learners(export)
        return refs[0]

    async def _give(self, handle: Handle, current: _Current) -> None:
        """Hand over full weights, or an adapter on top of a base that a process gets once."""
        if current.adapter is None:
            await handle.update_weights.remote(current.weights, current.version)
            return
        if handle not in self._have_base:
            await handle.update_weights.remote(current.weights, current.version)
            self._have_base.add(handle)
        await handle.load_adapter.remote(current.adapter, current.version)

    async def _give_all(self) -> None:
        current = self._current
        assert current is not None
        while True:
            ready = await ready_among(self._generators)
            outcomes = await asyncio.gather(
                *(actor.result_of(partial(self._give, current=current)) for actor in ready),
                return_exceptions=True,
            )
            for outcome in outcomes:
                if isinstance(outcome, BaseException) and not isinstance(outcome, ActorLostError):
                    raise outcome
            if not all(isinstance(outcome, ActorLostError) for outcome in outcomes):
                return

    async def _send_directly(self, version: int, weights: Any) -> None:  # noqa: ANN401
        """Send over NCCL or CUDA IPC; a group in which a process was replaced is opened anew."""
        ready = await ready_among(self._generators)
        handles = [actor.handle for actor in ready]
        size = self._config.generator.tensor_parallel_size
        if handles != self._in_group:
            await self._call_learners(
                lambda learner: learner.open_sender.remote(handles, size, self._transfer)
            )
            self._in_group = handles
        await self._call_learners(lambda learner: learner.send_weights.remote(version, weights))

    @property
    def _transfer(self) -> str:
        return self._config.generator.weight_transfer

    async def _parity_gap(self, probe: Sequence[list[int]], version: int) -> float:
        """Sample to the probe's prompts with every generator and score that with the learners.

        On the way each generator checks the parts of the sync: version, cache, weights, adapter.
        """
        ready = await ready_among(self._generators)
        sampling = [
            SamplingParams(
                temperature=self._rl.temperature, max_new_tokens=PROBE_TOKENS, seed=index
            )
            for index in range(len(probe))
        ]
        answers: list[Any] = await asyncio.gather(
            *(
                actor.result_of(lambda handle: handle.probe.remote(list(probe), sampling, version))
                for actor in ready
            ),
            return_exceptions=True,
        )
        samples: list[TrainSample] = []
        for answer in answers:
            if isinstance(answer, ActorLostError):
                continue  # Its successor gets the current weights and the next probe.
            if isinstance(answer, BaseException):
                raise answer
            samples += [
                _probe_sample(prompt, completion)
                for prompt, completion in zip(probe, answer, strict=True)
            ]
        return max(await self._call_learners(lambda learner: learner.logprob_gap.remote(samples)))


def _put(weights: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 - an object ref
    return ray.put(SharedWeights(weights))


def _probe_sample(prompt: list[int], completion: Completion) -> TrainSample:
    num_prompt, num_sampled = len(prompt), len(completion.token_ids)
    return TrainSample(
        token_ids=prompt + completion.token_ids,
        loss_mask=[False] * num_prompt + [True] * num_sampled,
        generator_logprobs=[0.0] * num_prompt + completion.logprobs,
        advantages=[0.0] * (num_prompt + num_sampled),
    )
