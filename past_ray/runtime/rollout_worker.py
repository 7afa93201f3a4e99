"""Drives environments and asks generator actors for completions.

Every rollout is a coroutine of one event loop. Prompts leave as one call per generator: those
handed in during one tick of the loop or, in lockstep, those of all rollouts that still run. So 192
single-turn rollouts cost each generator one call.

A worker keeps nothing between two calls: what is lost with it is sampled again elsewhere.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from past_ray.envs.base import Env
from past_ray.envs.chat import chat_codec
from past_ray.envs.rollout import run_group
from past_ray.errors import ActorLostError, ConfigError
from past_ray.rl.types import Completion, RolloutGroup, SamplingParams
from past_ray.tasks.examples import QAExample

GeneratorHandle = Any
"""A handle of ``GeneratorActor``; Ray types it as Any."""

MakeEnv = Callable[[QAExample], Env]
"""Makes one environment per rollout; it is pickled to the workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTask:
    """One group that is to be sampled."""

    group_id: str
    """Unique in a run, ``step/question_id``; with the run's seed it decides every random number."""

    example: QAExample
    """The question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPlan:
    """What all groups of one call have in common."""

    group_size: int
    """Rollouts of one group."""

    sampling: SamplingParams
    """Of every completion; its seed is replaced."""

    seed: int
    """The run's seed."""

    max_turns: int = 1
    """A rollout that is not done after this many turns failed."""

    env_timeout_s: float
    """Longest wait for one reply of an environment."""

    is_lockstep: bool = False
    """All rollouts take their turns together. Then what is decoded together, and with it the last
    digits of every log-probability, does not depend on the time that environments take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What became of the groups of one call."""

    groups: dict[str, RolloutGroup]
    """Finished groups by their id."""

    lost_generators: list[int]
    """Places, in the list of generators given, of those that died on the way; every group that is
    missing waited for one of them."""


class RolloutWorkerShell:
    """What runs inside the actor process."""

    def __init__(self, tokenizer_folder: Path, make_env: MakeEnv) -> None:
        """Store the settings; ``setup`` loads the tokenizer.

        Args:
            tokenizer_folder: Hugging Face folder whose tokenizer has a chat template.
            make_env: Makes one environment per rollout.
        """
        self._tokenizer_folder = tokenizer_folder
        self._make_env = make_env

    async def setup(self) -> None:
        """Load the tokenizer.

        Raises:
            ConfigError: If it has no chat template or no end of sequence.
        """
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self._tokenizer_folder
        )
        chat_codec(self._tokenizer)

    async def ping(self) -> None:
        """Answer a heartbeat."""

    async def collect(
        self,
        tasks: Sequence[GroupTask],
        generators: Sequence[GeneratorHandle],
        plan: RolloutPlan,
    ) -> Share:
        """Sample every group; an evaluation is the same with one greedy rollout a group.

        Args:
            tasks: The groups.
            generators: Handles of ``GeneratorActor``; prompts are spread over them in turn.
            plan: What the groups have in common.
        """
        codec = chat_codec(self._tokenizer, max_turns=plan.max_turns)
        # A new one per call: what is sampled depends on the call alone, also after a restart.
        num_rollouts = len(tasks) * plan.group_size
        batcher = GenerateBatcher(
            generators, lockstep_of=num_rollouts if plan.is_lockstep else None
        )
        outcomes = await asyncio.gather(
            *(
                run_group(
                    task.example,
                    group_id=task.group_id,
                    make_env=self._make_env,
                    generate=batcher.generate,
                    codec=codec,
                    group_size=plan.group_size,
                    sampling=plan.sampling,
                    seed=plan.seed,
                    max_turns=plan.max_turns,
                    env_timeout_s=plan.env_timeout_s,
                    on_end=batcher.rollout_ended,
                )
                for task in tasks
            ),
            return_exceptions=True,
        )
        groups: dict[str, RolloutGroup] = {}
        for task, outcome in zip(tasks, outcomes, strict=True):
            if isinstance(outcome, RolloutGroup):
                groups[task.group_id] = outcome
            elif not isinstance(outcome, ActorLostError):
                raise outcome
        return Share(groups=groups, lost_generators=sorted(batcher.lost))


RolloutWorkerActor = ray.remote(RolloutWorkerShell)


class GenerateBatcher:
    """Joins prompts into one call per generator.

    A call leaves at the end of an event-loop tick or, in lockstep, as soon as every rollout that
    still runs has handed in a prompt. ``generate`` waits for the call that its prompt left with; it
    is unblocked when that generator has completed all prompts of the call, or has died.
    """

    def __init__(
        self, generators: Sequence[GeneratorHandle], *, lockstep_of: int | None = None
    ) -> None:
        """Keep the actor handles.

        Args:
            generators: At least one.
            lockstep_of: Rollouts that take their turns together; each must call ``rollout_ended``.
                None sends what one tick brings.
        """
        if not generators:
            raise ConfigError("a rollout worker needs at least one generator, found none")
        self.lost: set[int] = set()
        """Places of the generators that died."""

        self._generators = list(generators)
        self._next_generator = 0
        self._num_running = lockstep_of
        self._waiting: list[tuple[list[int], SamplingParams, asyncio.Future[Completion]]] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def generate(self, prompt: list[int], sampling: SamplingParams) -> Completion:
        """Complete one prompt.

        Raises:
            GenerationError: If the generator could not complete this prompt.
            Exception: Whatever the call to the actor raised.
        """
        loop = asyncio.get_running_loop()
        if not self._waiting and self._num_running is None:
            # Runs after every coroutine that is ready now has handed in its prompt.
            loop.call_soon(self._flush)
        future: asyncio.Future[Completion] = loop.create_future()
        self._waiting.append((prompt, sampling, future))
        self._flush_in_lockstep()
        return await future

    def rollout_ended(self) -> None:
        """A rollout will hand in no further prompt; the others need not wait for it."""
        if self._num_running is not None:
            self._num_running -= 1
            self._flush_in_lockstep()

    def _flush_in_lockstep(self) -> None:
        if self._waiting and len(self._waiting) == self._num_running:
            # Environments answer in any order; seeds are unique and the same in every run.
            self._waiting.sort(key=lambda request: request[1].seed or 0)
            self._flush()

    def _flush(self) -> None:
        """Deal the waiting prompts round, starting after the generator that got the last one."""
        waiting, self._waiting = self._waiting, []
        num_generators = len(self._generators)
        for offset in range(min(num_generators, len(waiting))):
            index = (self._next_generator + offset) % num_generators
            call = asyncio.ensure_future(self._call(index, waiting[offset::num_generators]))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        self._next_generator = (self._next_generator + len(waiting)) % num_generators

    async def _call(
        self,
        index: int,
        requests: list[tuple[list[int], SamplingParams, "asyncio.Future[Completion]"]],
    ) -> None:
        prompts = [prompt for prompt, _, _ in requests]
        sampling = [params for _, params, _ in requests]
        outcomes: list[Completion | Exception]
        try:
            outcomes = await self._generators[index].generate_each.remote(prompts, sampling)
        except RayActorError as error:
            self.lost.add(index)
            outcomes = [ActorLostError(f"generator {index} died: {error}")] * len(requests)
        except Exception as error:
            # The actor's own error; Ray's wrapper has a whole traceback for its text.
            outcomes = [getattr(error, "cause", None) or error] * len(requests)
        for (_, _, future), outcome in zip(requests, outcomes, strict=True):
            if future.done():
                continue
            if isinstance(outcome, Completion):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)
