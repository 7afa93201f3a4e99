"""A full weight sync through the real session, against one copy of the same bytes."""

import asyncio
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.rl.past_ray_side import runtime_config
from past_ray.config.algorithm import KLConfig
from past_ray.config.rl import RLConfig
from past_ray.envs.closed_book_qa import ClosedBookQA
from past_ray.runtime.session import RLSession
from past_ray.skill.checkpoint import load_weights

NUM_SYNCS = 7
WARM_UP = 2
NUM_COPIES = 7
PROBE = [[5, 6, 7, 8]]


def measure_sync(model: Path) -> dict[str, Any]:
    """Return the median seconds of both, and their ratio."""
    syncs = asyncio.run(_syncs(model))
    copies, clones, num_bytes = _copies(model)
    sync, copy = statistics.median(syncs[WARM_UP:]), statistics.median(copies)
    return {
        "sync_seconds": sync,
        "copy_seconds": copy,
        "sync_over_copy": sync / copy,
        "sync_over_clone": sync / statistics.median(clones),
        "weight_bytes": num_bytes,
        "threads": torch.get_num_threads(),
        "raw_sync_seconds": syncs,
        "raw_copy_seconds": copies,
    }


async def _syncs(model: Path) -> list[float]:
    session = RLSession(
        runtime_config(max_model_len=64),
        RLConfig(kl=KLConfig(coefficient=0.0), parity_tolerance=1e-3),
        model_folder=model,
        make_env=partial(ClosedBookQA, grade=_grade),
    )
    try:
        await session.open()
        await session.load_learners(model, reference=None, resume_from=None)
        results = [await session.sync_weights(version, probe=PROBE) for version in range(NUM_SYNCS)]
    finally:
        session.close()
    return [result.seconds for result in results]


def _copies(model: Path) -> tuple[list[float], list[float], int]:
    """Time copies of all weights into memory that was touched before, and into fresh memory."""
    weights = list(load_weights(model).values())
    buffers = [weight.clone() for weight in weights]
    copies: list[float] = []
    clones: list[float] = []
    for _ in range(NUM_COPIES):
        started = time.perf_counter()
        for buffer, weight in zip(buffers, weights, strict=True):
            buffer.copy_(weight)
        copied = time.perf_counter()
        fresh = [weight.clone() for weight in weights]
        clones.append(time.perf_counter() - copied)
        copies.append(copied - started)
        del fresh
    return copies, clones, sum(weight.nbytes for weight in weights)


def _grade(answer: str, gold: str) -> float:
    """Never called: nothing is rolled out."""
    raise NotImplementedError
