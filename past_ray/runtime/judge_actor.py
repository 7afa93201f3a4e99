"""One Ray actor around a judge, so that its limits, its cache and its cost are in one place.

::

    rollout worker --+
    rollout worker --+-- RemoteJudge.judge --> JudgeActor --> model or endpoint
    rollout worker --+   (waits in a thread)   (a thread per call; ``stats`` always answers)
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError

from past_ray.config.judge import EndpointJudgeConfig, JudgeConfig, ModelJudgeConfig
from past_ray.engine.endpoint_judge import EndpointJudge
from past_ray.engine.judge import ModelJudge, RuleJudge, build_judge
from past_ray.tasks.judging import JudgeFailure, JudgeItem, JudgeOutcome, JudgeStats

ResultT = TypeVar("ResultT")

MAX_WAITING_CALLS = 1024
"""Threads that may wait for the judge: more than the 1,000 calls that Ray lets run at once."""

MAX_RESTARTS = 3
"""Times that Ray starts the process anew; a restarted judge is built by its first call."""


class JudgeShell:
    """What runs inside the actor process."""

    def __init__(self, config: JudgeConfig) -> None:
        """Store the settings; ``setup`` or the first call builds the judge."""
        self._config = config
        self._judge: RuleJudge | ModelJudge | EndpointJudge | None = None
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(MAX_WAITING_CALLS, thread_name_prefix="call")

    async def setup(self) -> None:
        """Build the judge.

        Raises:
            ConfigError: The model cannot be loaded, or the endpoint's key is missing here.
        """
        await self._in_thread(self._built)

    async def judge(self, items: Sequence[JudgeItem]) -> list[JudgeOutcome]:
        """Return one outcome per item, in order."""
        return await self._in_thread(lambda: self._built().judge(items))

    async def stats(self) -> JudgeStats:
        """Answer at once; zeros before the judge is built."""
        return JudgeStats() if self._judge is None else self._judge.stats()

    async def close(self) -> None:
        """Free the judge."""
        judge, self._judge = self._judge, None
        if judge is not None:
            await self._in_thread(judge.close)

    async def _in_thread(self, call: Callable[[], ResultT]) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _built(self) -> RuleJudge | ModelJudge | EndpointJudge:
        with self._lock:
            if self._judge is None:
                self._judge = build_judge(self._config)
            return self._judge


JudgeActor = ray.remote(JudgeShell)


@dataclass(frozen=True, slots=True)
class RemoteJudge:
    """A judge in an actor; can be sent to any worker. Whatever goes wrong there is a failure."""

    handle: Any
    """A ``JudgeActor``."""

    timeout_s: float
    """Longest wait for one call; retries and the rate limit count."""

    def judge(self, items: Sequence[JudgeItem]) -> list[JudgeOutcome]:
        """Return one outcome per item, in order; blocks."""
        try:
            return ray.get(self.handle.judge.remote(items), timeout=self.timeout_s)
        except GetTimeoutError:
            error = f"a judge must answer within {self.timeout_s:g} s, this one is still busy. "
            error += "Raise its timeout, or its rate."
        except RayError as cause:
            error = f"the judge's actor must answer, got {type(cause).__name__}: {cause}"
        return [JudgeFailure(error=error)] * len(items)

    def stats(self) -> JudgeStats:
        """Return the judge's counts."""
        return ray.get(self.handle.stats.remote(), timeout=self.timeout_s)


def start_judge(
    config: ModelJudgeConfig | EndpointJudgeConfig,
    *,
    timeout_s: float,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
) -> RemoteJudge:
    """Start the actor and build its judge; the actor lives as long as its handles.

    Args:
        config: A rule needs no actor: use ``RuleJudge`` where the answers are.
        timeout_s: Longest wait of a later call.
        num_cpus: CPUs that the actor asks for.
        num_gpus: GPUs that the actor asks for.

    Raises:
        ConfigError: The model cannot be loaded, or the endpoint's key is missing there.
    """
    options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": MAX_RESTARTS}
    handle: Any = JudgeActor.options(**options).remote(config)
    ray.get(handle.setup.remote())
    return RemoteJudge(handle, timeout_s)
