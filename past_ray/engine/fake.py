"""Generator and learner without a model: for tests, and for trying a task or a loop.

Both keep the contracts of ``past_ray.rl.protocols`` and are deterministic.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from past_ray.engine.busy_clock import BusyClock
from past_ray.engine.generator_checks import PromptLimits, check_prompts, check_version
from past_ray.errors import ClusterError
from past_ray.rl.adapter_weights import AdapterWeights
from past_ray.rl.generator_stats import GeneratorStats
from past_ray.rl.objective import StepTotals
from past_ray.rl.types import Completion, SamplingParams, TrainSample

Respond = Callable[[list[int], SamplingParams], list[int]]
"""Prompt and sampling in, the tokens of the completion out."""

FAKE_WEIGHT = "fake.weight"
"""Name of the one weight that ``FakeLearner`` holds."""

STATE_FILE = "fake_learner.json"
"""What ``FakeLearner.save`` writes."""


def scripted(answers: Sequence[Sequence[int]]) -> Respond:
    """Answer with ``answers[seed % len(answers)]``, so a rollout's seed decides.

    Without a seed the first answer is given, as a greedy policy always answers the same.
    """

    def respond(prompt: list[int], sampling: SamplingParams) -> list[int]:
        del prompt
        return list(answers[(sampling.seed or 0) % len(answers)])

    return respond


class FakeGenerator:
    """Answers by a function; see ``past_ray.rl.protocols.Generator``.

    Answers longer than ``max_new_tokens`` are cut and finish by ``length``, as a real engine would.
    """

    def __init__(
        self,
        respond: Respond,
        *,
        logprob: float = -0.5,
        max_model_len: int = 1_000_000,
        vocab_size: int = 1_000_000,
    ) -> None:
        """Keep the function.

        Args:
            respond: Makes the completions.
            logprob: Log-probability given to every token.
            max_model_len: Longest prompt plus completion.
            vocab_size: Token ids end below this.
        """
        self._respond = respond
        self._logprob = logprob
        self._limits = PromptLimits(max_model_len=max_model_len, vocab_size=vocab_size)
        self._policy_version = -1
        self._lock = threading.Lock()
        self._is_closed = False
        self._clock = BusyClock()
        self._num_requests = 0
        self.weights: dict[str, Tensor] = {}
        """The weights it was last given."""

        self.adapter: AdapterWeights | None = None
        """The adapter in use."""

        self.is_asleep = False
        """Between ``sleep`` and ``wake_up`` nothing is answered."""

    @property
    def policy_version(self) -> int:
        """Version it was last given; -1 before the first update."""
        return self._policy_version

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        """Answer every prompt.

        Raises:
            GenerationError: If a prompt does not fit.
            ClusterError: If the generator is closed.
        """
        check_prompts(prompts, sampling, self._limits)
        with self._lock:
            self._check_open()
            self._clock.open(len(prompts))
            try:
                return [
                    self._completion(list(prompt), params)
                    for prompt, params in zip(prompts, sampling, strict=True)
                ]
            finally:
                self._clock.close(len(prompts))
                self._num_requests += len(prompts)

    def update_weights(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        """Keep the weights and their version."""
        with self._lock:
            self._check_open()
            self.weights, self.adapter = dict(weights), None
            self._policy_version = policy_version

    def load_adapter(self, adapter: AdapterWeights, policy_version: int) -> None:
        """Keep the adapter and its version."""
        with self._lock:
            self._check_open()
            self.adapter = adapter
            self._policy_version = policy_version

    def probe(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams], policy_version: int
    ) -> list[Completion]:
        """Answer if the version is the one it was last given.

        Raises:
            ParityError: If it is not.
        """
        check_version(self._policy_version, policy_version)
        return self.generate(prompts, sampling)

    def stats(self) -> GeneratorStats:
        """Return what it counted."""
        return GeneratorStats(
            policy_version=self._policy_version,
            busy_s=self._clock.seconds,
            num_requests=self._num_requests,
            num_in_flight=self._clock.num_open,
        )

    def sleep(self) -> None:
        """Answer nothing until it is woken up."""
        with self._lock:
            self.is_asleep = True

    def wake_up(self) -> None:
        """Answer again."""
        with self._lock:
            self.is_asleep = False

    def close(self) -> None:
        """Refuse all later calls."""
        with self._lock:
            self._is_closed = True

    def _completion(self, prompt: list[int], params: SamplingParams) -> Completion:
        answer = self._respond(prompt, params)
        token_ids = answer[: params.max_new_tokens]
        return Completion(
            token_ids=token_ids,
            logprobs=[self._logprob] * len(token_ids),
            finish_reason="stop" if len(token_ids) == len(answer) else "length",
            policy_version=self._policy_version,
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClusterError("the generator must be open; close() was called")
        if self.is_asleep:
            raise ClusterError("the generator must be awake; call wake_up() first")


class FakeLearner:
    """One number that grows by the mean advantage; see ``past_ray.rl.protocols.Learner``.

    Its log-probabilities are the generator's, so a parity probe finds no gap.
    """

    def __init__(self, *, value: float = 0.0, policy_version: int = 0) -> None:
        """Start at ``value`` with ``policy_version`` steps behind it."""
        self._value = value
        self._policy_version = policy_version

    @property
    def policy_version(self) -> int:
        """Steps taken."""
        return self._policy_version

    def train_step(self, samples: Sequence[TrainSample], *, totals: StepTotals) -> dict[str, float]:
        """Add the advantages of all loss tokens, divided by the number of such tokens."""
        total = sum(
            advantage
            for sample in samples
            for advantage, is_loss in zip(sample.advantages, sample.loss_mask, strict=True)
            if is_loss
        )
        self._value += total / totals.num_loss_tokens
        self._policy_version += 1
        return {"loss": -total / totals.num_loss_tokens}

    def token_logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """Return the generator's own log-probabilities."""
        return [list(sample.generator_logprobs) for sample in samples]

    def export_weights(self) -> dict[str, Tensor]:
        """Return the number as a tensor of one element."""
        return {FAKE_WEIGHT: torch.tensor([self._value], dtype=torch.float32)}

    def export_adapter(self) -> None:
        """Return None: it trains no adapter."""

    def save(self, folder: Path, *, extra_files: Mapping[str, bytes] | None = None) -> None:
        """Write the number, the version and the caller's own files."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (extra_files or {}).items():
            (folder / name).write_bytes(content)
        state = {"value": self._value, "policy_version": self._policy_version}
        (folder / STATE_FILE).write_text(json.dumps(state))

    @classmethod
    def load(cls, folder: Path) -> "FakeLearner":
        """Continue from what ``save`` wrote."""
        state = json.loads((folder / STATE_FILE).read_text())
        return cls(value=state["value"], policy_version=state["policy_version"])
