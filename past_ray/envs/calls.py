"""Calls that may wait or hang, kept off the event loop.

::

    event loop   blocking_call: a call goes into the queue, its coroutine sleeps
    threads      take a call, run it, put it into the loop's mailbox
    watcher      the queue does not empty: every call in it gets a thread of its own

Calls that return at once share a thread and their wake-ups: 1,000 cost 10 ms. 256 calls that wait
200 ms get 256 threads and take 200 ms. A call that never returns costs its thread and nothing else:
the threads are daemons, which end with the process. ``asyncio.to_thread`` has a few dozen threads
and would keep the process waiting for them.
"""

import asyncio
import collections
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from past_ray.errors import GradingError

LOOK_EVERY_S = 0.002
"""How often the watcher looks at a queue that is not empty."""

MAX_LOOKS = 10
"""Calls that would stay in the queue for more looks, at its present pace, get their own threads."""

T = TypeVar("T")


async def blocking_call(function: Callable[[], T], *, timeout_s: float) -> T:
    """Return ``function()``, called in a thread.

    Waits for the thread; unblocked by its result or by the clock. Timed out or cancelled, it leaves
    the function running and drops what comes of it.

    Args:
        function: Takes no arguments; code of the user, so nothing is assumed about it.
        timeout_s: Longest wait.

    Raises:
        GradingError: If the function raised anything at all, or did not return in time.
    """
    loop = asyncio.get_running_loop()
    call = _Call(function, loop.create_future(), _mailbox_of(loop))
    clock = loop.call_later(timeout_s, call.give_up, timeout_s)
    _threads().add(call)
    try:
        return await call.future
    finally:
        clock.cancel()


class _Call(Generic[T]):
    """One call: ``run`` in a thread, everything else in the event loop."""

    def __init__(
        self, function: Callable[[], T], future: "asyncio.Future[T]", mailbox: "_Mailbox"
    ) -> None:
        self.future = future
        self._function = function
        self._mailbox = mailbox
        self._settle: Callable[[], None] = lambda: None

    def run(self) -> None:
        try:
            self._settle = functools.partial(self.future.set_result, self._function())
        except GradingError as error:
            self._settle = functools.partial(self.future.set_exception, error)
        except BaseException as error:
            # SystemExit and the like would end the thread and leave the caller waiting.
            reason = GradingError(f"{type(error).__name__}: {error}")
            reason.__cause__ = error
            self._settle = functools.partial(self.future.set_exception, reason)
        self._mailbox.put(self)

    def settle(self) -> None:
        if not self.future.done():
            self._settle()

    def give_up(self, timeout_s: float) -> None:
        if not self.future.done():
            self.future.set_exception(
                GradingError(
                    f"an environment must answer within {timeout_s:g} s, this one is still busy. "
                    "Raise rl.reward_timeout_s, or give its own requests a shorter timeout"
                )
            )


class _Mailbox:
    """Finished calls on their way to one event loop, which wakes up once for many of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._calls: collections.deque[_Call[Any]] = collections.deque()
        self._is_due = False

    def put(self, call: _Call[Any]) -> None:
        self._calls.append(call)
        if not self._is_due:
            self._is_due = True
            # A call that outlived its loop has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # First: a call that is put from here on either is delivered below or wakes the loop again.
        self._is_due = False
        while self._calls:
            self._calls.popleft().settle()


@functools.lru_cache(maxsize=1)
def _mailbox_of(loop: asyncio.AbstractEventLoop) -> _Mailbox:
    """Return the loop's mailbox. Another one for the same loop would do no harm."""
    return _Mailbox(loop)


class _Threads:
    """Daemon threads that take calls from one queue; their number follows the calls that wait."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call[Any]] = queue.SimpleQueue()
        self._num_taken = 0
        self._has_calls = threading.Event()
        self._start(self._work)
        self._start(self._watch)

    def add(self, call: _Call[Any]) -> None:
        self._calls.put(call)
        self._has_calls.set()

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            self._num_taken += 1
            call.run()
            # An idle thread must not keep the last environment alive.
            del call

    def _watch(self) -> None:
        while True:
            self._has_calls.wait()
            self._has_calls.clear()
            while not self._calls.empty():
                num_taken = self._num_taken
                time.sleep(LOOK_EVERY_S)
                num_waiting = self._calls.qsize()
                if num_waiting > MAX_LOOKS * (self._num_taken - num_taken):
                    # Fails where the system gives no more threads: the calls then run out of time.
                    with contextlib.suppress(RuntimeError):
                        for _ in range(num_waiting):
                            self._start(self._work)

    def _start(self, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name="environment", daemon=True).start()


@functools.cache
def _threads() -> _Threads:
    return _Threads()
