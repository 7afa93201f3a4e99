"""Streams that fail, are stopped, race or fill the disk leave only complete results."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from past_ray.errors import SkillVectorError, StorageError
from past_ray.skill import StreamSettings, extract, inject, verify
from past_ray.skill.blocks import BLOCK
from past_ray.skill.checkpoint import load_weights
from tests.skill_folders import (
    assert_same_bits,
    contents,
    make_checkpoint,
    names,
    nudged,
    random_tensors,
)
from tests.skill_streams import (
    SHAPES,
    both,
    parents_fixture,  # noqa: F401
    python,
    small_blocks_fixture,  # noqa: F401
)

SLOW_WRITER = """
import sys, time
from past_ray.skill import StreamSettings, extract, inject

def wait(done, total):
    print("half written", flush=True)
    time.sleep(60)

operation = {"extract": extract, "inject": inject}[sys.argv[1]]
operation(*sys.argv[2:], settings=StreamSettings(workers=2, on_progress=wait))
"""


RACING_WRITER = """
import sys, time
from pathlib import Path
from past_ray.skill import StreamSettings, extract

me, rl, sft, folder, num_rounds = *sys.argv[1:5], int(sys.argv[5])

def wait_for_the_other(done, total):
    if done == total:
        Path(folder, f"{number} {me}").touch()
        started = time.monotonic()
        while len(list(Path(folder).glob(f"{number} *"))) < 2:
            assert time.monotonic() < started + 10, "the other one is gone"
            time.sleep(0.0001)

for number in range(num_rounds):
    settings = StreamSettings(on_progress=wait_for_the_other)
    extract(rl, sft, f"{folder}/skill {number // 2}", settings=settings)
"""


@pytest.fixture
def long_parents(tmp_path, small_blocks):
    """One tensor of 200 blocks."""
    sft = random_tensors(0, {"w": (200, 8)})
    make_checkpoint(tmp_path / "rl", nudged(sft, 1))
    make_checkpoint(tmp_path / "sft", sft)
    return tmp_path / "rl", tmp_path / "sft"


@pytest.fixture
def small_disk():
    """A file system of 1 MiB; not under tmp_path, which another pytest may move while mounted."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    with tempfile.TemporaryDirectory() as disk:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        if mounted.returncode != 0:
            pytest.skip(f"mounting a small file system is not permitted: {mounted.stderr.strip()}")
        try:
            yield Path(disk)
        finally:
            subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("fails", [False, True])
def test_no_file_is_left_for_the_garbage_collector_to_close(parents, fails):
    rl, sft = parents
    if fails:
        broken = {"model.norm.weight": torch.full((17,), torch.nan)}
        make_checkpoint(rl, random_tensors(1, SHAPES) | broken)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if fails:
            with pytest.raises(SkillVectorError):
                extract(rl, sft, rl.parent / "skill")
        else:
            both(rl.parent, StreamSettings(workers=2))
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert [str(w.message) for w in caught if w.category is ResourceWarning] == []


def raise_interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("interrupt", "error"),
    [
        (raise_interrupt, KeyboardInterrupt),
        (lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt),
        (lambda: 1 / 0, ZeroDivisionError),
    ],
    ids=["in a thread", "Ctrl-C", "an error"],
)
def test_ctrl_c_or_an_error_stops_all_threads_at_once_and_leaves_nothing(
    long_parents, interrupt, error
):
    folder, told = long_parents[0].parent, []

    def stop_at_the_third(done, total):
        told.append(done)
        time.sleep(0.01)
        if len(told) == 3:
            interrupt()

    options = StreamSettings(workers=4, chunk_blocks=1, on_progress=stop_at_the_third)
    with pytest.raises(error):
        extract(*long_parents, folder / "skill", settings=options)
    assert len(told) < 20  # Of 200.
    assert not [t for t in threading.enumerate() if t.name.startswith("skill")]
    assert names(folder) == ["rl", "sft"]


