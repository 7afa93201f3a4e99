"""What is measured: our injection, mergekit in its own environment, and plain copies."""

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from past_ray import skill

WORKERS = 2
"""Threads that every contender may use."""

SETTINGS = skill.StreamSettings(workers=WORKERS)

ROOT = Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
BLOCK = 8 << 20
"""Bytes per read and write of the copies; halves of a file start on a multiple of it."""


def extract(rl: Path, sft: Path, out: Path) -> None:
    """Write our skill vector ``rl - sft``."""
    skill.extract(rl, sft, out, provenance=skill.Provenance(task="bench"), settings=SETTINGS)


def inject(target: Path, vector: Path, out: Path) -> None:
    """Write our ``target + vector``."""
    skill.inject(target, vector, out, scale=1.0, settings=SETTINGS)


def sweep(target: Path, vector: Path, outs: dict[float, Path]) -> None:
    """Write our ``target + scale * vector`` for several scales."""
    skill.sweep(target, vector, outs, settings=SETTINGS)


def peak_rss(target: Path, vector: Path, out: Path) -> dict[str, int]:
    """Return the peak resident bytes of a fresh process: after imports, and after one injection."""
    program = (
        "import re, sys; from pathlib import Path;"
        "from benchmarks import contenders;"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)',"
        " Path('/proc/self/status').read_text())[1]) * 1024;"
        "imports = peak(); contenders.inject(*map(Path, sys.argv[1:])); print(imports, peak())"
    )
    command = [sys.executable, "-c", program, *map(str, (target, vector, out))]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    imports, peak = map(int, done.stdout.split())
    return {"after_imports": imports, "peak": peak}


class Mergekit:
    """A running ``mergekit_run.py``; a context manager."""

    def __init__(self) -> None:
        """Start it and wait until its imports are done."""
        script = Path(__file__).with_name("mergekit_run.py")
        self._process = subprocess.Popen(
            [PEER_PYTHON, script, "--threads", str(WORKERS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(WORKERS)},
        )
        self.about = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def merge(self, recipe: str, folders: dict[str, Path], out: Path, *, fsync: bool) -> float:
        """Run a recipe and return the seconds it took inside the peer's process."""
        assert self._process.stdin is not None
        paths = {name: str(path) for name, path in folders.items()}
        request = {"recipe": recipe, "folders": paths, "out": str(out), "fsync": fsync}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("mergekit_run.py must answer; run it by hand to see why it ended")
        return json.loads(line)


def copy(tool: str, source: Path, out: Path, *, fsync: bool) -> None:
    """Copy one file with one of ``COPY_TOOLS``."""
    COPY_TOOLS[tool](source, out)
    if fsync:
        for path in (out, out.parent):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _cp(source: Path, out: Path) -> None:
    # A file system that shares blocks would otherwise copy nothing.
    subprocess.run(["cp", "--reflink=never", source, out], check=True)


def _dd(*operands: str) -> Callable[[Path, Path], None]:
    def run(source: Path, out: Path) -> None:
        _finish([_start_dd(source, out, *operands)])

    return run


def _two_dd(flags: str = "") -> Callable[[Path, Path], None]:
    def run(source: Path, out: Path) -> None:
        blocks = source.stat().st_size // BLOCK // 2
        common = (f"bs={BLOCK}", "conv=notrunc", f"iflag=fullblock{flags}")
        if flags:
            common += (f"oflag={flags.removeprefix(',')}",)
        first = _start_dd(source, out, *common, f"count={blocks}")
        second = _start_dd(source, out, *common, f"skip={blocks}", f"seek={blocks}")
        _finish([first, second])

    return run


def _start_dd(source: Path, out: Path, *operands: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["dd", f"if={source}", f"of={out}", "status=none", *operands])


def _finish(processes: list[subprocess.Popen[bytes]]) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        raise OSError(f"dd must succeed, got {codes}")


def _by_halves(
    part: Callable[[int, int, int, int], None],
) -> Callable[[Path, Path], None]:
    """Make a copy out of ``part(source, out, start, end)``, run on two halves in two threads."""

    def run(source: Path, out: Path) -> None:
        with source.open("rb") as read, out.open("wb") as write:
            size = source.stat().st_size
            middle = size // BLOCK // 2 * BLOCK
            copy_part = partial(part, read.fileno(), write.fileno())
            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(copy_part, (0, middle), (middle, size)))

    return run


def _copy_file_range(source: int, out: int, start: int, end: int) -> None:
    while start < end:
        start += os.copy_file_range(source, out, end - start, start, start)


def _pread_pwrite(source: int, out: int, start: int, end: int) -> None:
    buffer = memoryview(mmap.mmap(-1, BLOCK))
    while start < end:
        size = os.preadv(source, [buffer[: min(BLOCK, end - start)]], start)
        start += os.pwrite(out, buffer[:size], start)


COPY_TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "cp": _cp,
    "dd bs=1M": _dd("bs=1M"),
    "dd bs=8M": _dd("bs=8M"),
    "dd bs=8M direct": _dd("bs=8M", "iflag=direct", "oflag=direct"),
    "two dd bs=8M": _two_dd(),
    "two dd bs=8M direct": _two_dd(",direct"),
    "two threads, copy_file_range": _by_halves(_copy_file_range),
    "two threads, pread and pwrite of 8 MB": _by_halves(_pread_pwrite),
}
"""Each makes ``out`` from ``source``; none of them syncs."""
