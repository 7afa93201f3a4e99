"""Shards of a skill operation as Ray tasks: one file of the result per task.

::

    driver   plan shards -- ShardTask --> task 1   read, compute, write model-00001-of-00003
                                          task 2   read, compute, write model-00002-of-00003
             totals <-- digests, norms -- task 3   ...

The nodes must see the folders: NFS or another shared disk, or an object store. Only digests, sums
and corrections travel through Ray, never weights.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from past_ray.errors import ClusterError, PastRayError
from past_ray.runtime.cluster import own_ray
from past_ray.skill.blocks import TensorTotals
from past_ray.skill.stream import RunShards, ShardTask

MAX_TRIES = 3
"""A task whose node dies is run again; it overwrites what the first try left."""


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
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    except (ConnectionError, ValueError, RuntimeError) as error:
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
    remote = ray.remote(max_retries=MAX_TRIES, num_cpus=num_cpus)(_run)
    pending = [remote.remote(task) for task in tasks]
    try:
        while pending:
            done, pending = ray.wait(pending)
            for reference in done:
                yield _result(reference)
    finally:
        for reference in pending:
            ray.cancel(reference)


def _run(task: ShardTask) -> dict[str, TensorTotals]:
    return task.run()


def _result(reference: "ray.ObjectRef[dict[str, TensorTotals]]") -> dict[str, TensorTotals]:
    try:
        return ray.get(reference)
    except PastRayError:
        raise
    except RayError as error:
        raise ClusterError(
            f"a task of a skill operation must finish, but it failed: {error}. Nothing was"
            " published; run the same command again."
        ) from error
