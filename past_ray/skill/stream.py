"""Streams tensors through a computation: read, compute and write, chunk by chunk, in threads.

::

    thread 1   read chunk 1 | compute | write | read chunk 3 | compute | ...
    thread 2        read chunk 2 | compute | write | read chunk 4 | ...

Every thread takes the next chunk as soon as it has written its last one, so while one waits for the
disk another computes. No more than one chunk per thread is in memory, whatever the model's size. A
chunk is written at its own offset, so the bytes do not depend on who came first.
"""

import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from past_ray.errors import ConfigError
from past_ray.locations import FolderWriter
from past_ray.skill.blocks import Chunk, Measures, TensorTotals, Workspace, cut, tensor_digest
from past_ray.skill.safetensors_file import StoredTensor, lay_out
from past_ray.skill.weights import INDEX_FILE, WEIGHTS_FILE
from past_ray.storage import write_json

Item = TypeVar("Item")


class Computation(Protocol):
    """What is done to a chunk; pickles, and keeps nothing from one chunk to the next."""

    def __call__(self, chunk: Chunk, workspace: Workspace) -> tuple[list[Tensor], Measures]:
        """Return the chunk's ``[n]`` entries for each output, and what was measured."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One output file, the same for every output folder."""

    file: str
    """Its name."""

    shapes: dict[str, tuple[int, ...]]
    """Its tensors."""

    dtypes: dict[str, torch.dtype]
    """What they are stored in."""

    @property
    def numel(self) -> int:
        """Entries of all its tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSettings:
    """How work is cut and shared out; nothing here changes a number in the result."""

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Threads; by default one for each CPU that this process may use."""

    chunk_blocks: int = 2
    """Blocks that a thread holds at once: 2 MiB of float32 per input and output."""

    max_shard_bytes: int = 5_000_000_000
    """A file of weights gets no larger, unless one tensor is."""

    run_shards: "RunShards | None" = None
    """Does the shards elsewhere, such as on a Ray cluster; None does them here, one by one."""

    on_progress: Callable[[int, int], None] | None = None
    """Told now and then how many entries are done, and of how many."""

    def __post_init__(self) -> None:
        """Refuse settings without effect.

        Raises:
            ConfigError: A number is below 1.
        """
        for name in ("workers", "chunk_blocks", "max_shard_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    *,
    max_shard_bytes: int,
) -> list[Shard]:
    """Distribute tensors over files in the order of their names, as full as the limit allows."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(shapes):
        size = math.prod(shapes[name]) * dtypes[name].itemsize
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    total = len(groups)
    return [
        Shard(
            file=WEIGHTS_FILE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors",
            shapes={name: shapes[name] for name in group},
            dtypes={name: dtypes[name] for name in group},
        )
        for number, group in enumerate(groups, start=1)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """The work of one shard; pickles, so it may run on any machine that sees the storage."""

    writers: tuple[FolderWriter, ...]
    """Output folders, one per output of ``compute``."""

    shard: Shard
    """What the file in each of them holds."""

    compute: Computation
    """Gives the chunks."""

    workers: int
    """Threads."""

    chunk_blocks: int
    """Blocks that a thread holds at once."""

    def run(self, on_entries: Callable[[int], None] | None = None) -> dict[str, TensorTotals]:
        """Write the files and return what was measured about their tensors."""
        head, stored = lay_out(self.shard.shapes, self.shard.dtypes)
        with ExitStack() as stack:
            files = [
                stack.enter_context(_create(writer.path / self.shard.file, head))
                for writer in self.writers
            ]

            def handle(chunk: Chunk, workspace: Workspace) -> Measures:
                tensors, measures = self.compute(chunk, workspace)
                # A file takes one writer at a time: threads at neighbouring chunks start at
                # different files.
                for turn in range(len(files)):
                    number = (turn + chunk.start // max(chunk.numel, 1)) % len(files)
                    _write(files[number], stored[chunk.name], chunk.start, tensors[number])
                return measures

            settings = StreamSettings(workers=self.workers, chunk_blocks=self.chunk_blocks)
            totals = measure(self.shard.shapes, handle, settings=settings, on_entries=on_entries)
        for writer in self.writers:
            writer.finished(self.shard.file)
        return totals


class RunShards(Protocol):
    """Where shards are done."""

    def __call__(self, tasks: Sequence[ShardTask]) -> Iterable[dict[str, TensorTotals]]:
        """Run all tasks and yield each one's result, in any order."""
        ...


