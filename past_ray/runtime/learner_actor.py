"""The learner as a Ray actor: one process per FSDP rank, forwarding to ``GRPOLearner``."""

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from past_ray.config.rl import RLConfig
from past_ray.engine.learner import GRPOLearner
from past_ray.engine.sharding import init_process_group
from past_ray.engine.shared_weights import SharedWeights
from past_ray.rl.adapter_weights import AdapterWeights
from past_ray.rl.objective import StepTotals
from past_ray.rl.types import TrainSample
from past_ray.runtime.nccl_sync import IPCSender, NCCLSender


class LearnerShell:
    """What runs inside the actor process. Every method but the address is collective."""

    def __init__(self, config: RLConfig, *, rank: int, world_size: int) -> None:
        """Store the settings; ``setup`` and ``load`` do the work.

        Args:
            config: Settings of the algorithm.
            rank: This learner, from 0.
            world_size: Learners in all.
        """
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._sender: NCCLSender | IPCSender | None = None

    def rendezvous_address(self) -> tuple[str, int]:
        """Return this node's address and a port that is free on it, for rank 0 to listen on."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def setup(self, address: tuple[str, int], backend: str) -> None:
        """Join the other ranks.

        Args:
            address: ``rendezvous_address`` of rank 0.
            backend: ``gloo`` computes on CPU, ``nccl`` on this process's GPU.
        """
        master_addr, master_port = address
        init_process_group(
            rank=self._rank,
            world_size=self._world_size,
            master_addr=master_addr,
            master_port=master_port,
            backend=backend,
        )
        self._learner = GRPOLearner(self._config, device="cuda" if backend == "nccl" else "cpu")

    def ping(self) -> None:
        """Answer a heartbeat; runs beside the thread that works."""

    def load(self, checkpoint: Path, *, reference: Path | None, resume_from: Path | None) -> int:
        """Load a checkpoint or continue a run; return the policy version."""
        return self._learner.load(checkpoint, reference=reference, resume_from=resume_from)

    def train_step(self, samples: Sequence[TrainSample], *, totals: StepTotals) -> dict[str, float]:
        """Take one optimizer step on this rank's samples; metrics are those of all ranks."""
        return self._learner.train_step(samples, totals=totals)

    def token_logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """Score samples with the current weights."""
        return self._learner.token_logprobs(samples)

    def logprob_gap(self, samples: Sequence[TrainSample]) -> float:
        """Return the largest difference to the generator's log-probabilities, in nats."""
        return self._learner.logprob_gap(samples)

    def export_weights(self) -> SharedWeights:
        """Return all weights on rank 0, nothing on the others; Ray makes the only copy."""
        return SharedWeights(self._learner.export_weights(copy=False))

    def export_adapter(self) -> AdapterWeights | None:
        """Return the adapter on rank 0 of a LoRA run, else None."""
        return self._learner.export_adapter()

    def open_sender(
        self, generators: Sequence[Any], workers_per_generator: int, transfer: str
    ) -> None:
        """Meet the generators for ``nccl``, where rank 0 sends, or ``ipc``, where every rank does.

        Not run on a GPU yet.
        """
        if transfer == "ipc":
            self._sender = IPCSender(generators, rank=self._rank)
        elif self._rank == 0:
            address, port = self.rendezvous_address()
            self._sender = NCCLSender(
                generators, workers_per_generator=workers_per_generator, address=address, port=port
            )

    def send_weights(self, policy_version: int, weights: Mapping[str, Tensor] | None) -> None:
        """Send all weights past the object store: those given, or with None the policy's own."""
        if weights is None:
            weights = self._learner.export_weights()
        if self._sender is not None:
            self._sender.send(weights, policy_version)

    def save(self, folder: Path, *, extra_files: Mapping[str, bytes] | None = None) -> None:
        """Write what ``load(resume_from=folder)`` needs, and a run's own files beside it."""
        self._learner.save(folder, extra_files=extra_files)


LearnerActor = ray.remote(LearnerShell)
