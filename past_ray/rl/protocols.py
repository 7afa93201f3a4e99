"""The seams between algorithm, engines and cluster."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from past_ray.rl.adapter_weights import AdapterWeights
from past_ray.rl.generator_stats import GeneratorStats
from past_ray.rl.objective import StepTotals
from past_ray.rl.types import Completion, SamplingParams, TrainSample

GenerateFn = Callable[[list[int], SamplingParams], Awaitable[Completion]]
"""One prompt in, one completion out: all that an environment driver knows of generation."""


class Generator(Protocol):
    """Samples completions with the weights it was last given."""

    @property
    def policy_version(self) -> int:
        """Version of the weights in use; -1 before the first update."""
        ...

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete every prompt; blocks. Calls from several threads are batched together."""
        ...

    def update_weights(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        """Replace all weights between two decoding steps and forget every cached prefix.

        An adapter that was in use is dropped.

        Raises:
            ClusterError: If a parameter was not reached.
        """
        ...

    def load_adapter(self, adapter: AdapterWeights, policy_version: int) -> None:
        """Sample with an adapter on the weights that were last given in full.

        Raises:
            ClusterError: If the adapter is not in use afterwards.
        """
        ...

    def probe(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams], policy_version: int
    ) -> list[Completion]:
        """Complete fixed prompts right after a sync, whose parts are checked on the way.

        Raises:
            ParityError: Naming the part of the sync that did not happen.
        """
        ...

    def stats(self) -> GeneratorStats:
        """Return counters, without waiting for the engine."""
        ...

    def sleep(self) -> None:
        """Give the GPU's memory away, once nothing is in flight."""
        ...

    def wake_up(self) -> None:
        """Take memory for weights again; the next sync brings them."""
        ...

    def close(self) -> None:
        """Free the engine."""
        ...


class Learner(Protocol):
    """Holds the policy in fp32 and applies gradients."""

    @property
    def policy_version(self) -> int:
        """Optimizer steps behind the weights held."""
        ...

    def train_step(self, samples: Sequence[TrainSample], *, totals: StepTotals) -> dict[str, float]:
        """One optimizer step on this rank's samples; ``totals`` counts all ranks'."""
        ...

    def token_logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """Log-probabilities of each sample's tokens, length T; position 0 is 0."""
        ...

    def export_weights(self) -> dict[str, Tensor]:
        """Full fp32 weights under Hugging Face names, a tied head once."""
        ...

    def export_adapter(self) -> AdapterWeights | None:
        """The adapter alone, where one is trained."""
        ...

    def save(self, folder: Path, *, extra_files: Mapping[str, bytes] | None = None) -> None:
        """Write all that ``load`` needs to continue exactly, and a run's own files, atomically."""
        ...