def write_weights(
    writers: Sequence[FolderWriter],
    compute: Computation,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    settings: StreamSettings,
) -> dict[str, TensorTotals]:
    """Write the shards and the index of each folder; return what was measured, by tensor.

    Args:
        writers: Output folders, one per output of ``compute``.
        compute: Gives the chunks.
        shapes: Of the tensors to write.
        dtypes: Of the tensors to write.
        settings: How the work is shared out.

    Raises:
        StorageError: The disk is full, or an input turned out unreadable.
    """
    shards = plan_shards(shapes, dtypes, max_shard_bytes=settings.max_shard_bytes)
    tasks = [
        ShardTask(
            writers=tuple(writers),
            shard=shard,
            compute=compute,
            workers=settings.workers,
            chunk_blocks=settings.chunk_blocks,
        )
        for shard in shards
    ]
    report = _Progress(settings, sum(shard.numel for shard in shards))
    totals: dict[str, TensorTotals] = {}
    if settings.run_shards is None:
        for task in tasks:
            totals |= task.run(report.add)
    else:
        for writer in writers:
            writer.expect(shard.file for shard in shards)
        for shard_totals in settings.run_shards(tasks):
            totals |= shard_totals
            report.add(sum(math.prod(shapes[name]) for name in shard_totals))
    for writer in writers:
        _write_index(writer, shards)
    return {name: totals[name] for name in sorted(totals)}


def measure(
    shapes: Mapping[str, tuple[int, ...]],
    handle: Callable[[Chunk, Workspace], Measures],
    *,
    settings: StreamSettings,
    on_entries: Callable[[int], None] | None = None,
) -> dict[str, TensorTotals]:
    """Let ``handle`` see every chunk in some thread; return each tensor's totals, by name."""
    totals: dict[str, TensorTotals] = {}
    unfinished: dict[str, dict[int, Measures]] = {}
    missing = {name: math.prod(shape) for name, shape in shapes.items()}
    lock = threading.Lock()

    def collect(chunk: Chunk, measures: Measures) -> None:
        with lock:
            parts = unfinished.setdefault(chunk.name, {})
            parts[chunk.start] = measures
            missing[chunk.name] -= chunk.numel
            if on_entries:
                on_entries(chunk.numel)
            if missing[chunk.name]:
                return
            del unfinished[chunk.name]
        ordered = [parts[start] for start in sorted(parts)]
        total = _total(shapes[chunk.name], ordered)
        with lock:
            totals[chunk.name] = total

    def work(chunk: Chunk, workspace: Workspace) -> None:
        collect(chunk, handle(chunk, workspace))

    in_threads(cut(shapes, chunk_blocks=settings.chunk_blocks), work, workers=settings.workers)
    return {name: totals[name] for name in sorted(totals)}


def in_threads(
    items: Iterable[Item], work: Callable[[Item, Workspace], None], *, workers: int
) -> None:
    """Call ``work`` for every item; the first error, or Ctrl-C, stops all threads.

    Torch and BLAS work with one thread meanwhile: with more of them sums and products have other
    last digits, and here the items are what runs in parallel.
    """
    pending: Iterator[Item] = iter(items)
    lock, stopped = threading.Lock(), threading.Event()

    def loop() -> None:
        torch.set_num_threads(1)
        workspace = Workspace()
        while not stopped.is_set():
            with lock:
                item = next(pending, None)
            if item is None:
                return
            work(item, workspace)

    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="skill") as pool:
            futures = [pool.submit(loop) for _ in range(workers)]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                stopped.set()
    finally:
        torch.set_num_threads(num_threads)


class _Progress:
    """Adds up what is done and tells the caller."""

    def __init__(self, settings: StreamSettings, total: int) -> None:
        self._tell, self._done, self._total = settings.on_progress, 0, total

    def add(self, entries: int) -> None:
        self._done += entries
        if self._tell:
            self._tell(self._done, self._total)


def _write_index(writer: FolderWriter, shards: Sequence[Shard]) -> None:
    sizes = [
        math.prod(shape) * shard.dtypes[name].itemsize
        for shard in shards
        for name, shape in shard.shapes.items()
    ]
    weight_map = {name: shard.file for shard in shards for name in shard.shapes}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    write_json(writer.path / INDEX_FILE, index)


@contextmanager
def _create(file: Path, head: bytes) -> Generator[int]:
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    try:
        _write_all(descriptor, memoryview(head), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, stored: StoredTensor, start: int, values: Tensor) -> None:
    if values.numel():
        content = values.view(torch.uint8).numpy().data
        _write_all(descriptor, content, stored.offset + start * values.element_size())


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _total(shape: tuple[int, ...], parts: Sequence[Measures]) -> TensorTotals:
    import math

    corrections = [pair for part in parts for pair in part.corrections]
    return TensorTotals(
        digests={
            key: tensor_digest(dtype, shape, b"".join(part.digests[key][1] for part in parts))
            for key, (dtype, _) in parts[0].digests.items()
        },
        sums={key: math.fsum(x for p in parts for x in p.sums[key]) for key in parts[0].sums},
        corrections=(
            torch.cat([entries for entries, _ in corrections]),
            torch.cat([values for _, values in corrections]),
        )
        if corrections
        else None,
    )
