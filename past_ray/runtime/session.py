"""The RL actors of one run and the verbs the controller has for them.

::

    RLSession (driver; owns every handle, resolves every ref)
       |  collect(examples)            |  train_step(samples)
       v                               v
    RolloutWorker[n] --prompt ids--> GeneratorActor[k]      LearnerActor[r]  (FSDP rank)
     (drives Env)     <--Completion--   ^                      |
                                        +------ weights -------+   one object-store ref for all

A session is opened once and serves several runs: learners load other checkpoints, generators get
other weights. Everything it created ends with it.
"""

import asyncio
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group
from torch import Tensor

from past_ray.config.rl import RLConfig
from past_ray.config.runtime import RuntimeConfig
from past_ray.errors import ClusterError, ParityError
from past_ray.rl.batching import count_loss_tokens, split_over_ranks
from past_ray.rl.types import Completion, RolloutGroup, SamplingParams, TrainSample
from past_ray.runtime.generator_actor import GeneratorActor
from past_ray.runtime.learner_actor import LearnerActor
from past_ray.runtime.placement import actor_options, place
from past_ray.runtime.rollout_worker import RolloutWorkerActor
from past_ray.tasks.examples import QAExample

Handle = Any
"""An actor handle; Ray types it as Any."""

WeightsRef = Any
"""An object ref of a state dict, on its way from the learners to the generators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncResult:
    """What one weight sync cost and how exact it was."""

    seconds: float
    """From the learners' export to the last generator's new weights."""

    logprob_gap: float
    """Largest difference between generator and learner on the probe, in nats."""


class RLSession:
    """Generators, learners and rollout workers, placed together and ended together."""

    def __init__(
        self, config: RuntimeConfig, rl: RLConfig, *, model_folder: Path, reward: str
    ) -> None:
        """Store the settings; ``open`` starts the actors.

        Args:
            config: Processes and placement.
            rl: Settings of the learners.
            model_folder: Hugging Face folder that gives architecture and tokenizer.
            reward: Name of the grader in ``tasks.grading.GRADERS``.
        """
        self._config = config
        self._rl = rl
        self._model_folder = model_folder.resolve()
        self._reward = reward
        self._group: Any = None
        self.generators: list[Handle] = []
        self.learners: list[Handle] = []
        self.workers: list[Handle] = []

    async def open(self) -> None:
        """Place all actors, start them and wait until every one is ready.

        Raises:
            ClusterError: If they are not placed or not ready in time.
        """
        config = self._config
        self._group = await asyncio.to_thread(place, config)
        indices = itertools.count()

        def options() -> dict[str, Any]:
            return actor_options(config, self._group, next(indices))

        self.generators = [
            GeneratorActor.options(max_concurrency=16, **options()).remote(
                config.generator, self._model_folder
            )
            for _ in range(config.num_generators)
        ]
        self.learners = [
            LearnerActor.options(**options()).remote(
                self._rl, rank=rank, world_size=config.num_learners
            )
            for rank in range(config.num_learners)
        ]
        self.workers = [
            RolloutWorkerActor.options(**options()).remote(
                self._model_folder, self.generators, reward=self._reward
            )
            for _ in range(config.num_rollout_workers)
        ]
        await self._set_up()

    async def _set_up(self) -> None:
        address = await self.learners[0].rendezvous_address.remote()
        backend = "nccl" if self._config.use_gpu else "gloo"
        refs = [actor.setup.remote() for actor in self.generators + self.workers]
        refs += [learner.setup.remote(address, backend) for learner in self.learners]
        try:
            await asyncio.wait_for(asyncio.gather(*refs), self._config.setup_timeout_s)
        except TimeoutError as error:
            raise ClusterError(
                f"all actors must be ready within {self._config.setup_timeout_s:.0f} s. Raise "
                "runtime.setup_timeout_s or look into the actors' logs."
            ) from error
        if self._is_nccl:
            size = self._config.generator.tensor_parallel_size
            await self._in_time([self.learners[0].open_nccl_sender.remote(self.generators, size)])

    def close(self) -> None:
        """End every actor and give its resources back."""
        for actor in self.workers + self.learners + self.generators:
            with suppress(Exception):
                ray.kill(actor)
        if self._group is not None:
            with suppress(Exception):
                remove_placement_group(self._group)
        self.generators, self.learners, self.workers, self._group = [], [], [], None

    async def collect(
        self,
        examples: Sequence[QAExample],
        *,
        group_size: int,
        sampling: SamplingParams,
        step: int,
        seed: int,
    ) -> list[RolloutGroup]:
        """Roll every example out ``group_size`` times; groups come in the order of ``examples``."""
        num_workers = len(self.workers)
        shares = [list(examples[i::num_workers]) for i in range(num_workers)]
        collected = await asyncio.gather(
            *(
                worker.collect.remote(
                    share, group_size=group_size, sampling=sampling, step=step, seed=seed
                )
                for worker, share in zip(self.workers, shares, strict=True)
            )
        )
        by_id = {group.question_id: group for groups in collected for group in groups}
        return [by_id[example.question_id] for example in examples]

    async def load_learners(
        self, checkpoint: Path, *, reference: Path | None, resume_from: Path | None
    ) -> int:
        """Give the learners a checkpoint, or the state they saved; return its policy version."""
        versions = await asyncio.gather(
            *(
                learner.load.remote(checkpoint, reference=reference, resume_from=resume_from)
                for learner in self.learners
            )
        )
        return versions[0]

    async def train_step(self, samples: Sequence[TrainSample]) -> dict[str, float]:
        """One optimizer step over all learners; returns metrics merged over ranks."""
        num_loss_tokens = count_loss_tokens(samples)
        shares = split_over_ranks(samples, len(self.learners))
        metrics = await asyncio.gather(
            *(
                learner.train_step.remote(share, num_loss_tokens=num_loss_tokens)
                for learner, share in zip(self.learners, shares, strict=True)
            )
        )
        return metrics[0]

    async def save_learners(self, folder: Path) -> None:
        """Write what ``load_learners(resume_from=folder)`` needs."""
        await asyncio.gather(*(learner.save.remote(folder) for learner in self.learners))

    async def sync_weights(self, policy_version: int, *, probe: Sequence[list[int]]) -> SyncResult:
        """Give every generator the learners' weights and check that both sides agree.

        Args:
            policy_version: Version of the learners' weights.
            probe: Fixed prompts, as token ids.

        Raises:
            ParityError: If the gap exceeds ``rl.parity_tolerance``.
            ClusterError: If the sync does not end within ``runtime.sync_timeout_s``.
        """
        started = time.perf_counter()
        if self._is_nccl:
            await self._in_time(
                learner.send_weights.remote(policy_version, None) for learner in self.learners
            )
        else:
            refs = [learner.export_weights.remote() for learner in self.learners]
            await self._update_generators(refs[0], policy_version)
            await asyncio.gather(*refs[1:])
        seconds = time.perf_counter() - started
        gap = await self._parity_gap(probe)
        if not gap <= self._rl.parity_tolerance:
            raise ParityError(
                f"generator and learner must agree within {self._rl.parity_tolerance:g} nats after "
                f"a weight sync, found {gap:g} at policy version {policy_version}. Compare "
                "runtime.generator.dtype with rl.precision; in 16 bit raise rl.parity_tolerance."
            )
        return SyncResult(seconds=seconds, logprob_gap=gap)

    async def load_generators(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        """Give every generator weights that no learner holds, as evaluation does."""
        await self._update_generators(ray.put(dict(weights)), policy_version)

    async def _update_generators(self, weights: WeightsRef, policy_version: int) -> None:
        if self._is_nccl:
            await self._in_time([self.learners[0].send_weights.remote(policy_version, weights)])
            return
        await self._in_time(
            actor.update_weights.remote(weights, policy_version) for actor in self.generators
        )

    async def _in_time(self, calls: Iterable[Any]) -> None:
        """Wait for all calls of a weight sync, no longer than its timeout."""
        try:
            await asyncio.wait_for(asyncio.gather(*calls), self._config.sync_timeout_s)
        except TimeoutError as error:
            raise ClusterError(
                f"a weight sync must end within {self._config.sync_timeout_s:.0f} s. Raise "
                "runtime.sync_timeout_s or look into the generators' logs."
            ) from error

    @property
    def _is_nccl(self) -> bool:
        return self._config.generator.weight_transfer == "nccl"

    async def _parity_gap(self, probe: Sequence[list[int]]) -> float:
        sampling = [
            SamplingParams(temperature=self._rl.temperature, max_new_tokens=8, seed=index)
            for index in range(len(probe))
        ]
        answers: list[list[Completion]] = await asyncio.gather(
            *(actor.generate.remote(list(probe), sampling) for actor in self.generators)
        )
        samples = [
            TrainSample(
                token_ids=prompt + completion.token_ids,
                loss_mask=[False] * len(prompt) + [True] * len(completion.token_ids),
                generator_logprobs=[0.0] * len(prompt) + completion.logprobs,
                advantages=[0.0] * (len(prompt) + len(completion.token_ids)),
            )
            for completions in answers
            for prompt, completion in zip(probe, completions, strict=True)
        ]
        gaps = await asyncio.gather(
            *(learner.logprob_gap.remote(samples) for learner in self.learners)
        )
        return max(gaps)
