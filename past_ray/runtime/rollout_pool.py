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
from dataclasses import dataclass, replace

from past_ray.errors import ActorLostError
from past_ray.rl.group_ledger import GroupLedger
from past_ray.rl.types import RolloutGroup
from past_ray.runtime.rollout_worker import GroupTask, RolloutPlan, Share
from past_ray.runtime.supervisor import Handle, SupervisedActor, ready_among

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
            if not await self._round(ledger, waiting, replace(plan, is_lockstep=is_exact)):
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
        calls = _deal(tasks, *await self._ready(is_all=plan.is_lockstep), plan)
        outcomes = await asyncio.gather(*(call.ask(plan) for call in calls))
        is_whole = True
        for call, share in zip(calls, outcomes, strict=True):
            for group_id, group in share.groups.items():
                ledger.finish(group_id, group)
            missing = [t.group_id for t in call.tasks if t.group_id not in share.groups]
            ledger.requeue(missing)
            call.report(share.lost_generators)
            is_whole = is_whole and not missing
        return is_whole

    async def _ready(self, *, is_all: bool) -> tuple[list[SupervisedActor], list[SupervisedActor]]:
        """Wait for workers and generators that can be used at the same time.

        An exact step needs all of them, or its groups would be dealt otherwise than the first time.
        """
        while True:
            generators = await ready_among(self._generators, is_all=is_all)
            workers = await ready_among(self._workers, is_all=is_all)
            # One side may have been lost while the other was waited for.
            still = [generator for generator in generators if generator.is_ready]
            if still and (not is_all or len(still) == len(generators)):
                return workers, still


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What one worker is asked for."""

    worker: SupervisedActor
    tasks: Sequence[GroupTask]
    generators: Sequence[SupervisedActor]
    handles: Sequence[Handle]

    async def ask(self, plan: RolloutPlan) -> Share:
        """Wait for the worker; one that is lost finished nothing."""
        try:
            return await self.worker.result_of(
                lambda worker: worker.collect.remote(self.tasks, self.handles, plan)
            )
        except ActorLostError:
            return Share(groups={}, lost_generators=[])

    def report(self, lost: Sequence[int]) -> None:
        """Tell the supervisors of lost generators, unless they know already."""
        for index in lost:
            if self.generators[index].handle == self.handles[index]:
                self.generators[index].report_lost()


def _deal(
    tasks: Sequence[GroupTask],
    workers: Sequence[SupervisedActor],
    generators: Sequence[SupervisedActor],
    plan: RolloutPlan,
) -> list[_Call]:
    """Share the tasks among workers.

    In lockstep no generator hears two workers, whose calls would meet in an order of their own;
    workers beyond the number of generators stay idle.
    """
    count = min(len(workers), len(generators)) if plan.is_lockstep else len(workers)
    calls: list[_Call] = []
    for index in range(count):
        own = list(generators[index::count]) if plan.is_lockstep else list(generators)
        share = list(tasks[index::count])
        if share:
            calls.append(
                _Call(
                    worker=workers[index],
                    tasks=share,
                    generators=own,
                    handles=[generator.handle for generator in own],
                )
            )
    return calls
