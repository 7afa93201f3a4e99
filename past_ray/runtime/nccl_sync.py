"""Weight sync over vLLM's own engines, past the object store: ``nccl`` and ``ipc``.

::

    nccl   learner rank 0 --broadcast--> all workers of all generators, each on its own GPU
    ipc    learner rank i --CUDA IPC---> generator i, which shares its GPU (``colocate``)

Both follow vLLM's interface and need GPUs; they have not been run on any.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from torch import Tensor


class NCCLSender:
    """The sending side, inside learner rank 0."""

    def __init__(
        self,
        generators: Sequence[Any],
        *,
        workers_per_generator: int,
        address: str,
        port: int,
    ) -> None:
        """Meet all generators in one NCCL group; blocks until every one has joined.

        Args:
            generators: Handles of ``GeneratorActor``.
            workers_per_generator: GPUs of one engine.
            address: Of this node.
            port: Free on it.
        """
        from past_ray.engine.weight_transfer import StateDictSource, open_nccl_sender

        self._client = NCCLSyncClient(generators, workers_per_generator=workers_per_generator)
        self._source = StateDictSource()
        self._sender = open_nccl_sender(
            self._source,
            client=self._client,
            address=address,
            port=port,
            world_size=1 + len(generators) * workers_per_generator,
        )

    def send(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        """Broadcast ``weights``; returns when every generator has them in use."""
        self._source.weights = weights
        self._client.policy_version = policy_version
        self._sender.send_weights()


class IPCSender:
    """The sending side of one learner rank; all ranks send together."""

    def __init__(self, generators: Sequence[Any], *, rank: int) -> None:
        """Announce the transfer to all generators; generator ``i`` is on the GPU of rank ``i``."""
        from past_ray.engine.weight_transfer import BroadcastSource, open_ipc_sender

        self._client = NCCLSyncClient(generators, workers_per_generator=1)
        self._source = BroadcastSource()
        self._sender = open_ipc_sender(self._source, client=self._client, rank=rank)

    def send(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        """Share ``weights``, those of rank 0; returns when every generator has them in use."""
        self._source.weights = weights
        self._client.policy_version = policy_version
        self._sender.send_weights()


class NCCLSyncClient:
    """Control plane of vLLM's senders for several generator actors.

    Structurally vLLM's ``VLLMWeightSyncClient``. Each generator is an engine of its own, so each
    gets its own ranks in the group.
    """

    def __init__(self, generators: Sequence[Any], *, workers_per_generator: int) -> None:
        """Keep the handles.

        Args:
            generators: Handles of ``GeneratorActor``.
            workers_per_generator: GPUs of one engine.
        """
        self._generators = list(generators)
        self._workers_per_generator = workers_per_generator
        self.policy_version = -1
        """Version of the weights that the next ``send_weights`` sends; set it before."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every generator join; over NCCL behind the ranks of the one before it."""
        if "rank_offset" not in init_info:
            ray.get([g.join_transfer_group.remote(init_info) for g in self._generators])
            return
        first_rank = int(init_info["rank_offset"])
        ray.get(
            [
                generator.join_transfer_group.remote(
                    {**init_info, "rank_offset": first_rank + index * self._workers_per_generator}
                )
                for index, generator in enumerate(self._generators)
            ]
        )

    def start_weight_update(self) -> None:
        """Nothing to do: ``receive_weights`` starts and finishes on the engine's own thread."""

    def update_weights(self, update_info: Any) -> None:  # noqa: ANN401 - vLLM's payload
        """Let every generator receive; returns when all have the new weights in use."""
        ray.get(
            [
                generator.receive_weights.remote(dict(update_info), self.policy_version)
                for generator in self._generators
            ]
        )

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing to do, see ``start_weight_update``."""
