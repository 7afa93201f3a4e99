"""Deals the groups of a step to rollout workers until every one is sampled.

::

    GroupLedger --take--> shares --collect--> RolloutWorker[n] --prompts--> GeneratorActor[k]
        ^                                        |
        +---- finish | requeue (lost) -----------+

Waits for: the slowest worker of a round, then for a worker and a generator that can be used.
Unblocked by: results, or the supervisor, which replaces what died.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from past_ray.errors import ActorLostError
from past_ray.rl.group_ledger import GroupLedger
from past_ray.rl.types import RolloutGroup
from past_ray.runtime.rollout_worker import GroupTask, RolloutPlan, Share
from past_ray.runtime.supervisor import SupervisedActor, ready_among

logger = logging.getLogger(__name__)


class RolloutPool:
    """All rollout workers and the generators they use."""

    def __init__(
        self,
        workers: Sequence[SupervisedActor],
        generators: Sequence[SupervisedActor],
        *,
        start_over: Callable[[], Awaitable[None]],
    ) -> None:
        """Keep the actors.

        Args:
            workers: Drive environments.
            generators: Sample completions.
            start_over: Brings the generators to the state in which a step began: nothing in
                flight, nothing cached, the same weights.
        """
        self._workers = workers
        self._generators = generators
        self._start_over = start_over
        self.num_requeued = 0
        """Groups that were sampled again because a process died."""

    async def collect(
        self, tasks: Sequence[GroupTask], plan: RolloutPlan, *, is_exact: bool
    ) -> list[RolloutGroup]:
        """Sample all groups; they come in the order of ``tasks``.

        Args:
            tasks: The groups, each with an id of its own.
            plan: What they have in common.
            is_exact: After a loss repeat all of them from the same state of the generators, so
                that the result is that of an undisturbed run, bit for bit: log-probabilities
                depend in their last digits on what is decoded together. Otherwise only those
                that are missing are repeated.

        Raises:
            ClusterError: If no worker or no generator comes back.
        """
        by_id = {task.group_id: task for task in tasks}
        ledger: GroupLedger[RolloutGroup] = GroupLedger([task.group_id for task in tasks])
        while not ledger.is_done:
            waiting = [by_id[group_id] for group_id in ledger.take()]
            if not await self._round(ledger, waiting, plan):
                if is_exact:
                    ledger.restart()
                    await self._start_over()
                logger.warning("sampling %d groups again", len(tasks) - len(ledger.finished))
        self.num_requeued += ledger.num_requeued
        return ledger.finished

    async def _round(
        self, ledger: GroupLedger[RolloutGroup], tasks: Sequence[GroupTask], plan: RolloutPlan
    ) -> bool:
        """Deal the tasks once; False when something was lost and has to be repeated."""
        generators = await ready_among(self._generators)
        workers = await ready_among(self._workers)
        handles = [generator.handle for generator in generators]
        shares = [list(tasks[i :: len(workers)]) for i in range(len(workers))]
        dealt = [(w, share) for w, share in zip(workers, shares, strict=True) if share]
        outcomes = await asyncio.gather(
            *(_ask(worker, share, handles, plan) for worker, share in dealt)
        )
        is_whole = True
        for (_, tasks_of_worker), share in zip(dealt, outcomes, strict=True):
            for group_id, group in share.groups.items():
                ledger.finish(group_id, group)
            missing = [t.group_id for t in tasks_of_worker if t.group_id not in share.groups]
            ledger.requeue(missing)
            for index in share.lost_generators:
                if generators[index].handle == handles[index]:
                    generators[index].report_lost()
            is_whole = is_whole and not missing
        return is_whole


async def _ask(
    worker: SupervisedActor,
    tasks: Sequence[GroupTask],
    generators: Sequence[object],
    plan: RolloutPlan,
) -> Share:
    """Give one worker its share; a worker that is lost finished nothing."""
    try:
        return await worker.result_of(lambda handle: handle.collect.remote(tasks, generators, plan))
    except ActorLostError:
        return Share(groups={}, lost_generators=[])
