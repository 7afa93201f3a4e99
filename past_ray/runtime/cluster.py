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
FOLDER_PARENT = Path("/tmp")
FOLDER_PREFIX = "past_ray_"


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
        with own_ray(object_store_bytes=int(config.object_store_gib * GIB)):
            yield
        return
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
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
def own_ray(*, object_store_bytes: int | None = None) -> Generator[None]:
    """Start a Ray of our own on this machine; end it and remove its files on the way out.

    Args:
        object_store_bytes: Size of the object store; None takes Ray's share of the memory.
    """
    _remove_dead_folders()
    # Unix socket paths end at 107 characters, so the folder's name is short.
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}_", dir=FOLDER_PARENT))
    supply = machine_supply()
    # Usage statistics would cost a process of their own.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=int(supply["CPU"]),
        num_gpus=int(supply["GPU"]),
        object_store_memory=object_store_bytes,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(folder),
    )
    logger.info("started Ray with %s, logs under %s", supply, folder)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _remove_dead_folders() -> None:
    """Remove what processes left that were killed before they could."""
    for folder in FOLDER_PARENT.glob(f"{FOLDER_PREFIX}*_*"):
        pid = folder.name.removeprefix(FOLDER_PREFIX).split("_")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc").exists():
            shutil.rmtree(folder, ignore_errors=True)
