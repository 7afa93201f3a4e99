"""mergekit as a server: runs inside .venv-bench, one merge per line of JSON on stdin.

Everything is imported before the first request, so that a time is the merge alone: planning,
reading, arithmetic, writing and, where asked for, the fsync of what was written. The first line on
stdout tells versions, threads and the recipes; then every request
``{"recipe": .., "folders": {"rl", "sft", "target", "skill"}, "out": .., "fsync": ..}`` is answered
by ``{"seconds": ..}``.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

PARENTS = (("rl", 1), ("sft", -1), ("target", 1))
"""``(rl - sft) + target``: in this order the first difference is exact in float32."""

VECTOR = (("target", 1), ("skill", 1))
"""``target + vector``, with the float32 vector taken for a checkpoint."""

STREAMED = {"async_write": True, "out_shard_size": 200_000_000}
"""Shards small enough that the writer thread works while the next ones are computed."""

LEAN = {"low_cpu_memory": True, "lazy_unpickle": True}

RECIPES: dict[str, tuple[str, tuple[tuple[str, int], ...], str | None, dict[str, Any]]] = {
    "linear": ("linear", PARENTS, None, {}),
    "linear, low_cpu_memory, lazy_unpickle": ("linear", PARENTS, None, LEAN),
    "linear, async_write": ("linear", PARENTS, None, {"async_write": True}),
    "linear, async_write, 200 MB shards": ("linear", PARENTS, None, STREAMED),
    "task_arithmetic": ("task_arithmetic", PARENTS, "float32", {}),
    "vector": ("linear", VECTOR, None, {}),
    "vector, float32 inputs": ("linear", VECTOR, "float32", {}),
    "vector, async_write, 200 MB shards": ("linear", VECTOR, None, STREAMED),
    "vector, float32 inputs, async_write, 200 MB shards": ("linear", VECTOR, "float32", STREAMED),
}
"""Name -> method, inputs with their weights, dtype of the inputs, changes to mergekit's options."""


def main() -> None:
    """Answer requests until stdin closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    threads = parser.parse_args().threads
    # Before any tensor work: torch refuses to change its inter-op threads later.
    MergeOptions(num_threads=threads).apply_global_options()
    answers, sys.stdout = sys.stdout, sys.stderr  # mergekit's own prints must not get between.
    names = ("mergekit", "torch", "transformers", "safetensors")
    hello = {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "torch_threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "recipes": list(RECIPES),
    }
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": merge(**json.loads(line))}), file=answers, flush=True)


def merge(*, recipe: str, folders: dict[str, str], out: str, fsync: bool) -> float:
    """Run one recipe and return its seconds."""
    config, options = prepare(recipe, folders)
    start = time.perf_counter()
    run_merge(config, out, options)
    if fsync:
        sync_folder(Path(out))
    seconds = time.perf_counter() - start
    # The class keeps every opened checkpoint. Its maps would hold old files in the page cache.
    LoaderCache.loaders.clear()
    gc.collect()
    return seconds


def prepare(recipe: str, folders: dict[str, str]) -> tuple[MergeConfiguration, MergeOptions]:
    """Return mergekit's own configuration objects for a recipe."""
    method, inputs, dtype, options = RECIPES[recipe]
    models = [{"model": folders[name], "parameters": {"weight": weight}} for name, weight in inputs]
    config: dict[str, Any] = {
        "merge_method": method,
        "models": models,
        "parameters": {"normalize": False},
        "dtype": dtype,
        "out_dtype": "bfloat16",
    }
    if method == "task_arithmetic":
        # The base takes no weight: target + (rl - target) - (sft - target).
        target = folders["target"]
        config |= {"base_model": target, "models": [m for m in models if m["model"] != target]}
    return MergeConfiguration.model_validate(config), MergeOptions(quiet=True, **options)


def sync_folder(folder: Path) -> None:
    """Make files and their names durable."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    main()
