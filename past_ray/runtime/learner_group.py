"""All FSDP ranks of the policy: they live and die together.

A rank that is lost leaves the others waiting in a collective, so the whole group is ended and
started anew. Its state comes back from the last checkpoint, which is the controller's business.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError

from past_ray.errors import ActorLostError, ClusterError
from past_ray.runtime.supervisor import Handle, RestartPolicy, end_process

LEARNER_CONCURRENCY = 2
"""One thread works, one answers heartbeats. The controller never has two working calls open."""


class LearnersLostError(ActorLostError):
    """A learner died or hangs; the run goes back to its last checkpoint."""


class LearnerGroup:
    """Handles of all ranks, and one call for all of them."""

    def __init__(
        self,
        create: Callable[[int], Handle],
        *,
        num_learners: int,
        backend: str,
        setup_timeout_s: float,
        policy: RestartPolicy,
    ) -> None:
        """Store how to start; ``start`` does it.

        Args:
            create: Makes the actor of one rank and returns at once.
            num_learners: Ranks.
            backend: Of the process group: ``gloo`` or ``nccl``.
            setup_timeout_s: How long all ranks together may take to meet.
            policy: Heartbeat, backoff and number of restarts.
        """
        self.num_restarts = 0
        self._create = create
        self._num_learners = num_learners
        self._backend = backend
        self._setup_timeout_s = setup_timeout_s
        self._policy = policy
        self._handles: list[Handle] = []
        self._heartbeat: asyncio.Task[None] | None = None

    @property
    def handles(self) -> Sequence[Handle]:
        """The processes of now, by rank."""
        return self._handles

    async def start(self) -> None:
        """Create all ranks and let them meet.

        Raises:
            ClusterError: If they do not in time.
        """
        self._handles = [self._create(rank) for rank in range(self._num_learners)]
        try:
            await asyncio.wait_for(self._meet(), self._setup_timeout_s)
        except TimeoutError as error:
            raise ClusterError(
                f"the learners must meet within {self._setup_timeout_s:.0f} s. Raise "
                "runtime.setup_timeout_s or look into the actors' logs."
            ) from error
        # Not before: a process that still imports its libraries answers nothing.
        self._heartbeat = asyncio.create_task(self._watch())

    async def _meet(self) -> None:
        address = await self._handles[0].rendezvous_address.remote()
        await _all(handle.setup.remote(address, self._backend) for handle in self._handles)

    async def restart(self) -> None:
        """End all ranks and start new ones, after a pause that doubles with every restart.

        Raises:
            ClusterError: If there were too many restarts, or the new ranks do not come up.
        """
        policy = self._policy
        self.close()
        if self.num_restarts >= policy.max_restarts:
            raise ClusterError(
                f"the learners may be restarted {policy.max_restarts} times in a run, and are lost "
                "again. Look into their logs (memory?); raise runtime.max_restarts for a cluster "
                "that loses many nodes. The same command continues from the last checkpoint."
            )
        await asyncio.sleep(min(policy.backoff_s * 2**self.num_restarts, policy.max_backoff_s))
        self.num_restarts += 1
        await self.start()

    async def call(self, method: Callable[[Handle], Any]) -> list[Any]:
        """Call every rank and return their answers by rank.

        Args:
            method: Gives the object ref, or a coroutine, of one rank's answer.

        Raises:
            LearnersLostError: As soon as any rank is dead or gives no heartbeat.
        """
        heartbeat = self._heartbeat
        assert heartbeat is not None
        answers = asyncio.ensure_future(_all(method(handle) for handle in self._handles))
        try:
            await asyncio.wait({answers, heartbeat}, return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise LearnersLostError("a learner died or stopped answering")
            return answers.result()
        except RayActorError as error:
            raise LearnersLostError(f"a learner died: {error}") from error
        finally:
            answers.cancel()

    def close(self) -> None:
        """End all ranks."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            self._heartbeat = None
        for handle in self._handles:
            end_process(handle)
        self._handles = []

    async def _watch(self) -> None:
        """Return when a rank is dead or silent."""
        policy = self._policy
        with suppress(RayActorError, TimeoutError):
            while True:
                await asyncio.sleep(policy.heartbeat_interval_s)
                pings = _all(handle.ping.remote() for handle in self._handles)
                await asyncio.wait_for(pings, policy.heartbeat_timeout_s)


async def _all(answers: Iterable[Any]) -> list[Any]:
    """Wait for all object refs or coroutines; the first error ends the wait."""
    return await asyncio.gather(*answers)
