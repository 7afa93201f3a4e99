"""Drives the environments of one group, all rollouts at once.

A rollout loops over turns::

    render -> generate -> decode -> Env.step --is_done--> COMPLETED
      ^                                 |
      +------- reply messages ----------+

What goes wrong becomes the rollout's status, never an exception and never a reward of 0::

    render or generate raised, completion aborted, turns used up            GENERATION_ERROR
    environment raised, gave no answer in time or a reward that is no number    GRADING_ERROR

One thing is nobody's fault: a generator that died (``ActorLostError``) ends the whole group, whose
rollouts are to be sampled again elsewhere.

Token ids are kept as they were sampled: the environment reads decoded text, but the next turn's
prompt is the ids so far plus the ids of the reply. Nothing is tokenised twice and nothing is cut. A
completion that hit its length limit is graded like any other.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from past_ray.envs.base import Env, EnvStep
from past_ray.envs.calls import blocking_call
from past_ray.errors import ActorLostError, GenerationError, GradingError
from past_ray.rl.protocols import GenerateFn
from past_ray.rl.types import Completion, Rollout, RolloutGroup, RolloutStatus, SamplingParams, Turn
from past_ray.tasks.examples import Message, QAExample

logger = logging.getLogger(__name__)

T = TypeVar("T")

Render = Callable[[Sequence[Message]], list[int]]
"""Messages in, token ids out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    r"""The text side of a policy: how messages become ids and ids become text.

    Example (ChatML), what surrounds an answer that ends by ``<|im_end|>``::

        render       <|im_start|> user \n hi <|im_end|> \n <|im_start|> assistant \n
        closing_ids  <|im_end|>
        render_reply \n <|im_start|> user \n more <|im_end|> \n <|im_start|> assistant \n
    """

    render: Render
    """The whole prompt, up to where the policy answers."""

    decode: Callable[[list[int]], str]
    """The answer's text, special tokens left out."""

    render_reply: Render | None = None
    """The environment's reply, from the end of a closed completion to where the policy answers
    again; None where every environment has a single turn."""

    closing_ids: tuple[int, ...] = ()
    """What closes a completion. The last one is sampled by a policy that ends by itself; behind a
    completion without it they are put in front of the reply."""


async def run_group(
    example: QAExample,
    *,
    group_id: str,
    make_env: Callable[[QAExample], Env],
    generate: GenerateFn,
    codec: Codec,
    group_size: int,
    sampling: SamplingParams,
    seed: int,
    env_timeout_s: float,
    max_turns: int = 1,
    on_end: Callable[[], None] | None = None,
) -> RolloutGroup:
    """Run ``group_size`` rollouts of one example concurrently.

    The same ``seed`` and ``group_id`` ask for the same completions again, wherever they run.

    Args:
        example: The question.
        group_id: Unique in a run, ``step/question_id``; rollouts are called ``group_id/index``.
        make_env: Makes one environment per rollout.
        generate: Completes one prompt.
        codec: Rendering and decoding.
        group_size: Rollouts.
        sampling: Of every completion; its ``seed`` is replaced by one per rollout and turn.
        seed: The run's seed.
        env_timeout_s: Longest wait for one reply of an environment.
        max_turns: A rollout that is not done after this many turns failed.
        on_end: Called once for every rollout that asks for no further completion.

    Returns:
        The group, its rollouts in index order.

    Raises:
        ActorLostError: If a generator died; by then no rollout of the group runs any more.
    """
    drivers = [
        _Driver(
            env_maker=lambda: make_env(example),
            generate=generate,
            codec=codec,
            sampling=sampling,
            rollout_id=f"{group_id}/{index}",
            seed=seed,
            env_timeout_s=env_timeout_s,
            max_turns=max_turns,
            on_end=on_end or _nothing,
        )
        for index in range(group_size)
    ]
    try:
        async with asyncio.TaskGroup() as tasks:
            runs = [tasks.create_task(driver.run()) for driver in drivers]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return RolloutGroup(question_id=example.question_id, rollouts=[run.result() for run in runs])


