"""Skill injection against mergekit and against a plain copy: ``make bench-skill``.

What is measured, and how, is in ``benchmarks/README.md``.
"""

import argparse
import json
import logging
import shutil
import tempfile
import time
from dataclasses import asdict
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import contenders, machine
from benchmarks.accuracy import Deviation, compare
from benchmarks.contenders import Mergekit
from benchmarks.regime import ROUNDS, Regime, measure_regime
from benchmarks.synthetic import RL_UPDATE, TARGET_UPDATE, Shape, write_family

LAYERS = {"full": (28, 142), "small": (4, 16)}
"""Layers of the measured checkpoint, and of the one four times as large for the peak memory."""

HEADLINES = ("inject_speedup_vs_mergekit", "fraction_of_copy_bandwidth", "sweep5_over_inject")

console = Console()


def main() -> None:
    """Measure everything and write the report."""
    parser = argparse.ArgumentParser(description="Skill injection against mergekit and a copy.")
    parser.add_argument("--scale", choices=LAYERS, default="full")
    parser.add_argument("--out", type=Path, help="default: runs/bench/skill[-small].json")
    arguments = parser.parse_args()
    # Parents in bfloat16 are what is measured here; the warning about them is for users.
    logging.getLogger("past_ray").setLevel(logging.ERROR)
    name = "skill.json" if arguments.scale == "full" else "skill-small.json"
    report_file: Path = arguments.out or contenders.ROOT / "runs" / "bench" / name
    report_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=report_file.parent, prefix="work-") as work:
        report = measure(Path(work), *LAYERS[arguments.scale])
    report_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_summary(report)
    console.print(f"Written to {report_file}")


def measure(work: Path, layers: int, layers_of_large: int) -> dict[str, Any]:
    """Return the whole report."""
    started = time.perf_counter()
    facts = machine.describe() | {"threads": contenders.WORKERS, "rounds": ROUNDS}
    disk = Regime(name="durable", folder=work, durable=True)
    survived, extract_seconds = make_inputs(disk, Shape(layers=layers))
    with Mergekit() as peer:
        facts["mergekit"] = {k: v for k, v in peer.about.items() if k != "recipes"}
        regimes = {"durable": measure_regime(disk, peer), "memory": measure_in_memory(disk, peer)}
    headline = "durable" if "skipped" in regimes["memory"] else "memory"
    peaks = measure_peaks(disk, Shape(layers=layers_of_large))
    sizes = [peak["peak"] for peak in peaks.values() if "peak" in peak]
    memory = {
        "peak_rss_bytes": {size: peak.get("peak") for size, peak in peaks.items()},
        "peak_rss_ratio": sizes[1] / sizes[0] if len(sizes) == 2 else None,
    }
    return {
        "headline_regime": headline,
        **{key: value for key, value in regimes[headline].items() if not key.startswith("raw")},
        **memory,
        "max_error_vs_fp64": {
            "bfloat16": asdict(bfloat16_deviation(disk)),
            "float32": asdict(float32_deviation(work / "float32")),
        },
        "regimes": regimes,
        "raw_peak_rss": peaks,
        "parameters": Shape(layers=layers).parameters(),
        "changed_by_rl": survived,
        "extract_seconds": extract_seconds,
        "machine": facts,
        "bench_seconds": time.perf_counter() - started,
    }


def make_inputs(regime: Regime, shape: Shape) -> tuple[float, float]:
    """Write the inputs; return the fraction of weights that RL changed, and extraction seconds."""
    paths = regime.inputs
    console.print(f"Writing three checkpoints of {shape.parameters() / 1e6:.0f}M parameters")
    updates = {paths["rl"]: RL_UPDATE, paths["target"]: TARGET_UPDATE}
    survived = write_family(shape, sft=paths["sft"], updates=updates)
    console.print("Extracting the skill vector")
    start = time.perf_counter()
    contenders.extract(paths["rl"], paths["sft"], paths["skill"])
    seconds = time.perf_counter() - start
    return survived, seconds


