"""One thread that owns an engine: it creates it, admits requests, steps it and runs commands.

Callers only append to a queue and wait::

    queue head    requests in flight    what the thread does
    -----------   -------------------   --------------------------------------------
    batch         any                   admits all of its requests, then steps
    command       none                  runs it
    command       some                  steps until none is left; admits nothing more
    empty         some                  steps
    empty         none                  waits for: complete, run_when_idle, close

Batches of several callers are decoded together. A command never runs beside a request, so no
completion is sampled by two sets of weights; batches that arrive behind a command wait for it.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from past_ray.errors import ClusterError, GenerationError
from past_ray.rl.types import Completion, SamplingParams

logger = logging.getLogger(__name__)


class SteppedEngine(Protocol):
    """An engine with continuous batching; used by one thread only."""

    def admit(self, request_id: str, prompt: list[int], sampling: SamplingParams) -> None:
        """Take one request; it is decoded from the next step on."""
        ...

    def abort(self, request_ids: list[str]) -> None:
        """Drop requests, including one that ``admit`` has just refused."""
        ...

    def step(self) -> list[tuple[str, Completion]]:
        """Decode one token of every request; return those that ended."""
        ...

    def shutdown(self) -> None:
        """Free everything."""
        ...


@dataclass(slots=True, kw_only=True)
class _Batch:
    """Requests of one caller."""

    prompts: Sequence[list[int]]
    sampling: Sequence[SamplingParams]
    result: "Future[list[Completion]]"
    completions: dict[int, Completion] = field(default_factory=dict[int, Completion])


@dataclass(slots=True, kw_only=True)
class _Command:
    """Work that needs an idle engine."""

    run: Callable[[], None]
    result: "Future[None]"


class EngineLoop:
    """Runs a ``SteppedEngine`` in a thread of its own; every method may be called from any."""

    def __init__(self, start_engine: Callable[[], SteppedEngine]) -> None:
        """Create the engine in the thread; returns when it is ready.

        Raises:
            Exception: Whatever ``start_engine`` raised.
        """
        self._queue: deque[_Batch | _Command] = deque()
        self._wakeup = threading.Condition()
        self._is_closed = False
        self._failure: BaseException | None = None
        self._running: dict[str, tuple[_Batch, int]] = {}
        self._num_requests = 0
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._main, args=(start_engine, started), name="engine-loop", daemon=True
        )
        self._thread.start()
        started.result()

    def complete(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete all prompts; blocks.

        Raises:
            GenerationError: If the engine refused a prompt; nothing of the call is sampled then.
            ClusterError: If the engine has failed or is closed.
        """
        if not prompts:
            return []
        batch = _Batch(prompts=prompts, sampling=sampling, result=Future())
        self._append(batch)
        return batch.result.result()

    def run_when_idle(self, run: Callable[[], None]) -> None:
        """Wait until no request is in flight, then run a function in the engine's thread; blocks.

        A ``ClusterError`` that it raises reaches the caller and leaves the engine in use. Any other
        exception means that the engine's state is unknown: it reaches the caller as a
        ``ClusterError`` too, and the engine refuses everything from then on.
        """
        command = _Command(run=run, result=Future())
        self._append(command)
        command.result.result()

    def close(self) -> None:
        """Finish what was asked for, then free the engine. Safe to call again."""
        with self._wakeup:
            self._is_closed = True
            self._wakeup.notify()
        self._thread.join()

    def _append(self, item: _Batch | _Command) -> None:
        with self._wakeup:
            if self._failure is not None:
                raise ClusterError(
                    f"the engine must be working; it failed before: {self._failure!r}. Start a new "
                    "one."
                )
            if self._is_closed:
                raise ClusterError("the generator must be open; close() was called")
            self._queue.append(item)
            self._wakeup.notify()

    def _main(self, start_engine: Callable[[], SteppedEngine], started: "Future[None]") -> None:
        try:
            engine = start_engine()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while self._serve_once(engine):
                pass
        except BaseException as error:
            logger.exception("the engine failed")
            self._fail(error)
        finally:
            engine.shutdown()

    def _serve_once(self, engine: SteppedEngine) -> bool:
        """Admit or run one queue item and step once; False when closed and done."""
        with self._wakeup:
            while not self._queue and not self._running and not self._is_closed:
                self._wakeup.wait()
            if not self._queue and not self._running:
                return False
            item = self._queue[0] if self._queue else None
            if isinstance(item, _Command) and self._running:
                item = None
            elif item is not None:
                self._queue.popleft()
        if isinstance(item, _Batch):
            self._admit(engine, item)
        elif isinstance(item, _Command):
            _run_command(item)
        if self._running:
            self._step(engine)
        return True

    def _admit(self, engine: SteppedEngine, batch: _Batch) -> None:
        """Hand all requests of a batch to the engine, or none of them."""
        admitted: list[str] = []
        try:
            for prompt, params in zip(batch.prompts, batch.sampling, strict=True):
                request_id = str(self._num_requests)
                self._num_requests += 1
                self._running[request_id] = (batch, len(admitted))
                admitted.append(request_id)
                engine.admit(request_id, prompt, params)
        except Exception as error:
            engine.abort(admitted)
            for request_id in admitted:
                del self._running[request_id]
            batch.result.set_exception(
                GenerationError(
                    f"prompt {len(admitted) - 1} of {len(batch.prompts)} was refused: {error}"
                )
            )

    def _step(self, engine: SteppedEngine) -> None:
        for request_id, completion in engine.step():
            batch, index = self._running.pop(request_id)
            batch.completions[index] = completion
            if len(batch.completions) == len(batch.prompts):
                batch.result.set_result(
                    [batch.completions[position] for position in range(len(batch.prompts))]
                )

    def _fail(self, error: BaseException) -> None:
        """Refuse all later calls and wake everybody who waits."""
        with self._wakeup:
            self._failure = error
            waiting = [batch.result for batch, _ in self._running.values()]
            queued = [item.result for item in self._queue]
            self._running.clear()
            self._queue.clear()
        for result in (*waiting, *queued):
            if not result.done():
                result.set_exception(ClusterError(f"the engine failed: {error!r}"))


def _run_command(command: _Command) -> None:
    try:
        command.run()
    except ClusterError as error:
        command.result.set_exception(error)
    except BaseException as error:
        command.result.set_exception(ClusterError(f"the engine failed: {error!r}"))
        raise
    else:
        command.result.set_result(None)
