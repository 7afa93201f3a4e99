"""One regime of the measurement: where the files are, and what counts as done."""

import gc
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks import contenders, machine
from benchmarks.accuracy import compare
from benchmarks.contenders import COPY_TOOLS, Mergekit
from benchmarks.synthetic import WEIGHTS_FILE

ROUNDS = 5
TRIALS = 3
"""Runs of every recipe and copy tool, of which the best decides who is measured."""

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
INPUTS = ("rl", "sft", "target", "skill")
VECTOR_AS_MODEL = "skill-as-model"

console = Console()


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Where the files are, and whether the disk is part of what is timed."""

    name: str
    """``durable`` or ``memory``."""

    folder: Path
    """Holds the inputs and takes the outputs."""

    durable: bool
    """Inputs are cold before each run and outputs are synced within its time."""

    @property
    def inputs(self) -> dict[str, Path]:
        """Folders of the parents, the target and our vector, by name."""
        return {name: self.folder / name for name in INPUTS}

    @property
    def parents(self) -> dict[str, Path]:
        """The same without the vector."""
        return {name: self.folder / name for name in INPUTS if name != "skill"}

    def run(self, contender: Callable[[Path], float | None]) -> float:
        """Return the seconds that ``contender(out)`` takes, or those that it reports itself."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        gc.collect()
        os.sync()
        if self.durable:
            machine.evict(self.inputs.values())
        start = time.perf_counter()
        reported = contender(out)
        return time.perf_counter() - start if reported is None else reported


def measure_regime(regime: Regime, peer: Mergekit) -> dict[str, Any]:
    """Return times and headline ratios of one regime."""
    paths = regime.inputs
    present_vector_as_model(regime)
    recipes = try_recipes(regime, peer)
    tools = try_copies(regime)
    recipe, tool = fastest(recipes), fastest(tools)
    console.print(f"{regime.name}: the peer is {recipe!r}, the copy is {tool!r}")
    contender_of: dict[str, Callable[[Path], float | None]] = {
        "inject": lambda out: contenders.inject(paths["target"], paths["skill"], out),
        "mergekit": partial(merge, regime, peer, recipe),
        "copy": partial(copy_target, regime, tool),
        "sweep5": lambda out: contenders.sweep(
            paths["target"], paths["skill"], {scale: out / str(scale) for scale in SCALES}
        ),
    }
    regime.run(contender_of["inject"])  # The others have warmed up in their trials.
    seconds: dict[str, list[float]] = {name: [] for name in contender_of}
    for number in range(ROUNDS):
        names = list(contender_of)
        # Another one begins each round, so that nobody always follows the same neighbour.
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(regime.run(contender_of[name]))
        shown = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        console.print(f"{regime.name}: round {number + 1} of {ROUNDS}: {shown}")
    shutil.rmtree(regime.folder / "out")
    return ratios(regime, seconds) | {
        "peer_recipe": recipe,
        "peer_recipes": recipes,
        "copy_tool": tool,
        "copy_tools": tools,
        "file_system": machine.file_system(regime.folder),
        "raw_seconds": seconds,
    }


def ratios(regime: Regime, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the headline numbers from the medians."""
    middle = {name: median(times) for name, times in seconds.items()}
    model, vector = (machine.weight_bytes(regime.inputs[name]) for name in ("target", "skill"))
    ours, plain = (2 * model + vector) / middle["inject"], 2 * model / middle["copy"]
    return {
        "inject_speedup_vs_mergekit": middle["mergekit"] / middle["inject"],
        "fraction_of_copy_bandwidth": ours / plain,
        "sweep5_over_inject": middle["sweep5"] / middle["inject"],
        "median_seconds": middle,
        "bytes_read_by_inject": model + vector,
        "bytes_written_by_inject": model,
        "bytes_of_copied_file": model,
        "inject_bytes_per_second": ours,
        "copy_bytes_per_second": plain,
    }


def try_recipes(regime: Regime, peer: Mergekit) -> dict[str, Any]:
    """Time mergekit's recipes in turns, and check their numbers on every seventh tensor."""
    recipes: list[str] = peer.about["recipes"]
    tried: dict[str, Any] = {recipe: {"seconds": []} for recipe in recipes}
    for recipe in recipes * TRIALS:
        result = tried[recipe]
        result["seconds"].append(regime.run(partial(merge, regime, peer, recipe)))
        if "right" not in result:
            found = compare(regime.folder / "out", regime.parents, every=7)
            result |= {"right": found.is_right(), "vs_fp64": asdict(found)}
    show(regime, "mergekit", tried)
    return tried


def try_copies(regime: Regime) -> dict[str, Any]:
    """Time every copy tool in turns; one that cannot copy here is left out."""
    tried: dict[str, Any] = {tool: {"seconds": [], "right": True} for tool in COPY_TOOLS}
    for tool in [*COPY_TOOLS] * TRIALS:
        try:
            tried[tool]["seconds"].append(regime.run(partial(copy_target, regime, tool)))
        except OSError as error:
            tried[tool] |= {"right": False, "error": str(error)}
    show(regime, "copy", tried)
    return tried


def show(regime: Regime, kind: str, tried: dict[str, Any]) -> None:
    """Print the best time of each."""
    for name, result in tried.items():
        best = f"{min(result['seconds']):.2f} s" if result["right"] else "not right"
        console.print(f"{regime.name}: {kind}, {name}: {best}")


def fastest(tried: dict[str, Any]) -> str:
    """Return the fastest of those that gave the right result."""
    return min((n for n in tried if tried[n]["right"]), key=lambda n: min(tried[n]["seconds"]))


def merge(regime: Regime, peer: Mergekit, recipe: str, out: Path) -> float:
    """Let mergekit merge; return its seconds."""
    folders = regime.inputs | {"skill": regime.folder / VECTOR_AS_MODEL}
    return peer.merge(recipe, folders, out, fsync=regime.durable)


def copy_target(regime: Regime, tool: str, out: Path) -> None:
    """Copy the target's weights."""
    out.mkdir()
    source = regime.inputs["target"] / WEIGHTS_FILE
    contenders.copy(tool, source, out / WEIGHTS_FILE, fsync=regime.durable)


def present_vector_as_model(regime: Regime) -> None:
    """Make a folder in which mergekit finds the vector's weights and a config."""
    folder = regime.folder / VECTOR_AS_MODEL
    folder.mkdir()
    for file in regime.inputs["skill"].glob("model*"):
        (folder / file.name).symlink_to(file.resolve())
    for file in regime.inputs["target"].glob("*.json"):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
