"""A checkpoint that is torn, incomplete or changed is found out, and an older one survives."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from past_ray.engine.learner import GRPOLearner
from past_ray.engine.learner_checkpoint import MANIFEST_FILE, verify_checkpoint
from past_ray.errors import StorageError
from tests.tiny_learner import (
    LORA,
    checkpoint_fixture,  # noqa: F401
    make_learner,
    make_samples,
    on_policy,
    step,
)

FILES = ("model.safetensors", "config.json", "tokenizer.json", "optimizer.pt", "random.pt")
EXTRA = {"position.json": b'{"epoch": 3}', "buffer.bin": bytes(range(256))}


@pytest.fixture(name="learner", scope="module")
def learner_fixture(checkpoint: Path) -> GRPOLearner:
    """Return a learner that has taken a step, so that its optimizer has a state."""
    learner = make_learner(checkpoint)
    step(learner, on_policy(learner, make_samples()))
    return learner


@pytest.fixture(name="saved")
def saved_fixture(learner: GRPOLearner, tmp_path: Path) -> Path:
    """Write a checkpoint."""
    folder = tmp_path / "saved"
    learner.save(folder, extra_files=EXTRA)
    return folder


@pytest.fixture(name="small_disk")
def small_disk_fixture(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system that holds one checkpoint (1.1 MB) but not two."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system is not permitted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_fresh_checkpoint_is_complete_and_lists_every_file(saved: Path):
    verify_checkpoint(saved)
    listed = json.loads((saved / MANIFEST_FILE).read_text())["files"]
    assert {path.name for path in saved.iterdir()} == {*listed, MANIFEST_FILE}
    assert {*FILES, *EXTRA} <= listed.keys()
    assert (saved / "buffer.bin").read_bytes() == EXTRA["buffer.bin"]


@pytest.mark.parametrize("name", [*FILES, *EXTRA])
def test_missing_file_is_named(saved: Path, name: str):
    (saved / name).unlink()
    with pytest.raises(StorageError, match=f"{name} is missing.*continue from an older"):
        verify_checkpoint(saved)


@pytest.mark.parametrize("name", [*FILES, *EXTRA])
def test_torn_file_is_named_with_both_sizes(saved: Path, name: str):
    size = (saved / name).stat().st_size
    os.truncate(saved / name, size - 1)
    with pytest.raises(StorageError, match=f"{name} has {size - 1} bytes instead of {size}"):
        verify_checkpoint(saved)


@pytest.mark.parametrize("name", [*FILES, *EXTRA])
def test_one_changed_bit_is_found(saved: Path, name: str):
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(StorageError, match=f"{name} has changed"):
        verify_checkpoint(saved)


def test_folder_without_the_list_is_incomplete(saved: Path, tmp_path: Path):
    (saved / MANIFEST_FILE).unlink()
    for folder in (saved, tmp_path / "nothing"):
        with pytest.raises(StorageError, match=f"{MANIFEST_FILE}, which is written last, is miss"):
            verify_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": ["a"]}', '{"files": {"config.json": 1}}']
)
def test_torn_list_is_refused(saved: Path, text: str):
    (saved / MANIFEST_FILE).write_text(text)
    with pytest.raises(StorageError, match=MANIFEST_FILE):
        verify_checkpoint(saved)


@pytest.mark.parametrize("name", ["optimizer.pt", MANIFEST_FILE, "a/b", "..", ""])
def test_extra_file_cannot_take_the_place_of_another(
    learner: GRPOLearner, tmp_path: Path, name: str
):
    with pytest.raises(StorageError, match="plain names that are free"):
        learner.save(tmp_path / "saved", extra_files={name: b""})
    assert not (tmp_path / "saved").exists()


def test_full_disk_in_the_middle_keeps_the_older_checkpoint(
    checkpoint: Path, small_disk: Path, tmp_path: Path
):
    learner = make_learner(checkpoint)
    samples = on_policy(learner, make_samples())
    step(learner, samples)
    learner.save(small_disk / "saved")
    step(learner, samples)
    with pytest.raises(StorageError, match=r"needs more space.*previous version of saved is int"):
        learner.save(small_disk / "saved")
    verify_checkpoint(small_disk / "saved")
    assert [path.name for path in small_disk.iterdir()] == ["saved"]
    # Read elsewhere: a model keeps its file open.
    shutil.copytree(small_disk / "saved", tmp_path / "copy")
    assert make_learner(checkpoint, resume_from=tmp_path / "copy").policy_version == 1


def test_adapter_checkpoint_is_verified_too(checkpoint: Path, tmp_path: Path):
    make_learner(checkpoint, lora=LORA).save(tmp_path / "saved")
    verify_checkpoint(tmp_path / "saved")
    state = torch.load(tmp_path / "saved" / "adapter.pt")
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / "saved/adapter.pt")
    with pytest.raises(StorageError, match=r"adapter\.pt has changed"):
        verify_checkpoint(tmp_path / "saved")


def test_verifying_imports_no_torch():
    code = (
        "import sys; import past_ray.engine.learner_checkpoint; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
