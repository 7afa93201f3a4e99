"""The RL actors of one run and the verbs the controller has for them.

::

    RLSession (driver; owns every handle, resolves every ref)
       |  collect(tasks)               |  train_step(samples)
       v                               v
    RolloutWorker[n] --prompt ids--> GeneratorActor[k]      LearnerActor[r]  (FSDP rank)
     (drives Env)     <--Completion--   ^                      |
                                        +------ weights -------+   WeightSync

    who             when it is lost                            who notices
    RolloutWorker   replaced; its groups are sampled again     supervisor, RolloutPool
    GeneratorActor  replaced, gets the current weights         supervisor, RolloutPool, WeightSync
    LearnerActor    LearnersLostError: the controller goes     LearnerGroup
                    back to the last checkpoint

A session is opened once and serves several runs: learners load other checkpoints, generators get
other weights. Everything it created ends with it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from ray.util.placement_group import remove_placement_group
from torch import Tensor

from past_ray.config.rl import RLConfig
from past_ray.config.runtime import RuntimeConfig
from past_ray.errors import ClusterError
from past_ray.rl.batching import split_over_ranks
from past_ray.rl.objective import count_totals
from past_ray.rl.types import RolloutGroup, TrainSample
from past_ray.runtime.generator_actor import GeneratorActor
from past_ray.runtime.learner_actor import LearnerActor
from past_ray.runtime.learner_group import LEARNER_CONCURRENCY, LearnerGroup
from past_ray.runtime.placement import RLPlacement, place
from past_ray.runtime.rollout_pool import RolloutPool
from past_ray.runtime.rollout_worker import GroupTask, MakeEnv, RolloutPlan, RolloutWorkerActor
from past_ray.runtime.supervisor import Handle, RestartPolicy, SupervisedActor
from past_ray.runtime.weight_sync import SyncResult, WeightSync


class RLSession:
    """Generators, learners and rollout workers, placed together and ended together."""

    def __init__(
        self, config: RuntimeConfig, rl: RLConfig, *, model_folder: Path, make_env: MakeEnv
    ) -> None:
        """Store the settings; ``open`` starts the actors.

        Args:
            config: Processes and placement.
            rl: Settings of the learners.
            model_folder: Hugging Face folder that gives architecture and tokenizer.
            make_env: Makes the environment of one rollout; pickled to the workers.
        """
        self._config = config
        self._rl = rl
        self._model_folder = model_folder.resolve()
        self._make_env = make_env
        self._placement: RLPlacement | None = None
        self.generators: list[SupervisedActor] = []
        self.workers: list[SupervisedActor] = []
        self._learners: LearnerGroup
        self._pool: RolloutPool
        self._sync: WeightSync

    async def open(self) -> None:
        """Place all actors, start them and wait until every one is ready.

        Raises:
            ClusterError: If they are not placed or not ready in time.
        """
        config = self._config
        policy = restart_policy(config)
        placement = await asyncio.to_thread(place, config)
        self._placement = placement
        self.generators = [
            SupervisedActor(
                f"generator {index}",
                create=lambda index=index: GeneratorActor.options(
                    **placement.generator_options(index)
                ).remote(config.generator, self._model_folder, lora_rank=self._lora_rank),
                prepare=self._prepare_generator,
                policy=policy,
            )
            for index in range(config.num_generators)
        ]
        self.workers = [
            SupervisedActor(
                f"rollout worker {index}",
                create=lambda index=index: RolloutWorkerActor.options(
                    **placement.worker_options(index)
                ).remote(self._model_folder, self._make_env),
                prepare=self._set_up,
                policy=policy,
            )
            for index in range(config.num_rollout_workers)
        ]
        self._learners = LearnerGroup(
            lambda rank: LearnerActor.options(
                max_concurrency=LEARNER_CONCURRENCY, **placement.learner_options(rank)
            ).remote(self._rl, rank=rank, world_size=config.num_learners),
            num_learners=config.num_learners,
            backend="nccl" if config.use_gpu else "gloo",
            setup_timeout_s=config.setup_timeout_s,
            policy=policy,
        )
        self._sync = WeightSync(
            config, self._rl, generators=self.generators, call_learners=self._learners.call
        )
        self._pool = RolloutPool(self.workers, self.generators, start_over=self._sync.give_again)
        await self._start()

    async def _start(self) -> None:
        actors = [*self.generators, *self.workers]
        try:
            await asyncio.wait_for(
                asyncio.gather(self._learners.start(), *(actor.start() for actor in actors)),
                self._config.setup_timeout_s,
            )
        except TimeoutError as error:
            raise ClusterError(
                f"all actors must be ready within {self._config.setup_timeout_s:.0f} s. Raise "
                "runtime.setup_timeout_s or look into the actors' logs."
            ) from error

    async def _prepare_generator(self, handle: Handle) -> None:
        await self._set_up(handle)
        await self._sync.give_current(handle)

    async def _set_up(self, handle: Handle) -> None:
        await asyncio.wait_for(handle.setup.remote(), self._config.setup_timeout_s)

    def close(self) -> None:
        """End every actor and give its resources back."""
        for actor in [*self.workers, *self.generators]:
            actor.close()
        if self._placement is not None:
            self._learners.close()
            remove_placement_group(self._placement.group)
        self.generators, self.workers, self._placement = [], [], None

    async def collect(
        self, tasks: Sequence[GroupTask], plan: RolloutPlan, *, is_exact: bool = True
    ) -> list[RolloutGroup]:
        """Sample every group; they come in the order of ``tasks``. See ``RolloutPool.collect``."""
        return await self._pool.collect(tasks, plan, is_exact=is_exact)

    async def load_learners(
        self, checkpoint: Path, *, reference: Path | None, resume_from: Path | None
    ) -> int:
        """Give the learners a checkpoint, or the state they saved; return its policy version."""
        versions = await self._learners.call(
            lambda learner: learner.load.remote(
                checkpoint, reference=reference, resume_from=resume_from
            )
        )
        self._sync.set_adapter_base(checkpoint)
        return versions[0]

    async def restart_learners(self) -> None:
        """Replace all learners; ``load_learners`` has to follow.

        Raises:
            ClusterError: If that happened too often.
        """
        self._sync.forget_learners()
        await self._learners.restart()

    async def train_step(self, samples: Sequence[TrainSample]) -> dict[str, float]:
        """One optimizer step over all learners; returns metrics merged over ranks.

        Raises:
            LearnersLostError: If a learner was lost.
        """
        if self._config.generator.sleep_between_steps:
            await self._all_generators("sleep")
        totals = count_totals(samples, rollout_token_limit=self._rl.max_new_tokens)
        shares = iter(split_over_ranks(samples, self._config.num_learners))
        metrics = await self._learners.call(
            lambda learner: learner.train_step.remote(next(shares), totals=totals)
        )
        return metrics[0]

    async def save_learners(self, folder: Path, *, extra_files: Mapping[str, bytes]) -> None:
        """Write what ``load_learners(resume_from=folder)`` needs, and files of the caller.

        Raises:
            LearnersLostError: If a learner was lost.
            StorageError: If the disk is full.
        """
        await self._learners.call(
            lambda learner: learner.save.remote(folder, extra_files=extra_files)
        )

    async def sync_weights(self, policy_version: int, *, probe: Sequence[list[int]]) -> SyncResult:
        """Give all generators the learners' weights and compare both on fixed prompts.

        Args:
            policy_version: Version of the learners' weights.
            probe: Fixed prompts, as token ids.

        Raises:
            ParityError: If the gap exceeds ``rl.parity_tolerance``.
            ClusterError: If the sync does not end within ``runtime.sync_timeout_s``.
        """
        if self._config.generator.sleep_between_steps:
            await self._all_generators("wake_up")
        return await self._sync.from_learners(policy_version, probe=probe)

    async def load_generators(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        """Give every generator weights that no learner holds, as evaluation does."""
        await self._sync.from_driver(weights, policy_version)

    async def generator_busy_s(self) -> float:
        """Return the seconds that an engine had something to decode so far, mean over engines."""
        stats = await asyncio.gather(
            *(
                actor.result_of(lambda handle: handle.ping.remote())
                for actor in self.generators
                if actor.is_ready
            ),
            return_exceptions=True,
        )
        busy = [answer.busy_s for answer in stats if not isinstance(answer, BaseException)]
        return sum(busy) / max(1, len(self.generators))

    @property
    def num_requeued(self) -> int:
        """Groups that were sampled again because a process was lost."""
        return self._pool.num_requeued

    @property
    def num_restarts(self) -> int:
        """Processes that were replaced."""
        actors = [*self.generators, *self.workers]
        return sum(actor.num_restarts for actor in actors) + self._learners.num_restarts

    @property
    def _lora_rank(self) -> int | None:
        return None if self._rl.lora is None else self._rl.lora.rank

    async def _all_generators(self, method: str) -> None:
        calls = (a.result_of(lambda h: getattr(h, method).remote()) for a in self.generators)
        await asyncio.gather(*calls)


def restart_policy(config: RuntimeConfig) -> RestartPolicy:
    """Heartbeats and restarts as configured."""
    return RestartPolicy(
        heartbeat_interval_s=config.heartbeat_interval_s,
        heartbeat_timeout_s=config.heartbeat_timeout_s,
        backoff_s=config.restart_backoff_s,
        max_backoff_s=config.max_restart_backoff_s,
        max_restarts=config.max_restarts,
    )
