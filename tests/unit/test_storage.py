import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from past_ray import storage
from past_ray.errors import DataError, StorageError
from past_ray.skill.checkpoint import load_weights, save_checkpoint
from past_ray.storage import append_jsonl, atomic_directory, read_jsonl, write_json, write_text
from tests.tiny_model import make_tiny_model

KILLED_WRITER = """
import sys, time
from pathlib import Path
from past_ray.storage import atomic_directory
with atomic_directory(Path(sys.argv[1])) as writing:
    (writing / "weights").write_text("new, first half")
    print("half written", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system is not permitted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def write_version(path, content):
    with atomic_directory(path) as writing:
        (writing / "weights").write_text(content)


def start_writer_and_kill_it(path):
    """Kill a process in the middle of an atomic_directory block; return its process id."""
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "half written\n"
    writer.send_signal(signal.SIGKILL)
    assert writer.wait(timeout=30) == -signal.SIGKILL
    writer.stdout.close()
    return writer.pid


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


def test_directory_appears_only_when_the_block_has_ended(tmp_path):
    path = tmp_path / "deep" / "checkpoint"
    with atomic_directory(path) as writing:
        (writing / "weights").write_text("new")
        assert not path.exists()
    assert (path / "weights").read_text() == "new"
    assert names(path.parent) == ["checkpoint"]


def test_replacing_a_directory_leaves_none_of_its_old_files(tmp_path):
    path = tmp_path / "checkpoint"
    write_version(path, "old")
    (path / "extra").write_text("of the old version")
    write_version(path, "new")
    assert names(path) == ["weights"]
    assert (path / "weights").read_text() == "new"
    assert names(tmp_path) == ["checkpoint"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps two names in one step")
def test_the_final_name_is_never_absent_during_replacements(tmp_path):
    path = tmp_path / "checkpoint"
    write_version(path, "old")
    writer = threading.Thread(target=lambda: [write_version(path, "new") for _ in range(100)])
    writer.start()
    num_absent = 0
    while writer.is_alive():
        num_absent += not path.exists()
    assert num_absent == 0


def test_replacing_works_on_file_systems_without_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_exchange", lambda left, right: False)
    path = tmp_path / "checkpoint"
    write_version(path, "old")
    write_version(path, "new")
    assert (path / "weights").read_text() == "new"
    assert names(tmp_path) == ["checkpoint"]


def test_a_writer_killed_between_two_renames_is_undone_by_the_next_write(tmp_path):
    path = tmp_path / "checkpoint"
    dead = start_writer_and_kill_it(tmp_path / "other")
    host = storage._sibling(path, "replaced").name.split(".")[3]
    (tmp_path / f".checkpoint.replaced.{host}.{dead}.00000000").mkdir()
    (tmp_path / f".checkpoint.replaced.{host}.{dead}.00000000" / "weights").write_text("old")
    with pytest.raises(KeyError), atomic_directory(path):
        raise KeyError
    assert (path / "weights").read_text() == "old"


def test_an_error_in_the_block_keeps_the_previous_version(tmp_path):
    path = tmp_path / "checkpoint"
    write_version(path, "old")
    with pytest.raises(TypeError), atomic_directory(path) as writing:
        (writing / "weights").write_bytes("text where bytes belong")
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["checkpoint"]


def test_a_kill_in_the_block_keeps_the_previous_version_and_the_next_write_cleans_up(tmp_path):
    path = tmp_path / "checkpoint"
    write_version(path, "old")
    start_writer_and_kill_it(path)
    assert (path / "weights").read_text() == "old"
    assert len(names(tmp_path)) == 2
    write_version(path, "new")
    assert (path / "weights").read_text() == "new"
    assert names(tmp_path) == ["checkpoint"]


def test_a_kill_in_the_first_write_leaves_nothing_under_the_final_name(tmp_path):
    start_writer_and_kill_it(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_living_writer_is_left_alone(tmp_path):
    path = tmp_path / "checkpoint"
    with atomic_directory(path) as slow:
        (slow / "weights").write_text("slow")
        write_version(path, "quick")
        assert (slow / "weights").exists()
    assert (path / "weights").read_text() == "slow"


def test_a_sibling_of_another_host_is_cleaned_only_when_it_is_old(tmp_path):
    path = tmp_path / "checkpoint"
    foreign = tmp_path / ".checkpoint.writing.other-host.1.00000000"
    foreign.mkdir()
    write_version(path, "first")
    assert foreign.exists()
    long_ago = time.time() - storage.ABANDONED_AFTER_S - 60
    os.utime(foreign, (long_ago, long_ago))
    write_version(path, "second")
    assert not foreign.exists()


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    write_version(tmp_path / "real", "old")
    (tmp_path / "latest").symlink_to(tmp_path / "real")
    write_version(tmp_path / "latest", "new")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "real" / "weights").read_text() == "new"


def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path):
    (tmp_path / "checkpoint").write_text("a file")
    with (
        pytest.raises(StorageError, match="found a file"),
        atomic_directory(tmp_path / "checkpoint"),
    ):
        pass


def test_a_full_disk_keeps_the_previous_directory_and_says_so(small_disk):
    path = small_disk / "checkpoint"
    write_version(path, "old")
    with pytest.raises(StorageError) as caught, atomic_directory(path) as writing:
        (writing / "weights").write_bytes(b"0" * 2_000_000)
    message = str(caught.value)
    assert str(path) in message
    assert "bytes were free" in message
    assert "The previous version of checkpoint is intact" in message
    assert (path / "weights").read_text() == "old"
    assert names(small_disk) == ["checkpoint"]


def test_a_full_disk_reported_by_safetensors_is_recognised(small_disk):
    path, weights = small_disk / "checkpoint", {"weight": torch.zeros(1_000_000)}
    with pytest.raises(StorageError, match="no partial one"), atomic_directory(path) as writing:
        save_file(weights, writing / "model.safetensors")
    assert names(small_disk) == []


def test_a_full_disk_reported_by_a_nested_write_names_the_directory(small_disk):
    path = small_disk / "checkpoint"
    with pytest.raises(StorageError) as caught, atomic_directory(path) as writing:
        write_json(writing / "config.json", "0" * 2_000_000)
    assert str(caught.value).startswith(f"{path} needs more space")


def test_a_full_disk_keeps_the_previous_json_and_log_lines(small_disk):
    write_json(small_disk / "report.json", {"accuracy": 0.5})
    append_jsonl(small_disk / "steps.jsonl", {"step": 1})
    (small_disk / "filler").write_bytes(b"0" * 1_030_000)
    with pytest.raises(StorageError, match=r"previous version of report\.json is intact"):
        write_json(small_disk / "report.json", "0" * 100_000)
    with pytest.raises(StorageError, match=r"previous version of steps\.jsonl is intact"):
        append_jsonl(small_disk / "steps.jsonl", "0" * 100_000)
    assert json.loads((small_disk / "report.json").read_text()) == {"accuracy": 0.5}
    assert read_jsonl(small_disk / "steps.jsonl") == [{"step": 1}]
    (small_disk / "filler").unlink()
    append_jsonl(small_disk / "steps.jsonl", {"step": 2})
    assert read_jsonl(small_disk / "steps.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_full_disk_keeps_the_previous_checkpoint(small_disk, tmp_path):
    like = make_tiny_model(tmp_path / "model")
    path = small_disk / "checkpoint"
    save_checkpoint(path, {"weight": torch.ones(1000)}, like=like)
    with pytest.raises(StorageError, match="previous version of checkpoint is intact"):
        save_checkpoint(path, {"weight": torch.zeros(1_000_000)}, like=like)
    assert torch.equal(load_weights(path)["weight"], torch.ones(1000))
    assert names(small_disk) == ["checkpoint"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_and_a_used_up_quota_are_the_same_error(tmp_path, code):
    with pytest.raises(StorageError), atomic_directory(tmp_path / "checkpoint"):
        raise OSError(code, os.strerror(code))


def test_other_os_errors_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError), atomic_directory(tmp_path / "checkpoint"):
        raise PermissionError(errno.EACCES, "denied")


def test_text_is_replaced_whole_and_leaves_no_other_file(tmp_path):
    write_text(tmp_path / "new" / "report.html", "first")
    write_text(tmp_path / "new" / "report.html", "second")
    assert (tmp_path / "new" / "report.html").read_text() == "second"
    assert names(tmp_path / "new") == ["report.html"]


def test_json_that_cannot_be_written_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "report.json", {"seed": 0})
    with pytest.raises(TypeError):
        write_json(tmp_path / "report.json", {"seed": object()})
    assert json.loads((tmp_path / "report.json").read_text()) == {"seed": 0}


def test_numbers_that_json_lacks_become_null(tmp_path):
    value = {"nan": float("nan"), "list": [float("inf"), 1.5], "pair": (1, -float("inf"))}
    write_json(tmp_path / "report.json", value)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == {"nan": None, "list": [None, 1.5], "pair": [1, None]}


def test_lines_come_back_in_order_and_a_missing_file_has_none(tmp_path):
    path = tmp_path / "log" / "steps.jsonl"
    assert read_jsonl(path) == []
    for step in range(3):
        append_jsonl(path, {"step": step, "text": "two\nlines"})
    assert [line["step"] for line in read_jsonl(path)] == [0, 1, 2]


@pytest.mark.parametrize("unfinished", ['{"step": 2, "rew', "x" * 70_000])
def test_an_unfinished_last_line_is_ignored_and_then_overwritten(tmp_path, caplog, unfinished):
    path = tmp_path / "steps.jsonl"
    append_jsonl(path, {"step": 1})
    with path.open("a") as file:
        file.write(unfinished)
    with caplog.at_level(logging.WARNING):
        assert read_jsonl(path) == [{"step": 1}]
    assert f"unfinished last line of {len(unfinished)} bytes" in caplog.text
    append_jsonl(path, {"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = Path(tmp_path / "steps.jsonl")
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2 must be JSON"):
        read_jsonl(path)
