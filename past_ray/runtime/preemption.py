"""Notices that machines are about to be taken away.

Two signs are watched: SIGTERM to this process (``ray job stop``, a spot reclaim of the driver's
node, a batch system) and nodes that Ray drains (a spot reclaim of any other node). Either asks for
a checkpoint at once; SIGTERM also ends the run afterwards.
"""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from types import TracebackType

import ray

logger = logging.getLogger(__name__)

NOTICE_INTERVAL_S = 2.0
"""Time between two looks at the cluster; clouds give 30 s and more."""


def draining_nodes() -> set[str]:
    """Ids of the nodes that Ray drains now; empty without a cluster."""
    if not ray.is_initialized():
        return set()
    # Ray has no public call for it; Serve and Train read the same table.
    from ray._private.state import state

    return set(state.get_draining_nodes())


class PreemptionNotice:
    """Enter it around a run; ``given`` is set when a checkpoint is wanted."""

    def __init__(self, *, find_draining: Callable[[], set[str]] = draining_nodes) -> None:
        """Prepare.

        Args:
            find_draining: Ids of nodes that will soon be gone.
        """
        self.given = asyncio.Event()
        """A checkpoint is wanted now; cleared by ``answered``."""

        self.must_stop = False
        """This process was told to end."""

        self._find_draining = find_draining
        self._seen: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._has_handler = False

    async def __aenter__(self) -> "PreemptionNotice":
        """Start to watch. Signals reach the main thread alone; elsewhere only nodes are watched."""
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._terminate)
            self._has_handler = True
        self._task = asyncio.create_task(self._watch_nodes())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop to watch."""
        if self._has_handler:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
        if self._task is not None:
            self._task.cancel()

    def answered(self) -> None:
        """The checkpoint was written."""
        self.given.clear()

    def _terminate(self) -> None:
        logger.warning("told to stop (SIGTERM): saving a checkpoint first")
        self.must_stop = True
        self.given.set()

    async def _watch_nodes(self) -> None:
        while True:
            draining = await asyncio.to_thread(self._find_draining)
            if new := draining - self._seen:
                logger.warning("%d nodes are being drained: saving a checkpoint now", len(new))
                self._seen |= new
                self.given.set()
            await asyncio.sleep(NOTICE_INTERVAL_S)