def measure_in_memory(disk: Regime, peer: Mergekit) -> dict[str, Any]:
    """Measure once more with every file on a tmpfs, if there is room."""
    tmpfs = Path("/dev/shm")
    model = machine.weight_bytes(disk.inputs["target"])
    # Files: 3 checkpoints, a vector twice as large, 5 results of a sweep. Memory: those, and what
    # mergekit holds.
    missing = machine.shortage(tmpfs, disk=10 * model, memory=12 * model + 1_000_000_000)
    if missing:
        console.print(f"memory: skipped, {missing}")
        return {"skipped": missing}
    with tempfile.TemporaryDirectory(dir=tmpfs, prefix="bench-skill-") as folder:
        regime = Regime(name="memory", folder=Path(folder), durable=False)
        for name, path in disk.inputs.items():
            shutil.copytree(path, regime.inputs[name])
        return measure_regime(regime, peer)


def measure_peaks(disk: Regime, large: Shape) -> dict[str, dict[str, Any]]:
    """Return the peak memory of an injection, by size of the checkpoint."""
    target, vector, out = disk.inputs["target"], disk.inputs["skill"], disk.folder / "out"
    peaks: dict[str, dict[str, Any]] = {size(target): contenders.peak_rss(target, vector, out)}
    shutil.rmtree(out)
    # Two checkpoints, a vector twice as large, and the result in the place of one parent.
    missing = machine.shortage(disk.folder, disk=9 * large.parameters(), memory=0)
    if missing:
        console.print(f"Peak memory of the large checkpoint: skipped, {missing}")
        return peaks | {"large": {"skipped": missing}}
    folder = disk.folder / "large"
    rl, sft, vector = folder / "rl", folder / "sft", folder / "skill"
    console.print(f"Writing two checkpoints of {large.parameters() / 1e6:.0f}M parameters")
    write_family(large, sft=sft, updates={rl: RL_UPDATE})
    console.print("Extracting their vector")
    contenders.extract(rl, sft, vector)
    shutil.rmtree(rl)
    console.print("Measuring the peak memory")
    peaks[size(sft)] = contenders.peak_rss(sft, vector, folder / "out")
    shutil.rmtree(folder)
    return peaks


def bfloat16_deviation(disk: Regime) -> Deviation:
    """Inject into the measured target and compare."""
    out = disk.folder / "out"
    contenders.inject(disk.inputs["target"], disk.inputs["skill"], out)
    deviation = compare(out, disk.parents)
    shutil.rmtree(out)
    return deviation


def float32_deviation(folder: Path) -> Deviation:
    """Inject into a small float32 checkpoint and compare."""
    small = Regime(name="float32", folder=folder, durable=False)
    paths = small.inputs
    updates = {paths["rl"]: RL_UPDATE, paths["target"]: TARGET_UPDATE}
    shape = Shape(layers=2, vocabulary=4096)
    write_family(shape, sft=paths["sft"], updates=updates, dtype=torch.float32)
    contenders.extract(paths["rl"], paths["sft"], paths["skill"])
    contenders.inject(paths["target"], paths["skill"], folder / "out")
    return compare(folder / "out", small.parents)


def size(folder: Path) -> str:
    """Return what a checkpoint's size is called in the report."""
    return f"{machine.weight_bytes(folder) / 1e9:.1f}GB"


def print_summary(report: dict[str, Any]) -> None:
    """Show the headline numbers of each regime that was measured."""
    regimes = {name: r for name, r in report["regimes"].items() if "skipped" not in r}
    rows = {f"{name}, s": ("median_seconds", name) for name in report["median_seconds"]}
    rows |= {name: (name,) for name in HEADLINES}
    table = Table("", *regimes, title="Skill injection")
    for row, keys in rows.items():
        table.add_row(row, *(f"{reduce(getitem, keys, r):.2f}" for r in regimes.values()))
    console.print(table)
    console.print(f"Peak memory: {report['peak_rss_bytes']}, ratio {report['peak_rss_ratio']}")
    console.print(f"Error against float64: {report['max_error_vs_fp64']}")


if __name__ == "__main__":
    main()
