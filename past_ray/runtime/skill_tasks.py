"""Shards of a skill operation as Ray tasks: one file of the result per task.

::

    driver   plan shards -- ShardTask --> task 1   read, compute, write model-00001-of-00003
                                          task 2   read, compute, write model-00002-of-00003
             totals <-- digests, norms -- task 3   ...

The nodes must see the folders: NFS or another shared disk, or an object store. Weights never travel
through Ray: tasks go out once for all nodes, digests, sums and corrections come back.
"""

import logging
import os
import socket
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.exceptions import RayError, RayTaskError

from past_ray.errors import ClusterError, PastRayError
from past_ray.runtime.cluster import own_ray
from past_ray.skill.blocks import TensorTotals
from past_ray.skill.stream import RunShards, ShardTask

MAX_RETRIES = 3
"""A task whose node dies is run again; it overwrites what the first try left."""

CONNECT_TIMEOUT_S = 5.0
"""Ray itself waits for minutes where nothing answers."""


@contextmanager
def shards_on_ray(address: str) -> Generator[RunShards]:
    """Connect to a cluster and give what runs shards on it.

    Args:
        address: Of the cluster, ``auto`` for the one of this machine, or ``local`` to start one.

    Raises:
        ClusterError: There is no cluster at the address.
    """
    if ray.is_initialized():
        yield _run_shards
        return
    if address == "local":
        with own_ray():
            yield _run_shards
        return
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"--address must name a running Ray cluster, got {address!r}: {error}. Start one with"
            " `ray start --head`, or leave --address out to work in this process."
        ) from error
    try:
        yield _run_shards
    finally:
        ray.shutdown()


def _run_shards(tasks: Sequence[ShardTask]) -> Iterator[dict[str, TensorTotals]]:
    """Run every task, as many at a time as the cluster has CPUs; yield results as they come."""
    supply = [node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]]
    num_cpus = min(tasks[0].workers, int(max(supply)))
    remote = ray.remote(max_retries=MAX_RETRIES, num_cpus=num_cpus)(_run)
    shared = ray.put(list(tasks))
    pending = [remote.remote(shared, number) for number in range(len(tasks))]
    try:
        while pending:
            done, pending = ray.wait(pending)
            for reference in done:
                yield _result(reference)
    finally:
        for reference in pending:
            ray.cancel(reference)


def _run(tasks: list[ShardTask], number: int) -> dict[str, TensorTotals]:
    return tasks[number].run()


def _knock(address: str) -> None:
    """Open and close a connection to ``[ray://]host:port``; other addresses are left to Ray.

    Raises:
        OSError: Nothing answers.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _result(reference: "ray.ObjectRef[dict[str, TensorTotals]]") -> dict[str, TensorTotals]:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, PastRayError):
            raise error.cause from None
        raise ClusterError(
            f"a task of a skill operation must not fail, but it raised {error.cause!r}. Nothing was"
            " published; please report it with this message."
        ) from error
    except RayError as error:
        raise ClusterError(
            f"a task of a skill operation must finish, but its node or worker was lost: {error}."
            " Nothing was published; run the same command again."
        ) from error
