"""One thread that owns an engine: it creates it, admits requests, steps it and runs commands.

Callers only append to a queue and wait::

    queue head        requests in flight    what the thread does
    ---------------   -------------------   -----------------------------------------------
    batch             any                   admits all of its requests, then steps
    command           none                  runs it
    command, finish   some                  steps until none is left; admits nothing more
    command, keep     some                  runs it between two steps
    command, resume   some                  takes them out, runs it, admits what is left of each
    empty             some                  steps
    empty             none                  waits for: complete, run, close

Batches of several callers are decoded together. Batches that arrive behind a command wait for it.

A resumed request keeps its tokens and log-probabilities: they become part of the prompt, which is
computed anew, so that the rest depends on the weights after the command alone.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

from past_ray.engine.busy_clock import BusyClock
from past_ray.errors import ClusterError, GenerationError, PastRayError
from past_ray.rl.continuation import joined, remaining
from past_ray.rl.types import Completion, SamplingParams

logger = logging.getLogger(__name__)

InFlight = Literal["finish", "keep", "resume"]
"""What becomes of requests in flight when a command is due."""


class SteppedEngine(Protocol):
    """An engine with continuous batching; used by one thread only."""

    def admit(self, request_id: str, prompt: list[int], sampling: SamplingParams) -> None:
        """Take one request; it is decoded from the next step on."""
        ...

    def take_out(self, request_id: str) -> Completion:
        """Drop a request in flight and return what it has sampled, perhaps nothing."""
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

    def finish(self, index: int, completion: Completion) -> None:
        """Keep one completion; the last one answers the caller."""
        self.completions[index] = completion
        if len(self.completions) == len(self.prompts):
            self.result.set_result([self.completions[i] for i in range(len(self.prompts))])


@dataclass(slots=True, kw_only=True)
class _Request:
    """One prompt of a batch, and what it sampled before it was last taken out."""

    batch: _Batch
    index: int
    spans: list[Completion] = field(default_factory=list[Completion])


@dataclass(slots=True, kw_only=True)
class _Command:
    """Work for the engine's thread."""

    run: Callable[[], None]
    in_flight: InFlight
    result: "Future[None]"


class EngineLoop:
    """Runs a ``SteppedEngine`` in a thread of its own; every method may be called from any."""

    def __init__(self, start_engine: Callable[[], SteppedEngine]) -> None:
        """Create the engine in the thread; returns when it is ready.

        Raises:
            Exception: Whatever ``start_engine`` raised.
        """
        self.clock = BusyClock()
        """Requests in the engine, and the time with any."""

        self.num_finished = 0
        """Requests that ended."""

        self._queue: deque[_Batch | _Command] = deque()
        self._wakeup = threading.Condition()
        self._is_closed = False
        self._failure: BaseException | None = None
        self._running: dict[str, _Request] = {}
        self._num_admitted = 0
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

    def run(self, command: Callable[[], None], *, in_flight: InFlight = "finish") -> None:
        """Run a function in the engine's thread; blocks.

        A ``PastRayError`` that it raises reaches the caller and leaves the engine in use. Any other
        exception means that the engine's state is unknown: it reaches the caller as a
        ``ClusterError``, and the engine refuses everything from then on.

        Args:
            command: What to run.
            in_flight: Whether requests in flight end before it, stay in the engine meanwhile, or
                are taken out and resumed after it.
        """
        queued = _Command(run=command, in_flight=in_flight, result=Future())
        self._append(queued)
        queued.result.result()

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
            if isinstance(item, _Command) and item.in_flight == "finish" and self._running:
                item = None
            elif item is not None:
                self._queue.popleft()
        if isinstance(item, _Batch):
            self._admit(engine, [_Request(batch=item, index=i) for i in range(len(item.prompts))])
        elif isinstance(item, _Command):
            self._run_command(engine, item)
        if self._running:
            self._step(engine)
        return True

    def _admit(self, engine: SteppedEngine, requests: Sequence[_Request]) -> None:
        """Hand all requests, of one batch, to the engine, or none of them."""
        admitted: list[str] = []
        try:
            for request in requests:
                request_id = str(self._num_admitted)
                self._num_admitted += 1
                admitted.append(request_id)
                batch, index = request.batch, request.index
                prompt, sampling = remaining(
                    batch.prompts[index], batch.sampling[index], request.spans
                )
                engine.admit(request_id, prompt, sampling)
        except Exception as error:
            engine.abort(admitted)
            requests[0].batch.result.set_exception(
                GenerationError(
                    f"prompt {len(admitted) - 1} of {len(requests)} was refused: {error}"
                )
            )
        else:
            self._running.update(zip(admitted, requests, strict=True))
            self.clock.open(len(requests))

    def _run_command(self, engine: SteppedEngine, command: _Command) -> None:
        """Run a command; requests that it interrupts go on even if it is refused."""
        interrupted: dict[int, list[_Request]] = {}
        try:
            if command.in_flight == "resume":
                for request_id, request in self._running.items():
                    request.spans.append(engine.take_out(request_id))
                    interrupted.setdefault(id(request.batch), []).append(request)
            command.run()
        except PastRayError as error:
            command.result.set_exception(error)
        except BaseException as error:
            command.result.set_exception(ClusterError(f"the engine failed: {error!r}"))
            raise
        else:
            command.result.set_result(None)
        if interrupted:
            self.clock.close(len(self._running))
            self._running.clear()
            for requests in interrupted.values():
                self._admit(engine, requests)

    def _step(self, engine: SteppedEngine) -> None:
        for request_id, completion in engine.step():
            request = self._running.pop(request_id)
            self.num_finished += 1
            self.clock.close()
            request.batch.finish(request.index, joined([*request.spans, completion]))

    def _fail(self, error: BaseException) -> None:
        """Refuse all later calls and wake everybody who waits."""
        with self._wakeup:
            self._failure = error
            waiting = [request.batch.result for request in self._running.values()]
            queued = [item.result for item in self._queue]
            self.clock.close(len(self._running))
            self._running.clear()
            self._queue.clear()
        for result in (*waiting, *queued):
            if not result.done():
                result.set_exception(ClusterError(f"the engine failed: {error!r}"))