def test_an_error_midway_keeps_the_older_artefact(long_parents):
    folder = long_parents[0].parent
    both(folder, StreamSettings())
    before = contents(folder / "skill"), contents(folder / "adapted")

    def fail(done, total):
        if done > total / 2:
            raise RuntimeError("midway")

    options = StreamSettings(workers=2, chunk_blocks=1, on_progress=fail)
    with pytest.raises(RuntimeError, match="midway"):
        extract(*long_parents, folder / "skill", settings=options)
    with pytest.raises(RuntimeError, match="midway"):
        inject(long_parents[1], folder / "skill", folder / "adapted", settings=options)
    assert (contents(folder / "skill"), contents(folder / "adapted")) == before
    assert names(folder) == ["adapted", "rl", "sft", "skill"]


@pytest.mark.parametrize("operation", ["extract", "inject"])
def test_a_killed_writer_leaves_nothing_visible_and_the_next_one_cleans_up(
    parents, tmp_path, operation
):
    rl, sft = parents
    extract(rl, sft, tmp_path / "skill")
    inputs = (rl, sft) if operation == "extract" else (sft, tmp_path / "skill")
    with python(SLOW_WRITER, operation, *inputs, tmp_path / "out") as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half written\n"
        writer.kill()
        assert writer.wait(timeout=30) == -signal.SIGKILL
    left = set(names(tmp_path)) - {"rl", "sft", "skill"}
    assert left
    assert all(name.startswith(".out.writing.") for name in left)
    {"extract": extract, "inject": inject}[operation](*inputs, tmp_path / "out")
    assert names(tmp_path) == ["out", "rl", "sft", "skill"]
    if operation == "extract":
        assert contents(tmp_path / "out") == contents(tmp_path / "skill")
    else:
        rounded = {n: w.to(load_weights(sft)[n].dtype) for n, w in load_weights(rl).items()}
        assert_same_bits(load_weights(tmp_path / "out"), rounded)


def test_two_writers_of_one_artefact_leave_one_complete_artefact(parents, tmp_path):
    (tmp_path / "race").mkdir()
    rl, sft = parents
    arguments = (rl, sft, tmp_path / "race", 20)
    writers = [python(RACING_WRITER, me, *arguments, stderr=subprocess.PIPE) for me in "ab"]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    extract(rl, sft, tmp_path / "alone")
    for number in range(10):
        skill = tmp_path / "race" / f"skill {number}"
        assert contents(skill) == contents(tmp_path / "alone")
        assert verify(skill, parents=True).parents == ("rl", "sft")
    assert [name for name in names(tmp_path / "race") if name.startswith(".")] == []


def test_a_writer_that_is_overtaken_at_the_last_moment_replaces_the_other(
    parents, tmp_path, monkeypatch
):
    rename = os.rename

    def overtaken(*paths, **options):
        monkeypatch.setattr(os, "rename", rename)
        extract(*parents, tmp_path / "skill")
        rename(*paths, **options)

    monkeypatch.setattr(os, "rename", overtaken)
    extract(*parents, tmp_path / "skill")
    assert verify(tmp_path / "skill", parents=True).parents == ("rl", "sft")
    assert names(tmp_path) == ["rl", "sft", "skill"]


def test_a_full_disk_keeps_the_older_artefact_and_leaves_no_other(parents, tmp_path, small_disk):
    rl, sft = parents
    extract(rl, sft, small_disk / "skill")
    inject(sft, small_disk / "skill", small_disk / "adapted")
    before = contents(small_disk / "skill"), contents(small_disk / "adapted")
    large = random_tensors(0, {"w": (2, BLOCK)})
    make_checkpoint(tmp_path / "large sft", large)
    make_checkpoint(tmp_path / "large rl", nudged(large, 1))
    extract(tmp_path / "large rl", tmp_path / "large sft", tmp_path / "large skill")
    with pytest.raises(StorageError, match=r"more space than its disk has.*skill is intact"):
        extract(tmp_path / "large rl", tmp_path / "large sft", small_disk / "skill")
    with pytest.raises(StorageError, match=r"more space than its disk has.*adapted is intact"):
        inject(tmp_path / "large sft", tmp_path / "large skill", small_disk / "adapted")
    with pytest.raises(StorageError, match="no partial one is left behind"):
        inject(tmp_path / "large sft", tmp_path / "large skill", small_disk / "new")
    assert (contents(small_disk / "skill"), contents(small_disk / "adapted")) == before
    assert names(small_disk) == ["adapted", "skill"]
