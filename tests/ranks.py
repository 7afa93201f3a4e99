"""Ranks of a torch process group as processes of their own, without Ray."""

import os
import socket
import sys
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from past_ray.engine.sharding import init_process_group


def run_ranks(function: Callable[..., None], world_size: int, *arguments: object) -> None:
    """Call ``function(rank, world_size, *arguments)`` in every rank of a gloo group."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mp.spawn(_run_rank, args=(function, world_size, port, arguments), nprocs=world_size)


def _run_rank(
    rank: int, function: Callable[..., None], world_size: int, port: int, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    init_process_group(
        rank=rank,
        world_size=world_size,
        master_addr="127.0.0.1",
        master_port=port,
        backend="gloo",
    )
    function(rank, world_size, *arguments)
    if world_size > 1:
        # A rank that closes its connections while another still reads aborts the other.
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the group that still run when the interpreter is torn down abort the process.
    os._exit(0)
