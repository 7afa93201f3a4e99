"""Drives the environments of one group, all rollouts at once.

A rollout loops over turns::

    render -> generate -> decode -> Env.step --is_done--> COMPLETED
      ^                                 |
      +------- reply messages ----------+

What goes wrong becomes the rollout's status, never an exception and never a reward of 0::

    render or generate raised, completion aborted, turns used up    GENERATION_ERROR
    Env.step raised, reward not a finite number                     GRADING_ERROR

Token ids are kept as they were sampled: the environment reads decoded text, but the next turn's
prompt is the ids so far plus the ids of the reply. Nothing is tokenised twice. A completion that
hit its length limit is graded like any other.
"""

import asyncio
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from past_ray.envs.base import Env, EnvStep
from past_ray.errors import GenerationError, GradingError
from past_ray.rl.protocols import GenerateFn
from past_ray.rl.types import Completion, Rollout, RolloutGroup, RolloutStatus, SamplingParams, Turn
from past_ray.tasks.examples import Message, QAExample

logger = logging.getLogger(__name__)

Render = Callable[[Sequence[Message]], list[int]]
"""Messages in, token ids out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """The text side of a policy: how messages become ids and ids become text."""

    render: Render
    """The whole prompt, up to where the policy answers."""

    decode: Callable[[list[int]], str]
    """The answer's text, special tokens left out."""

    render_reply: Render | None = None
    """The environment's reply, from the end of a completion to where the policy answers again;
    None where every environment has a single turn."""


async def run_group(
    example: QAExample,
    *,
    make_env: Callable[[QAExample], Env],
    generate: GenerateFn,
    codec: Codec,
    group_size: int,
    sampling: SamplingParams,
    seed: int,
    step: int,
    max_turns: int = 1,
) -> RolloutGroup:
    """Run ``group_size`` rollouts of one example concurrently.

    Args:
        example: The question.
        make_env: Makes one environment per rollout.
        generate: Completes one prompt.
        codec: Rendering and decoding.
        group_size: Rollouts.
        sampling: Of every completion; its ``seed`` is replaced by one per rollout and turn.
        seed: The run's seed.
        step: Optimizer step (or any number that differs between calls that must differ).
        max_turns: A rollout that is not done after this many turns failed.

    Returns:
        The group, its rollouts in index order.
    """
    rollouts = await asyncio.gather(
        *(
            _Driver(
                env_maker=lambda: make_env(example),
                generate=generate,
                codec=codec,
                sampling=sampling,
                rollout_id=f"{step}/{example.question_id}/{index}",
                seed=seed,
                max_turns=max_turns,
            ).run()
            for index in range(group_size)
        )
    )
    return RolloutGroup(question_id=example.question_id, rollouts=list(rollouts))


def completion_seed(seed: int, rollout_id: str, turn: int) -> int:
    """Seed of one completion, 63 bits: the same whatever else runs, and in every process."""
    digest = hashlib.sha256(f"{seed}/{rollout_id}/{turn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Driver:
    """One rollout."""

    env_maker: Callable[[], Env]
    generate: GenerateFn
    codec: Codec
    sampling: SamplingParams
    rollout_id: str
    seed: int
    max_turns: int

    async def run(self) -> Rollout:
        turns: list[Turn] = []
        try:
            return await self._run(turns)
        except GradingError as error:
            return self._failed(RolloutStatus.GRADING_ERROR, turns, error)
        except Exception as error:
            return self._failed(RolloutStatus.GENERATION_ERROR, [], error)

    async def _run(self, turns: list[Turn]) -> Rollout:
        """Fill ``turns`` until the environment is done.

        Raises:
            GradingError: If the environment failed on an answer.
            Exception: Whatever kept a completion from being made.
        """
        env = self.env_maker()
        added_ids = self.codec.render(env.reset())
        context: list[int] = []
        reward = 0.0
        for index in range(self.max_turns):
            context = context + added_ids
            completion = await self._complete(context, index)
            turns.append(Turn(prompt_ids=added_ids, completion=completion))
            context = context + completion.token_ids
            answer = self._decode(completion)
            outcome = _graded_step(env, answer)
            reward += outcome.reward
            if outcome.is_done:
                return self._completed(turns, answer, reward)
            if self.codec.render_reply is None:
                raise GenerationError(
                    "an environment with several turns needs Codec.render_reply; it is None"
                )
            added_ids = self.codec.render_reply(outcome.messages)
        raise GenerationError(f"the environment must end within {self.max_turns} turns")

    async def _complete(self, context: list[int], turn: int) -> Completion:
        sampling = replace(self.sampling, seed=completion_seed(self.seed, self.rollout_id, turn))
        completion = await self.generate(context, sampling)
        if completion.finish_reason == "abort":
            raise GenerationError("the generator cut the completion off (finish_reason=abort)")
        return completion

    def _decode(self, completion: Completion) -> str:
        return self.codec.decode(completion.token_ids).strip()

    def _completed(self, turns: list[Turn], answer: str, reward: float) -> Rollout:
        return Rollout(
            rollout_id=self.rollout_id,
            turns=turns,
            answer=answer,
            reward=reward,
            status=RolloutStatus.COMPLETED,
            policy_version=turns[0].completion.policy_version,
        )

    def _failed(self, status: RolloutStatus, turns: list[Turn], error: Exception) -> Rollout:
        logger.warning("rollout %s: %s: %s", self.rollout_id, status, error)
        return Rollout(
            rollout_id=self.rollout_id,
            turns=turns,
            answer=self._decode(turns[-1].completion) if turns else "",
            reward=None,
            status=status,
            policy_version=turns[0].completion.policy_version if turns else -1,
            error=f"{type(error).__name__}: {error}",
        )


def _graded_step(env: Env, answer: str) -> EnvStep:
    """Step the environment; whatever it raises is a grading error, and so is a reward of nan."""
    try:
        outcome = env.step(answer)
    except Exception as error:
        raise GradingError(f"{type(error).__name__}: {error}") from error
    if not math.isfinite(outcome.reward):
        raise GradingError(f"a reward must be a finite number, found {outcome.reward}")
    return outcome
