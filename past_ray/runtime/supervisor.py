"""Keeps replaceable actors alive: heartbeat, restart with backoff, and a fast answer to who waits.

::

    state      event                                    next state
    --------   --------------------------------------   ----------
    STARTING   prepared                                 READY
    STARTING   failed, restarts left                    STARTING, after a pause twice as long
    STARTING   failed, none left                        GIVEN UP: everyone who waits gets the error
    READY      dead, or no heartbeat in time, or lost   STARTING; calls in flight fail at once

``prepare`` brings a new process to where the old one should be: its setup and, for a generator,
the *current* weights. An actor is handed out only when it is READY.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from past_ray.errors import ActorLostError, ClusterError, ConfigError

logger = logging.getLogger(__name__)

Handle = Any
"""An actor handle; Ray types it as Any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """How patient the supervisor is."""

    heartbeat_interval_s: float
    """Time between two heartbeats."""

    heartbeat_timeout_s: float
    """An actor that does not answer within this time is ended and replaced."""

    backoff_s: float
    """Pause before the first restart; doubles with every further one in a row."""

    max_backoff_s: float
    """Longest pause."""

    max_restarts: int
    """Restarts in a row, without a heartbeat in between, after which an actor is given up."""


class SupervisedActor:
    """One place in the cluster and the process that fills it now."""

    def __init__(
        self,
        name: str,
        *,
        create: Callable[[], Handle],
        prepare: Callable[[Handle], Awaitable[None]],
        policy: RestartPolicy,
    ) -> None:
        """Store how to start; ``start`` does it.

        Args:
            name: For messages: ``generator 0``.
            create: Makes a new actor and returns at once.
            prepare: Waits until the actor can be used.
            policy: Heartbeat and restarts.
        """
        self.name = name
        self.num_restarts = 0
        self._create = create
        self._prepare = prepare
        self._policy = policy
        self._handle: Handle = None
        self._ready = asyncio.Event()
        self.failure: ClusterError | None = None
        """Why it was given up."""

        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it can be used."""
        return self._ready.is_set() and self.failure is None

    @property
    def handle(self) -> Handle:
        """The process of now."""
        return self._handle

    async def start(self) -> None:
        """Create and prepare the actor, then watch it; a first start that fails is an error."""
        self._handle = self._create()
        await self._prepare(self._handle)
        self._ready.set()
        self._task = asyncio.create_task(self._watch())

    async def wait_settled(self) -> None:
        """Wait until it can be used or was given up."""
        await self._ready.wait()

    async def result_of(self, call: Callable[[Handle], Any]) -> Any:  # noqa: ANN401 - any method
        """Call the actor and return the value; ``call`` gives an object ref or a coroutine.

        Raises:
            ActorLostError: As soon as the process is dead or found hanging.
        """
        lost = self._lost
        pending = call(self._handle)
        answer = asyncio.ensure_future(pending)
        try:
            await asyncio.wait({answer, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ActorLostError(f"{self.name} stopped answering")
            return answer.result()
        except RayActorError as error:
            self.report_lost()
            raise ActorLostError(f"{self.name} died: {error}") from error
        except asyncio.CancelledError:
            with suppress(Exception):
                ray.cancel(pending)
            raise
        finally:
            answer.cancel()

    def report_lost(self) -> None:
        """Somebody found the actor unusable: fail all calls and replace it now."""
        self._ready.clear()
        if not self._lost.done():
            self._lost.set_result(None)

    def close(self) -> None:
        """End watcher and process."""
        if self._task is not None:
            self._task.cancel()
        self._ready.clear()
        end_process(self._handle)

    async def _watch(self) -> None:
        """Ask for heartbeats; replace the process when they stop."""
        while self.failure is None:
            await self._beat()
            if self._lost.done():
                await self._replace()

    async def _beat(self) -> None:
        """Wait one interval, or until the actor is reported lost, then ask it once."""
        policy = self._policy
        await asyncio.wait({self._lost}, timeout=policy.heartbeat_interval_s)
        if self._lost.done():
            return
        try:
            await asyncio.wait_for(self._handle.ping.remote(), policy.heartbeat_timeout_s)
        except TimeoutError:
            logger.warning("%s gave no heartbeat for %.0f s", self.name, policy.heartbeat_timeout_s)
            self.report_lost()
        except RayActorError as error:
            logger.warning("%s died: %s", self.name, _first_line(error))
            self.report_lost()

    async def _replace(self) -> None:
        """Start a new process until one is ready, or give up."""
        policy = self._policy
        pause = policy.backoff_s
        for attempt in range(1, policy.max_restarts + 1):
            end_process(self._handle)
            await asyncio.sleep(pause)
            pause = min(2 * pause, policy.max_backoff_s)
            started = time.perf_counter()
            try:
                self._handle = self._create()
                await self._prepare(self._handle)
            except (RayActorError, ClusterError, ConfigError, TimeoutError) as error:
                logger.warning(
                    "%s: restart %d of %d failed: %s",
                    self.name,
                    attempt,
                    policy.max_restarts,
                    _first_line(error),
                )
                continue
            self.num_restarts += 1
            self._lost = asyncio.get_running_loop().create_future()
            self._ready.set()
            logger.warning("%s is back after %.1f s", self.name, time.perf_counter() - started)
            return
        self.failure = ClusterError(
            f"{self.name} must come back after it died, {policy.max_restarts} restarts in a row "
            "failed. Look into the actor's log; raise runtime.max_restarts for a cluster that "
            "loses many nodes."
        )
        self._ready.set()


async def ready_among(
    actors: Sequence[SupervisedActor], *, is_all: bool = False
) -> list[SupervisedActor]:
    """Return the actors that can be used now; waits for the first, or for all that may come back.

    Raises:
        ClusterError: If all were given up.
    """
    while True:
        coming = [actor for actor in actors if actor.failure is None]
        if not coming and actors[0].failure is not None:
            raise actors[0].failure
        ready = [actor for actor in coming if actor.is_ready]
        if len(ready) == len(coming) or (ready and not is_all):
            return ready
        away = [actor for actor in coming if not actor.is_ready]
        waits = [asyncio.ensure_future(actor.wait_settled()) for actor in away]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()


def end_process(handle: Handle) -> None:
    """Kill an actor; one that is gone already is no error."""
    # Outside of a cluster ray.kill would start one.
    if handle is not None and ray.is_initialized():
        with suppress(Exception):
            ray.kill(handle)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
