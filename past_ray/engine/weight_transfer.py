"""Engines of vLLM's weight-transfer protocol.

``past_ray_in_process`` is ours: the tensors are handed over as they are, in the generator's own
process, so it needs no second communicator and works on any device. How they got into the process
(Ray's object store) is not its business.

For NCCL and CUDA IPC nothing of ours runs inside vLLM: its ``nccl`` and ``ipc`` engines receive,
and ``open_nccl_sender`` and ``open_ipc_sender`` open the sending side in the learners. These paths
need GPUs and have not been run on any.

vLLM calls ``register`` in every process it starts, through the entry-point group
``vllm.general_plugins``.

Importing this module imports vLLM.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer import (
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightTransferEngine,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from past_ray.engine.generator_checks import check_weight_names, check_weight_shapes, is_tied
from past_ray.engine.vllm_direct_load import can_load_directly, load_directly, repack_tied_head
from past_ray.engine.vllm_weight_plan import (
    TIED_HEAD,
    checkpoint_shapes,
    missed_weights,
    remember_samples,
    weight_places,
)

IN_PROCESS = "past_ray_in_process"
"""Name under which ``InProcessWeightTransferEngine`` is registered."""


@dataclass
class InProcessInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class InProcessUpdateInfo(WeightTransferUpdateInfo):
    """All weights of one sync."""

    weights: Mapping[str, Tensor]
    """Full tensors under Hugging Face names, on any device, in any float dtype."""


class InProcessWeightTransferEngine(WeightTransferEngine[InProcessInitInfo, InProcessUpdateInfo]):
    """Loads tensors of its own process, a whole checkpoint per update.

    Names and shapes are checked before the model is touched, so a refused update leaves the old
    weights in use. An error after that leaves a model that must not be sampled from.
    """

    init_info_cls = InProcessInitInfo
    update_info_cls = InProcessUpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InProcessInitInfo) -> None:
        """Do nothing: there is no peer."""

    def start_weight_update(self) -> None:
        """Do nothing yet: ``receive_weights`` checks the names first."""
        self._is_reloading = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one checkpoint; waits for the accelerator only where there is one."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: InProcessUpdateInfo) -> None:
        """Load ``update_info.weights``.

        Raises:
            ClusterError: If a parameter is missing from the update or has another shape; the old
                weights stay in use.
            RuntimeError: If vLLM's loader left a parameter out; the model is then unusable.
        """
        weights, places = update_info.weights, weight_places(self.model)
        check_weight_names(weights, places)
        expected = checkpoint_shapes(places)
        check_weight_shapes({name: weights[name].shape for name in expected}, expected)
        if can_load_directly(self.model):
            load_directly(self.model, weights, places)
        else:
            self._reload(weights)
        remember_samples(self.model, weights)

    def finish_weight_update(self) -> None:
        """Repack what vLLM's loader loaded and put it into the tensors that the kernels use."""
        if self._is_reloading:
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu" and is_tied(getattr(self.model, "config", None)):
                repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Nothing is held."""

    def _reload(self, weights: Mapping[str, Tensor]) -> None:
        """Load through the model's own loaders, which know every architecture."""
        own_names = {_plain(name) for name, _ in self.model.named_parameters()}
        if is_tied(getattr(self.model, "config", None)):
            own_names -= {TIED_HEAD}
        # Outside of a layerwise reload, loading fails on layers whose weights vLLM has repacked.
        initialize_layerwise_reload(self.model)
        self._is_reloading = True
        model: Any = self.model
        reached = model.load_weights(iter(weights.items()))
        if missed := sorted(own_names - {_plain(name) for name in reached}):
            raise RuntimeError(
                f"vLLM must load every parameter of a weight sync; its loader left out {missed}. "
                "This architecture cannot be synced; use backend=transformers."
            )


class WorkerExtension:
    """Methods added to vLLM's workers; reachable by ``collective_rpc``."""

    def past_ray_checkpoint_shapes(self: Any) -> dict[str, tuple[int, ...]]:
        """Hugging Face name and shape of every tensor that a full update must hold."""
        return checkpoint_shapes(weight_places(self.get_model()))

    def past_ray_missed_weights(self: Any) -> list[str]:
        """Names of the tensors of the last update that the model does not use."""
        return missed_weights(self.get_model())


@functools.cache
def register() -> None:
    """Make ``past_ray_in_process`` known to this process; safe to call again."""
    WeightTransferEngineFactory.register_engine(IN_PROCESS, InProcessWeightTransferEngine)


class StateDictSource(WeightSource):
    """Weights of the next sync, handed over as a state dict. Has not been run on a GPU."""

    def __init__(self) -> None:
        """Start without weights."""
        self.weights: Mapping[str, Tensor] = {}
        """What the next ``send_weights`` sends; set it before."""

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and shapes, in the order of sending."""
        return [
            ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in self.weights.items()
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Move one tensor after the other to this process's GPU."""
        for name, value in self.weights.items():
            yield name, value.cuda()


class BroadcastSource(StateDictSource):
    """Weights of rank 0 on the GPU of every rank, which CUDA IPC needs. Has not been run.

    Only rank 0 has to set ``weights``.
    """

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and shapes, as rank 0 has them."""
        described: list[Any] = [super().metadata()]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(described, src=0)
        return described[0]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Broadcast one tensor after the other."""
        is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        for meta in self.metadata():
            if is_alone or dist.get_rank() == 0:
                tensor = self.weights[meta.name].cuda()
            else:
                tensor = torch.empty(meta.shape, dtype=meta.dtype, device="cuda")
            if not is_alone:
                dist.broadcast(tensor, src=0)
            yield meta.name, tensor


def open_ipc_sender(
    source: BroadcastSource, *, client: VLLMWeightSyncClient, rank: int
) -> TrainerWeightTransferEngine[Any]:
    """Open one rank's sending side of vLLM's CUDA IPC engine.

    The handles of all ranks reach every generator, and each takes those of its own GPU. They are
    sent at once (not packed): a generator loads one checkpoint per update.
    """
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return WeightTransferTrainerFactory.trainer_init(
        IPCTrainerInitInfo(rank=rank, packed=False), client=client, source=source
    )


def open_nccl_sender(
    source: StateDictSource,
    *,
    client: VLLMWeightSyncClient,
    address: str,
    port: int,
    world_size: int,
) -> TrainerWeightTransferEngine[Any]:
    """Open the sending side of vLLM's NCCL engine; for one process, the group's rank 0.

    Args:
        source: Where the weights of each sync will be.
        client: The control plane of all generators.
        address: Where this process listens for the rendezvous.
        port: Its port.
        world_size: 1 (the sender) plus all workers of all generators.

    Returns:
        vLLM's sender; ``send_weights()`` is one sync.
    """
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return WeightTransferTrainerFactory.trainer_init(
        NCCLTrainerInitInfo(
            master_address=address, master_port=port, world_size=world_size, rank=0
        ),
        client=client,
        source=source,
    )


def _plain(name: str) -> str:
    """Return a parameter's name without vLLM's wrapper for adapters."""
    return name.replace(".base_layer", "")
