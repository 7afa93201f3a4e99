"""The seams between algorithm, engines and cluster."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

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

        Raises:
            ClusterError: If a parameter was not reached.
        """
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

    def train_step(
        self, samples: Sequence[TrainSample], *, num_loss_tokens: int
    ) -> dict[str, float]:
        """One optimizer step on this rank's samples; ``num_loss_tokens`` counts all ranks'."""
        ...

    def token_logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """Log-probabilities of each sample's tokens, length T; position 0 is 0."""
        ...

    def export_weights(self) -> dict[str, Tensor]:
        """Full fp32 weights under Hugging Face names, a tied head once."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights, optimizer state and version so that ``load`` continues exactly."""
        ...
