"""Starts an own Ray or joins a running one, and checks that a configuration fits it."""

import logging
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import ray

from past_ray.config.runtime import RuntimeConfig
from past_ray.runtime.placement import check_supply

logger = logging.getLogger(__name__)

GIB = 1 << 30


@contextmanager
def ray_cluster(config: RuntimeConfig) -> Generator[None]:
    """Enter a Ray cluster that can hold ``config``; leave only what was started here.

    With ``address: null`` the cluster named by the environment variable ``RAY_ADDRESS`` is joined
    (``ray job submit`` sets it), or else an own Ray is started on this machine. An initialised Ray
    is used as it is.

    Raises:
        ConfigError: If the configuration asks for more CPUs or GPUs than there are.
    """
    if ray.is_initialized():
        check_supply(config, cluster_supply())
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        check_supply(config, machine_supply())
        with _own_ray(config):
            yield
        return
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        check_supply(config, cluster_supply())
        yield
    finally:
        ray.shutdown()


def machine_supply() -> dict[str, float]:
    """CPUs and GPUs of this machine."""
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def cluster_supply() -> dict[str, float]:
    """CPUs and GPUs of the cluster this process is connected to."""
    resources = ray.cluster_resources()
    return {name: float(resources.get(name, 0.0)) for name in ("CPU", "GPU")}


@contextmanager
def _own_ray(config: RuntimeConfig) -> Generator[None]:
    # Unix socket paths end at 107 characters, so the folder's name is short.
    temp_dir = Path(tempfile.mkdtemp(prefix="past_ray_", dir="/tmp"))
    supply = machine_supply()
    ray.init(
        address="local",
        num_cpus=int(supply["CPU"]),
        num_gpus=int(supply["GPU"]),
        object_store_memory=int(config.object_store_gib * GIB),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _temp_dir=str(temp_dir),
    )
    logger.info("started Ray with %s, logs under %s", supply, temp_dir)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)