def completion_seed(seed: int, rollout_id: str, turn: int) -> int:
    """Seed of one completion, 63 bits: the same whatever else runs, and in every process."""
    digest = hashlib.sha256(f"{seed}/{rollout_id}/{turn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(slots=True, kw_only=True)
class _Driver:
    """One rollout, and what is known of it so far."""

    env_maker: Callable[[], Env]
    generate: GenerateFn
    codec: Codec
    sampling: SamplingParams
    rollout_id: str
    seed: int
    env_timeout_s: float
    max_turns: int
    on_end: Callable[[], None]

    turns: list[Turn] = field(default_factory=list[Turn])
    reward_parts: dict[str, float] = field(default_factory=dict[str, float])
    generation_s: float = 0.0
    environment_s: float = 0.0

    async def run(self) -> Rollout:
        try:
            await self._take_turns()
        except ActorLostError:
            raise
        except GradingError as error:
            return self._failed(RolloutStatus.GRADING_ERROR, error)
        except Exception as error:
            self.turns.clear()
            return self._failed(RolloutStatus.GENERATION_ERROR, error)
        finally:
            self.on_end()
        return self._record(
            status=RolloutStatus.COMPLETED, reward=sum(turn.reward for turn in self.turns)
        )

    async def _take_turns(self) -> None:
        """Fill ``turns`` until the environment is done.

        Raises:
            GradingError: If the environment failed.
            Exception: Whatever kept a completion from being made.
        """
        env, messages = await self._call_env(lambda: _opened(self.env_maker))
        added_ids = self.codec.render(messages)
        context: list[int] = []
        for index in range(self.max_turns):
            context = context + added_ids
            completion = await self._complete(context, index)
            context = context + completion.token_ids
            self.turns.append(Turn(prompt_ids=added_ids, completion=completion))
            answer = self._answer()
            outcome = await self._call_env(lambda answer=answer: _checked(env.step(answer)))
            self.turns[-1] = replace(self.turns[-1], reward=outcome.reward)
            for name, value in outcome.reward_parts.items():
                self.reward_parts[name] = self.reward_parts.get(name, 0.0) + value
            if outcome.is_done:
                return
            added_ids = self._reply_ids(outcome.messages, completion)
        raise GenerationError(f"the environment must end within {self.max_turns} turns")

    async def _complete(self, context: list[int], turn: int) -> Completion:
        sampling = replace(self.sampling, seed=completion_seed(self.seed, self.rollout_id, turn))
        started = time.perf_counter()
        try:
            completion = await self.generate(context, sampling)
        finally:
            self.generation_s += time.perf_counter() - started
        if completion.finish_reason == "abort":
            raise GenerationError("the generator cut the completion off (finish_reason=abort)")
        return completion

    async def _call_env(self, function: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            return await blocking_call(function, timeout_s=self.env_timeout_s)
        finally:
            self.environment_s += time.perf_counter() - started

    def _reply_ids(self, messages: Sequence[Message], completion: Completion) -> list[int]:
        """Return what comes between a completion and the next one."""
        if self.codec.render_reply is None:
            raise GenerationError(
                "an environment with several turns needs Codec.render_reply; it is None"
            )
        closing_ids = self.codec.closing_ids
        is_closed = completion.token_ids[-1:] == list(closing_ids[-1:])
        return [*(() if is_closed else closing_ids), *self.codec.render_reply(messages)]

    def _answer(self) -> str:
        """Return the text of the last completion."""
        if not self.turns:
            return ""
        return self.codec.decode(self.turns[-1].completion.token_ids).strip()

    def _failed(self, status: RolloutStatus, error: Exception) -> Rollout:
        logger.warning("rollout %s: %s: %s", self.rollout_id, status, error)
        return self._record(status=status, reward=None, error=f"{type(error).__name__}: {error}")

    def _record(self, *, status: RolloutStatus, reward: float | None, error: str = "") -> Rollout:
        versions = [turn.completion.policy_version for turn in self.turns]
        return Rollout(
            rollout_id=self.rollout_id,
            turns=self.turns,
            answer=self._answer(),
            reward=reward,
            status=status,
            policy_version=min(versions, default=-1),
            error=error,
            reward_parts=self.reward_parts,
            generation_s=self.generation_s,
            environment_s=self.environment_s,
        )


def _nothing() -> None:
    pass


def _opened(env_maker: Callable[[], Env]) -> tuple[Env, list[Message]]:
    env = env_maker()
    return env, env.reset()


def _checked(outcome: EnvStep) -> EnvStep:
    """Return the step with its numbers as plain floats; runs in the environment's thread."""
    reward = float(outcome.reward)
    parts = {name: float(value) for name, value in outcome.reward_parts.items()}
    for name, value in {"the reward": reward, **parts}.items():
        if not math.isfinite(value):
            raise GradingError(f"rewards and their parts must be finite, found {name} = {value}")
    return replace(outcome, reward=reward, reward_parts=parts)
