import gc
import json
import os
import pickle
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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from past_ray.errors import ConfigError, SkillVectorError, StorageError
from past_ray.skill import Rounding, StreamSettings, blocks, extract, inject, verify
from past_ray.skill.blocks import BLOCK
from past_ray.skill.checkpoint import load_weights
from past_ray.skill.stream import plan_shards
from tests.skill_folders import (
    assert_same_bits,
    contents,
    make_checkpoint,
    names,
    nudged,
    random_tensors,
)

SHAPES = {
    "model.embed_tokens.weight": (31, 6),
    "model.layers.0.self_attn.q_proj.bias": (),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (7, 9),
    "model.layers.1.mlp.none.weight": (0, 4),
    "model.norm.weight": (17,),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float32)

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

MEASURED_RUN = """
import sys
from pathlib import Path
from past_ray.skill import StreamSettings, extract, inject

def peak_bytes():
    # ru_maxrss would count the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

for name in sys.argv[1:]:
    folder, options = Path(name), StreamSettings(workers=2)
    extract(folder / "rl", folder / "sft", folder / "skill", settings=options)
    inject(folder / "sft", folder / "skill", folder / "adapted", settings=options)
    print(peak_bytes())
"""


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 8)


@pytest.fixture
def parents(tmp_path):
    """Two model folders whose weights have so little in common that there are corrections."""
    sft = {n: w.to(DTYPES[i % 3]) for i, (n, w) in enumerate(random_tensors(0, SHAPES).items())}
    make_checkpoint(tmp_path / "rl", random_tensors(1, SHAPES))
    make_checkpoint(tmp_path / "sft", sft)
    return tmp_path / "rl", tmp_path / "sft"


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


def python(script, *arguments, **options):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def both(folder, options):
    """Extract and inject in ``folder``; return the bytes of both results."""
    rl, sft, skill, adapted = (folder / name for name in ("rl", "sft", "skill", "adapted"))
    extract(rl, sft, skill, settings=options)
    rounding = Rounding(dtype="bfloat16", seed=3)
    inject(sft, skill, adapted, scale=0.3, rounding=rounding, settings=options)
    return contents(skill), contents(adapted)


def test_bytes_do_not_depend_on_workers_chunks_or_the_files_of_the_inputs(parents, small_blocks):
    rl, sft = parents
    weights = {folder: load_file(folder / "model.safetensors") for folder in parents}
    expected = both(rl.parent, StreamSettings(workers=1, chunk_blocks=100))
    assert "corrections.safetensors" in expected[0]

    @given(
        workers=st.integers(1, 4),
        chunk_blocks=st.integers(1, 5),
        rl_shard=st.none() | st.integers(1, 2000),
        sft_shard=st.none() | st.integers(1, 2000),
    )
    @settings(max_examples=25)
    def check(workers, chunk_blocks, rl_shard, sft_shard):
        make_checkpoint(rl, weights[rl], shard_bytes=rl_shard)
        make_checkpoint(sft, weights[sft], shard_bytes=sft_shard)
        found = both(rl.parent, StreamSettings(workers=workers, chunk_blocks=chunk_blocks))
        assert found == expected

    check()


