"""Facts about the machine that belong beside a measurement, and the state of its page cache."""

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Return CPU, memory, kernel, versions and date."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    packages = ("past-ray", "torch", "safetensors", "numpy")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory("MemTotal"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "load_average": os.getloadavg(),
    }


def file_system(folder: Path) -> str:
    """Return device and type of the file system that ``folder`` is on."""
    best = ("", "unknown", "")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, mount, kind, *_ = line.split()
        if folder.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind, device)
    return f"{best[1]} on {best[2]}"


def shortage(folder: Path, *, disk: int, memory: int) -> str | None:
    """Return what is missing for a measurement in ``folder``, or None.

    Args:
        folder: Where the files go.
        disk: Bytes of files.
        memory: Bytes of memory, including the files themselves on a tmpfs.
    """
    if not folder.is_dir():
        return f"{folder} does not exist"
    for what, free, needed in (
        (f"space on {folder}", shutil.disk_usage(folder).free, disk),
        ("memory", _memory("MemAvailable"), memory),
    ):
        if free < needed:
            return f"needs {needed / 1e9:.1f} GB of {what}, found {free / 1e9:.1f} GB"
    return None


def evict(folders: Iterable[Path]) -> None:
    """Drop the files of these folders from the page cache, so that the next read is cold."""
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # Only clean pages can be dropped.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a folder's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0
