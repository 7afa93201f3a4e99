"""What each step is sampled from: its questions, their groups, and the steps ahead.

Which questions a step gets is a function of the run's seed and the step, so a run that continues
needs no further position than its step.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from past_ray.config.algorithm import DAPOConfig
from past_ray.config.rl import RLConfig
from past_ray.errors import ClusterError, DataError
from past_ray.rl.batching import is_constant_group
from past_ray.rl.staleness import split_by_staleness
from past_ray.rl.types import RolloutGroup, SamplingParams
from past_ray.runtime.rollout_worker import GroupTask, RolloutPlan
from past_ray.runtime.session import RLSession
from past_ray.sft.schedule import example_order
from past_ray.tasks.examples import QAExample

MAX_STALE_REPEATS = 3
"""Times that stale groups of a step are sampled anew; then a generator is out of step for good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledStep:
    """Groups of one step."""

    groups: list[RolloutGroup]
    """Those that train; failed rollouts included."""

    num_constant: int = 0
    """Groups that dynamic sampling dropped because their rewards did not differ."""


class StepSampler:
    """Samples whole steps, up to ``rl.max_staleness`` of them ahead of the learner."""

    def __init__(
        self,
        session: RLSession,
        rl: RLConfig,
        *,
        examples: Sequence[QAExample],
        seed: int,
    ) -> None:
        """Plan the order of questions.

        Raises:
            DataError: If one step wants more questions than there are.
        """
        if len(examples) < rl.prompts_per_step:
            raise DataError(
                f"rl.prompts_per_step must not exceed the questions, got {rl.prompts_per_step} "
                f"over {len(examples)} questions. Lower rl.prompts_per_step."
            )
        self._session = session
        self._rl = rl
        self._examples = examples
        self._seed = seed
        self._order = example_order(
            len(examples), num_steps=rl.num_steps, batch_size=rl.prompts_per_step, seed=seed
        )
        self._plan = RolloutPlan(
            group_size=rl.group_size,
            sampling=SamplingParams(temperature=rl.temperature, max_new_tokens=rl.max_new_tokens),
            seed=seed,
            max_turns=rl.max_turns,
            env_timeout_s=rl.reward_timeout_s,
        )
        self._ahead: dict[int, asyncio.Task[SampledStep]] = {}
        self.num_discarded = 0
        """Rollouts that were too old to train."""

    def start(self, step: int, *, finished: Sequence[RolloutGroup] | None = None) -> None:
        """Begin to sample a step, unless it was begun; with ``finished`` groups it is done."""
        if step not in self._ahead:
            work = _given(finished) if finished is not None else self._sample(step)
            self._ahead[step] = asyncio.create_task(work)

    async def ready(self, step: int) -> SampledStep:
        """Wait for the groups of a step that was started; they stay until ``drop``."""
        return await asyncio.shield(self._ahead[step])

    def drop(self, step: int) -> None:
        """Forget the groups of a step: it was trained."""
        del self._ahead[step]

    @property
    def finished_ahead(self) -> Mapping[int, list[RolloutGroup]]:
        """Groups of the steps that are sampled and not yet trained."""
        return {
            step: task.result().groups
            for step, task in self._ahead.items()
            if task.done() and not task.cancelled() and task.exception() is None
        }

    def cancel(self) -> None:
        """Give up everything that is being sampled."""
        for task in self._ahead.values():
            task.cancel()
        self._ahead = {}

    async def fresh(self, step: int, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """Sample those groups anew that are too old for the learner's version ``step``.

        Raises:
            ClusterError: If a generator keeps answering with old weights.
        """
        current = list(groups)
        num_repeats = 0
        while stale := self._stale(current, step):
            if num_repeats == MAX_STALE_REPEATS:
                raise _out_of_step(stale, step, self._rl.max_staleness)
            num_repeats += 1
            self.num_discarded += sum(len(group.rollouts) for group in stale)
            again = {group.question_id for group in stale}
            tasks = [self._task(step, i) for i in self._indices(again)]
            repeated = {g.question_id: g for g in await self._collect(tasks)}
            current = [repeated.get(group.question_id, group) for group in current]
        return current

    def _stale(self, groups: Sequence[RolloutGroup], step: int) -> list[RolloutGroup]:
        bound = self._rl.max_staleness
        return split_by_staleness(groups, learner_version=step, max_staleness=bound)[1]

    async def _sample(self, step: int) -> SampledStep:
        """Sample a step's questions; with dynamic sampling until enough groups have a spread."""
        rl = self._rl
        groups = await self._collect([self._task(step, i) for i in self._order[step]])
        if not isinstance(rl.algorithm, DAPOConfig) or rl.algorithm.max_draws == 1:
            return SampledStep(groups=groups)
        wanted = rl.prompts_per_step
        spares = self._spares(step)[: (rl.algorithm.max_draws - 1) * wanted]
        kept = [group for group in groups if not is_constant_group(group, rl=rl)]
        num_drawn = wanted
        while len(kept) < wanted and spares:
            drawn, spares = spares[: wanted - len(kept)], spares[wanted - len(kept) :]
            num_drawn += len(drawn)
            more = await self._collect([self._task(step, i) for i in drawn])
            kept += [group for group in more if not is_constant_group(group, rl=rl)]
        # Without a single spread the step says so in its metrics instead of being empty.
        return SampledStep(groups=kept or groups, num_constant=num_drawn - len(kept))

    async def _collect(self, tasks: Sequence[GroupTask]) -> list[RolloutGroup]:
        is_exact = self._rl.max_staleness == 0
        return await self._session.collect(tasks, self._plan, is_exact=is_exact)

    def _task(self, step: int, index: int) -> GroupTask:
        example = self._examples[index]
        return GroupTask(group_id=f"{step}/{example.question_id}", example=example)

    def _spares(self, step: int) -> list[int]:
        """Questions that are not in the step, in an order of the step's own."""
        used = set(self._order[step])
        spares = [index for index in range(len(self._examples)) if index not in used]
        random.Random(f"{self._seed}/{step}").shuffle(spares)
        return spares

    def _indices(self, question_ids: set[str]) -> list[int]:
        return [i for i, e in enumerate(self._examples) if e.question_id in question_ids]


async def _given(groups: Sequence[RolloutGroup]) -> SampledStep:
    return SampledStep(groups=list(groups))


def _out_of_step(stale: Sequence[RolloutGroup], step: int, max_staleness: int) -> ClusterError:
    versions = sorted({rollout.policy_version for group in stale for rollout in group.rollouts})
    return ClusterError(
        f"step {step} may train on rollouts of policy version {step - max_staleness} and later "
        f"(rl.max_staleness), found versions {versions} in {len(stale)} groups: a generator missed "
        "a weight sync."
    )