def test_bytes_do_not_depend_on_how_many_threads_torch_has(tmp_path):
    sft = random_tensors(0, {"w": (3, BLOCK)})
    make_checkpoint(tmp_path / "rl", random_tensors(1, {"w": (3, BLOCK)}))
    make_checkpoint(tmp_path / "sft", sft)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(both(tmp_path, StreamSettings(workers=2)))
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_tensors_do_not_depend_on_the_size_of_the_output_files(parents, small_blocks):
    folder = parents[0].parent
    both(folder, StreamSettings(workers=1))
    expected = [load_file(folder / name / "model.safetensors") for name in ("skill", "adapted")]
    manifest = json.loads((folder / "skill" / "skill.json").read_text())

    @given(shard_bytes=st.integers(1, 3000))
    @settings(max_examples=25)
    def check(shard_bytes):
        both(folder, StreamSettings(workers=2, max_shard_bytes=shard_bytes))
        for name, tensors in zip(("skill", "adapted"), expected, strict=True):
            index = json.loads((folder / name / "model.safetensors.index.json").read_text())
            found = {}
            for file in sorted(set(index["weight_map"].values())):
                shard = load_file(folder / name / file)
                num_bytes = sum(t.numel() * t.element_size() for t in shard.values())
                assert num_bytes <= shard_bytes or len(shard) == 1
                assert {n for n, f in index["weight_map"].items() if f == file} == shard.keys()
                found |= shard
            assert_same_bits(found, tensors)
            weight_files = {n for n in names(folder / name) if n.startswith("model")}
            assert weight_files == {*index["weight_map"].values(), "model.safetensors.index.json"}
        again = json.loads((folder / "skill" / "skill.json").read_text())
        assert again["vector_hash"] == manifest["vector_hash"]
        assert again["tensors"] == manifest["tensors"]

    check()


def test_shards_are_filled_in_the_order_of_names_and_numbered():
    shapes = {"c": (3,), "a": (1,), "b": (2,), "d": (9,), "e": ()}
    dtypes = dict.fromkeys(shapes, torch.float32) | {"c": torch.bfloat16}
    shards = plan_shards(shapes, dtypes, max_shard_bytes=12)
    assert [list(shard.shapes) for shard in shards] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [shard.file for shard in shards][:2] == [
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
    ]
    [whole] = plan_shards(shapes, dtypes, max_shard_bytes=10**9)
    assert (whole.file, whole.numel) == ("model.safetensors", 16)


def test_shards_may_be_done_elsewhere_and_in_any_order(parents, small_blocks):
    here = StreamSettings(max_shard_bytes=400)
    expected = both(parents[0].parent, here)

    def run_elsewhere(tasks):
        assert len(tasks) > 1
        return [pickle.loads(pickle.dumps(task)).run() for task in reversed(tasks)]

    elsewhere = StreamSettings(max_shard_bytes=400, run_shards=run_elsewhere)
    assert both(parents[0].parent, elsewhere) == expected


@pytest.mark.parametrize("shard_bytes", [10**9, 400])
def test_progress_counts_every_entry_once(parents, small_blocks, shard_bytes):
    told = []
    options = StreamSettings(
        workers=4,
        chunk_blocks=1,
        max_shard_bytes=shard_bytes,
        on_progress=lambda done, total: told.append((done, total)),
    )
    extract(*parents, parents[0].parent / "skill", settings=options)
    total = 31 * 6 + 1 + 64 + 63 + 17
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(told) == 24 + 1 + 8 + 8 + 1 + 3  # Chunks; a tensor without entries has one too.


@pytest.mark.parametrize("name", ["workers", "chunk_blocks", "max_shard_bytes"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        StreamSettings(**{name: 0})


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_does_not_grow_with_the_model():
    megabyte = 2**20
    with tempfile.TemporaryDirectory() as name:
        folders = []
        for size in (1, 64, 256):
            folders.append(Path(name, str(size)))
            sft = random_tensors(0, {"w": (megabyte // 16, 4)})
            pair = (nudged(sft, 1, by=1e-4), sft)
            for role, weights in zip(("rl", "sft"), pair, strict=True):
                make_checkpoint(folders[-1] / role, {"w": weights["w"].repeat(size, 1)})
        with python(MEASURED_RUN, *folders) as run:
            assert run.stdout is not None
            peaks = [int(line) for line in run.stdout.read().split()]
    # The first, small one has loaded everything there is to load.
    assert len(peaks) == 3
    assert peaks[2] - peaks[1] < 32 * megabyte
    assert peaks[2] - peaks[0] < 64 * megabyte
