"""One rank of a supervised run: what executes inside a Ray Train worker."""

import json
import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray.data
import ray.train

from past_ray.config.sft import SFTConfig
from past_ray.errors import DataError
from past_ray.sft.examples import SFTExample
from past_ray.sft.plan import read_share
from past_ray.storage import append_jsonl, atomic_directory, write_text

if TYPE_CHECKING:
    from past_ray.engine.sft_loop import SFTLearner

METRICS_FILE = "metrics.jsonl"
"""One line per optimizer step, written by rank 0."""

T = TypeVar("T")

READ_AHEAD_TOKENS = 16_000_000
"""Tokens of 8 bytes that one rank may hold before it needs them.

Ray Data's executor lives in the rank's process and spins while its output is not taken, which slows
a loop of small steps five times. A run that fits here is read at once, and its executor ends.
"""

NOTICE_INTERVAL_S = 1.0
"""Time between two questions whether a node is to be taken away; clouds give 30 s and more.

Each is a call to an actor, which takes longer than a step of a small model.
"""

RUN_NAME = "sft"
"""Ray Train keeps checkpoints in ``WORK_DIR/train/RUN_NAME``."""


def run_rank(job: dict[str, Any]) -> None:
    """Train one rank: runs inside a Ray Train worker."""
    sft = SFTConfig.model_validate(job["sft"])
    shares = _read_shares(sft)

    import torch
    from ray.train.torch import get_device

    from past_ray.engine.sft_loop import SFTLearner

    torch.set_num_threads(job["num_threads"])
    learner = SFTLearner(Path(job["init_folder"]), sft, seed=job["seed"], device=str(get_device()))
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            learner.load(Path(folder))
    _train_all_steps(learner, shares, sft, job)
    learner.export(Path(job["out_folder"]))


def kept_folder(out_folder: Path, num_steps: int) -> Path:
    """Return where the model after ``num_steps`` steps goes: ``NAME-stepN``, a neighbour."""
    return out_folder.parent / f"{out_folder.name}-step{num_steps}"


def _read_shares(sft: SFTConfig) -> Iterator[list[SFTExample]]:
    """Stream this rank's share of every step; reading starts now, while the model loads."""
    # Ray Train reports every checkpoint, Ray Data that it shows no bars.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    shard = cast(ray.data.DataIterator, ray.train.get_dataset_shard(f"shard_{rank}"))
    batch_size = sft.batch_size // num_ranks
    batches = read_ahead(
        shard.iter_batches(batch_size=batch_size, batch_format="pyarrow"),
        num_batches=max(2, READ_AHEAD_TOKENS // (batch_size * sft.max_length)),
    )
    return (
        read_share(cast(Any, batch).to_pydict(), step=step, rank=rank, num_ranks=num_ranks)
        for step, batch in enumerate(batches)
    )


def read_ahead(batches: Iterable[T], *, num_batches: int) -> Iterator[T]:
    """Start to read now, in a thread, at most ``num_batches`` ahead of what is taken.

    An error of ``batches`` is raised where its batch would have come.
    """
    ready: queue.Queue[T | Exception | None] = queue.Queue(maxsize=num_batches)

    def read() -> None:
        try:
            for batch in batches:
                ready.put(batch)
            ready.put(None)
        except Exception as error:
            ready.put(error)

    threading.Thread(target=read, name="sft-read-ahead", daemon=True).start()

    def taken() -> Iterator[T]:
        while (batch := ready.get()) is not None:
            if isinstance(batch, Exception):
                raise batch
            yield batch

    return taken()


def _train_all_steps(
    learner: "SFTLearner",
    shares: Iterator[list[SFTExample]],
    sft: SFTConfig,
    job: dict[str, Any],
) -> None:
    """Do the steps that are left; save checkpoints and models on the way."""
    metrics_file = Path(job["work_dir"]) / METRICS_FILE
    rank = ray.train.get_context().get_world_rank()
    if rank == 0:
        lines = [json.dumps(record.as_dict()) + "\n" for record in learner.records]
        write_text(metrics_file, "".join(lines))
    notice = _ReclaimNotice()
    for step, share in enumerate(shares):
        if step < learner.next_step:
            continue
        record = learner.train_step(share)
        if rank == 0:
            append_jsonl(metrics_file, record.as_dict())
        num_done = step + 1
        if num_done in job["keep_steps"]:
            learner.export(kept_folder(Path(job["out_folder"]), num_done))
        is_due = num_done % sft.checkpoint_every_steps == 0
        if (notice.is_new() or is_due) and num_done < sft.num_steps:
            _report_checkpoint(learner, Path(job["work_dir"]), rank=rank)
    if learner.next_step != sft.num_steps:
        raise DataError(
            f"The plan must hold {sft.num_steps} steps, rank {rank} read {learner.next_step}. "
            f"Delete {job['work_dir']} and run again."
        )


class _ReclaimNotice:
    """Tells all ranks together that a node of this run will be taken away (a spot reclaim).

    A checkpoint then keeps all that is done: Ray Train lets the ranks go on until the node's time
    is over, in case they finish, and restarts them elsewhere from the latest checkpoint.
    """

    def __init__(self) -> None:
        self._known: ray.train.PreemptionInfo | None = None
        self._next_look = time.monotonic()

    def is_new(self) -> bool:
        """Return whether there is a notice that was not there before. Collective."""
        from past_ray.engine.sharding import max_over_ranks

        # Clocks of ranks differ: all of them ask as soon as it is time for one.
        if not max_over_ranks(time.monotonic() >= self._next_look):
            return False
        self._next_look = time.monotonic() + NOTICE_INTERVAL_S
        info = ray.train.get_preemption_info()
        if info is None or info == self._known:
            return False
        self._known = info
        return True


def _report_checkpoint(learner: "SFTLearner", work_dir: Path, *, rank: int) -> None:
    """Write a training checkpoint where Ray Train keeps it, and register it."""
    folder = work_dir / "train" / RUN_NAME / f"checkpoint_{learner.next_step:08d}"
    checkpoint = None
    if rank == 0:
        with atomic_directory(folder) as writing:
            learner.save(writing)
        checkpoint = ray.train.Checkpoint.from_directory(str(folder))
    else:
        learner.save(folder)
    ray.train.report(
        {"step": learner.next_step},
        checkpoint=checkpoint,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
    )
