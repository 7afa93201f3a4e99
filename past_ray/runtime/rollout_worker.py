"""Drives environments and asks generator actors for completions.

Every rollout is a coroutine of one event loop. The prompts that they hand in during one tick of
the loop leave as one call per generator, so 192 single-turn rollouts cost each generator one call.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.envs.rollout import Codec, run_group
from past_ray.errors import ConfigError
from past_ray.rl.types import Completion, RolloutGroup, SamplingParams
from past_ray.tasks.examples import Message, QAExample
from past_ray.tasks.grading import GRADERS

GeneratorHandle = Any
"""A handle of ``GeneratorActor``; Ray types it as Any."""


class RolloutWorkerShell:
    """What runs inside the actor process."""

    def __init__(
        self, tokenizer_folder: Path, generators: Sequence[GeneratorHandle], *, reward: str
    ) -> None:
        """Store the settings; ``setup`` loads the tokenizer.

        Args:
            tokenizer_folder: Hugging Face folder whose tokenizer has a chat template.
            generators: Handles of ``GeneratorActor``; prompts are spread over them in turn.
            reward: Name of the grader in ``tasks.grading.GRADERS``.

        Raises:
            ConfigError: If there is no such grader.
        """
        graders = {str(name): grader for name, grader in GRADERS.items()}
        if reward not in graders:
            raise ConfigError(f"reward must be one of {sorted(graders)}, found {reward!r}")
        self._grade = graders[reward]
        self._tokenizer_folder = tokenizer_folder
        self._generators = generators
        self._codec: Codec | None = None

    def setup(self) -> None:
        """Load the tokenizer.

        Raises:
            ConfigError: If it has no chat template.
        """
        self._codec = chat_codec(AutoTokenizer.from_pretrained(self._tokenizer_folder))

    async def collect(
        self,
        examples: Sequence[QAExample],
        *,
        group_size: int,
        sampling: SamplingParams,
        step: int,
        seed: int,
    ) -> list[RolloutGroup]:
        """Roll every example out ``group_size`` times; groups come in the order of ``examples``.

        An evaluation is the same with ``group_size=1`` and temperature 0.
        """
        if self._codec is None:
            self.setup()
        assert self._codec is not None
        codec = self._codec
        # A new one per call: what is sampled depends on the call alone, also after a restart.
        batcher = GenerateBatcher(self._generators)
        return await asyncio.gather(
            *(
                run_group(
                    example,
                    make_env=lambda example: ClosedBookQA(example, self._grade),
                    generate=batcher.generate,
                    codec=codec,
                    group_size=group_size,
                    sampling=sampling,
                    seed=seed,
                    step=step,
                )
                for example in examples
            )
        )


RolloutWorkerActor = ray.remote(RolloutWorkerShell)


class GenerateBatcher:
    """Joins the prompts of one event-loop tick into one call per generator.

    ``generate`` waits for the call that its prompt left with; it is unblocked when that generator
    has completed all prompts of the call.
    """

    def __init__(self, generators: Sequence[GeneratorHandle]) -> None:
        """Keep the actor handles, at least one."""
        if not generators:
            raise ConfigError("a rollout worker needs at least one generator, found none")
        self._generators = list(generators)
        self._next_generator = 0
        self._waiting: list[tuple[list[int], SamplingParams, asyncio.Future[Completion]]] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def generate(self, prompt: list[int], sampling: SamplingParams) -> Completion:
        """Complete one prompt.

        Raises:
            GenerationError: If the generator could not complete this prompt.
            Exception: Whatever the call to the actor raised.
        """
        loop = asyncio.get_running_loop()
        if not self._waiting:
            # Runs after every coroutine that is ready now has handed in its prompt.
            loop.call_soon(self._flush)
        future: asyncio.Future[Completion] = loop.create_future()
        self._waiting.append((prompt, sampling, future))
        return await future

    def _flush(self) -> None:
        """Deal the waiting prompts round, starting after the generator that got the last one."""
        waiting, self._waiting = self._waiting, []
        num_generators = len(self._generators)
        for offset in range(min(num_generators, len(waiting))):
            index = (self._next_generator + offset) % num_generators
            call = asyncio.ensure_future(
                self._call(self._generators[index], waiting[offset::num_generators])
            )
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        self._next_generator = (self._next_generator + len(waiting)) % num_generators

    async def _call(
        self,
        generator: GeneratorHandle,
        requests: list[tuple[list[int], SamplingParams, "asyncio.Future[Completion]"]],
    ) -> None:
        prompts = [prompt for prompt, _, _ in requests]
        sampling = [params for _, params, _ in requests]
        outcomes: list[Completion | Exception]
        try:
            outcomes = await generator.generate_each.remote(prompts, sampling)
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


def chat_codec(tokenizer: PreTrainedTokenizerBase) -> Codec:
    """Render messages by the tokenizer's chat template and decode without special tokens.

    Raises:
        ConfigError: If the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer in {tokenizer.name_or_path} must have a chat template; it has none. "
            "Save one with the model: tokenizer.chat_template = ..."
        )

    def render(messages: Sequence[Message]) -> list[int]:
        token_ids: Any = tokenizer.apply_chat_template(
            [{"role": message["role"], "content": message["content"]} for message in messages],
            add_generation_prompt=True,
            return_dict=False,
        )
        return list(token_ids)

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    return Codec(render=render, decode=decode)
