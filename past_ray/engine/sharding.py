"""One sharded code path for one rank or many, on CPU (gloo) or CUDA (NCCL).

With several ranks a model is sharded by FSDP2 (``fully_shard``): each rank owns a slice of every
parameter and of its optimizer state, and layers are gathered as they are needed. With one rank
nothing is wrapped, and every function here does the same thing to the plain model.

Every function is collective: all ranks call it, in the same order.

FSDP averages gradients over ranks. A loss that is a *sum* over its own tokens divided by a global
count must therefore be multiplied by ``world_size`` before ``backward``.

A full state (weights or optimizer) is complete on rank 0 and an empty dict on the others, when it
is gathered and when it is loaded.
"""

import copy
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

ModelT = TypeVar("ModelT", bound=nn.Module)
ValueT = TypeVar("ValueT")

COLLECTIVE_TIMEOUT_S = 1800.0
"""How long a rank waits for the others; rank 0 alone may be saving a large checkpoint."""


def init_process_group(
    *, rank: int, world_size: int, master_addr: str, master_port: int, backend: str
) -> None:
    """Join the ranks of one model. Does nothing for one rank, which needs no collectives.

    Args:
        rank: This process, from 0.
        world_size: Processes in all.
        master_addr: Host on which rank 0 listens.
        master_port: Free port on that host, the same for all ranks.
        backend: ``gloo`` for CPU tensors, ``nccl`` for CUDA tensors.
    """
    if world_size == 1:
        return
    dist.init_process_group(
        backend=backend,
        init_method=f"tcp://{master_addr}:{master_port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )


def get_world_size() -> int:
    """Return the number of ranks; 1 where no process group exists."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """Return this process's rank; 0 where no process group exists."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(value: float) -> float:
    """Return the sum of one number over all ranks."""
    return _reduce(value, dist.ReduceOp.SUM)


def max_over_ranks(value: float) -> float:
    """Return the largest of one number over all ranks."""
    return _reduce(value, dist.ReduceOp.MAX)


def gather_over_ranks(value: ValueT) -> list[ValueT]:
    """Return the value of every rank, in rank order."""
    if get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def _reduce(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    if get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    result = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(result, op=operation)
    return float(result.item())


def shard_model(model: ModelT) -> ModelT:
    """Shard each transformer layer, then what is left (embeddings, head), over all ranks.

    Args:
        model: A transformers model, or a PEFT model around one, on its final device.

    Returns:
        The same object; unchanged with one rank.
    """
    if get_world_size() == 1:
        return model
    device_type = next(model.parameters()).device.type
    mesh = init_device_mesh(device_type, (get_world_size(),))
    layer_classes = set(cast("list[str]", model._no_split_modules or ()))
    for module in model.modules():
        if type(module).__name__ in layer_classes:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def full_state_dict(
    model: nn.Module, *, trainable_only: bool = False, copy: bool = True
) -> dict[str, Tensor]:
    """Return all weights in float32 on CPU; empty on ranks other than 0.

    A parameter that the model uses under two names (a tied head) appears once, under the first.

    Args:
        model: The model, sharded or not.
        trainable_only: Leave out frozen parameters, such as those under an adapter.
        copy: The result does not change when training goes on. Without it, tensors that are
            whole, on CPU and float32 already are the model's own.
    """
    options = StateDictOptions(
        full_state_dict=True,
        cpu_offload=get_world_size() > 1,
        ignore_frozen_params=trainable_only,
    )
    gathered = cast("dict[str, Tensor]", get_model_state_dict(model, options=options))
    if get_rank() != 0:
        return {}
    aliases = _alias_names(model)
    weights: dict[str, Tensor] = {}
    for name, tensor in gathered.items():
        if name not in aliases:
            taken = tensor.detach().to(device="cpu", dtype=torch.float32, copy=copy)
            weights[name] = taken.contiguous()
    return weights


def load_full_state_dict(
    model: nn.Module, weights: dict[str, Tensor], *, trainable_only: bool = False
) -> None:
    """Copy weights from ``full_state_dict`` into a model of the same architecture.

    Args:
        model: The model, sharded or not.
        weights: All weights on rank 0; ignored elsewhere.
        trainable_only: ``weights`` came from ``full_state_dict(trainable_only=True)``; frozen
            parameters keep their values.

    Raises:
        RuntimeError: A parameter of the model is missing, or one is unknown to it.
    """
    complete: dict[str, Any] = dict(weights)
    for alias, name in _alias_names(model).items():
        if name in complete:
            complete[alias] = complete[name]
    options = _load_options()
    options.strict = not trainable_only
    result = set_model_state_dict(model, complete, options=options)
    unknown = list(result.unexpected_keys)
    if unknown:
        raise RuntimeError(f"Every weight must belong to the model, found {unknown[:3]}.")


def clip_grad_norm(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients down to a global L2 norm of ``max_norm``.

    Returns:
        The norm over all parameters and ranks before clipping.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return float(norm.item())


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Copy the optimizer's state to CPU by parameter name; empty on ranks other than 0.

    The copy does not change when training goes on.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restore what ``optimizer_state`` gathered, over any number of ranks.

    Args:
        model: The model whose parameters ``optimizer`` holds.
        optimizer: A fresh optimizer.
        state: The whole state on rank 0; ignored elsewhere. The optimizer takes over its tensors.
    """
    set_optimizer_state_dict(model, optimizer, state, options=_load_options())


def _load_options() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=get_world_size() > 1)


def _alias_names(model: nn.Module) -> dict[str, str]:
    """Map every further name of a parameter to its first name."""
    first_names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if first != name:
            aliases[name] = first
    return aliases
