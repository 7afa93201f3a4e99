"""Results, progress and memory do not depend on how the work is cut."""

import json
import pickle
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from past_ray.errors import ConfigError
from past_ray.skill import StreamSettings, extract
from past_ray.skill.blocks import BLOCK
from past_ray.skill.stream import plan_shards
from tests.skill_folders import assert_same_bits, make_checkpoint, names, nudged, random_tensors
from tests.skill_streams import (
    both,
    parents_fixture,  # noqa: F401
    python,
    small_blocks_fixture,  # noqa: F401
)

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
