import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

from past_ray.errors import StorageError
from past_ray.locations import open_folder, write_folder
from tests.object_store import gs_server, make_gs_bucket, make_s3_bucket, s3_server

KILLED_WRITER = """
import sys, time
from past_ray.locations import write_folder
with write_folder(sys.argv[1], commit="manifest") as writer:
    (writer.path / "weights").write_text("new")
    (writer.path / "manifest").write_text("new")
    writer.finished("weights")
    print("uploaded", flush=True)
    time.sleep(60)
"""

LARGE_WRITER = """
import resource, sys
from past_ray.locations import write_folder
def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with write_folder(sys.argv[1] + "/warm", commit="file") as writer:
    (writer.path / "file").write_text("pyarrow is loaded now")
before = peak_mib()
with write_folder(sys.argv[1] + "/large", commit="file") as writer:
    with (writer.path / "file").open("wb") as file:
        file.truncate(400 * 2**20)
print(peak_mib() - before)
"""

CARELESS_READER = """
import sys
from past_ray.locations import open_folder
file = open_folder(sys.argv[1]).open("weights")
file.read_into(memoryview(bytearray(3)), 0)
"""


@pytest.fixture(scope="module")
def servers():
    with ExitStack() as stack:
        yield {"s3": stack.enter_context(s3_server()), "gs": stack.enter_context(gs_server())}


@pytest.fixture(params=["s3", "gs"])
def bucket(request, servers, monkeypatch):
    """An empty bucket of each store, reachable through this process's environment."""
    server = servers[request.param]
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    make_bucket = {"s3": make_s3_bucket, "gs": make_gs_bucket}[request.param]
    return open_folder(make_bucket(server, f"bucket-{uuid.uuid4().hex[:8]}"))


@pytest.fixture
def skill(bucket):
    """A complete folder of an older version."""
    write(bucket / "skill", {"weights": "old", "only-in-old": "old", "manifest": "old"})
    return bucket / "skill"


def write(folder, files):
    with write_folder(folder, commit="manifest") as writer:
        for name, text in files.items():
            (writer.path / name).write_text(text)


def read(folder, name, *, size, offset):
    buffer = bytearray(size)
    with folder.open(name) as file:
        file.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def test_what_was_written_is_read(bucket):
    folder = bucket / "runs" / "skill"
    assert [folder.exists(), folder.names(), folder.has("manifest")] == [False, [], False]
    write(folder, {"weights": "1234", "manifest": '{"rank": 8}'})
    assert [folder.exists(), folder.names(), folder.has("manifest")] == [
        True,
        ["manifest", "weights"],
        True,
    ]
    assert [folder.size("weights"), folder.read_text("weights")] == [4, "1234"]
    assert folder.read_json("manifest") == {"rank": 8}
    assert [(bucket / "runs").exists(), (bucket / "runs").names()] == [True, []]


def test_an_empty_file_is_written_and_read(bucket):
    write(bucket / "skill", {"manifest": ""})
    assert (bucket / "skill").read_bytes("manifest") == b""


def test_a_large_file_arrives_byte_for_byte_and_leaves_the_local_disk(bucket):
    content = np.random.default_rng(0).bytes(37 * 2**20 + 1)
    with write_folder(bucket / "skill", commit="manifest") as writer:
        (writer.path / "weights").write_bytes(content)
        writer.finished("weights")
        assert list(writer.path.iterdir()) == []
        (writer.path / "manifest").write_text("{}")
    assert not writer.path.exists()
    assert (bucket / "skill").read_bytes("weights") == content


def test_threads_share_one_open_file_and_read_ranges(bucket):
    content = np.random.default_rng(0).bytes(2**20)
    with write_folder(bucket / "skill", commit="weights") as writer:
        (writer.path / "weights").write_bytes(content)

    def part(start):
        buffer = bytearray(2**15)
        file.read_into(memoryview(buffer), start)
        return bytes(buffer)

    with (bucket / "skill").open("weights") as file, ThreadPoolExecutor(8) as threads:
        assert b"".join(threads.map(part, range(0, 2**20, 2**15))) == content


def test_a_range_past_the_end_is_reported_as_truncation(skill):
    assert read(skill, "weights", size=2, offset=1) == b"ld"
    with pytest.raises(StorageError, match="skill/weights must have at least 4 bytes, found 3"):
        read(skill, "weights", size=3, offset=1)


def test_a_missing_file_is_named(skill):
    with pytest.raises(StorageError, match=f"^{skill}/absent must be a file, found none"):
        skill.read_bytes("absent")


@pytest.mark.parametrize("method", ["names", "exists", "has", "open"])
def test_reading_from_a_missing_bucket_names_it(bucket, method):
    folder = open_folder(f"{bucket}-absent/skill")
    arguments = ["weights"] if method in ("has", "open") else []
    with pytest.raises(StorageError, match=r"existing bucket, .* no bucket 'bucket-\w+-absent'"):
        getattr(folder, method)(*arguments)


def test_writing_to_a_missing_bucket_fails_before_any_work(bucket):
    reached = False
    with (
        pytest.raises(StorageError, match="existing bucket"),
        write_folder(f"{bucket}-absent/skill", commit="manifest"),
    ):
        reached = True
    assert not reached


def test_a_whole_bucket_is_not_replaced(bucket):
    with pytest.raises(StorageError, match="found a whole bucket"):
        write(bucket, {"manifest": ""})


def test_an_older_version_is_replaced_and_its_other_files_are_gone(skill):
    write(skill, {"weights": "new", "manifest": "new"})
    assert skill.names() == ["manifest", "weights"]
    assert [skill.read_text(name) for name in skill.names()] == ["new", "new"]


def test_subfolders_are_written_but_older_ones_stay(bucket):
    write(bucket / "skill" / "rounds", {"manifest": "a folder of its own"})
    with write_folder(bucket / "skill", commit="manifest") as writer:
        (writer.path / "tokens").mkdir()
        (writer.path / "tokens" / "vocabulary").write_text("words")
        (writer.path / "manifest").write_text("new")
    assert (bucket / "skill" / "tokens").read_text("vocabulary") == "words"
    assert (bucket / "skill" / "rounds").names() == ["manifest"]


def test_the_older_commit_file_goes_before_the_first_upload_and_the_new_one_comes_last(skill):
    with write_folder(skill, commit="manifest") as writer:
        (writer.path / "manifest").write_text("new")
        (writer.path / "weights").write_text("new")
        assert skill.read_text("manifest") == "old"
        writer.finished("manifest")
        assert skill.read_text("manifest") == "old"
        writer.finished("weights")
        assert [skill.has("manifest"), skill.read_text("weights")] == [False, "new"]
    assert skill.read_text("manifest") == "new"


def test_a_reader_that_finds_the_commit_file_finds_every_file(bucket):
    files = {f"part-{number}": "x" for number in range(30)} | {"manifest": "", "zz": "y"}
    found = []

    def watch():
        while not (bucket / "skill").has("manifest"):
            pass
        found.extend((bucket / "skill").names())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    write(bucket / "skill", files)
    watcher.join(timeout=10)
    assert found == sorted(files)


def fail(folder, *, finished, unfinished=()):
    """Write as long as luck lasts."""
    with write_folder(folder, commit="manifest") as writer:
        for name in [*finished, *unfinished]:
            (writer.path / name).write_text("new")
        for name in finished:
            writer.finished(name)
        raise KeyError(writer.path)


def test_a_block_that_fails_leaves_nothing_it_wrote_and_no_commit_file(skill):
    with pytest.raises(KeyError) as caught:
        fail(skill, finished=["weights", "only-in-new", "manifest"])
    assert skill.names() == ["only-in-old"]
    assert not caught.value.args[0].exists()


def test_a_block_that_fails_before_its_first_finished_file_leaves_the_older_version(skill):
    with pytest.raises(KeyError):
        fail(skill, finished=[], unfinished=["weights"])
    assert skill.names() == ["manifest", "only-in-old", "weights"]
    assert skill.read_text("weights") == "old"


def test_a_new_folder_whose_block_fails_does_not_exist(bucket):
    with pytest.raises(KeyError):
        fail(bucket / "skill", finished=["weights"], unfinished=["manifest"])
    assert not (bucket / "skill").exists()


def test_a_writer_that_forgets_the_commit_file_is_told(bucket):
    with pytest.raises(StorageError, match="manifest must be written"):
        write(bucket / "skill", {"weights": "new"})
    assert not (bucket / "skill").exists()


def test_a_writer_killed_before_the_commit_leaves_no_commit_file_and_the_next_one_completes(
    skill, tmp_path
):
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(skill)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "uploaded\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert skill.read_text("weights") == "new"
    assert not skill.has("manifest")
    write(skill, {"other": "newer", "manifest": "newer"})
    assert skill.names() == ["manifest", "other"]


def test_credentials_that_are_not_accepted_are_reported_without_the_secret(servers, monkeypatch):
    server = servers["s3"]
    bucket = make_s3_bucket(server, "guarded")
    for name, value in (server | {"AWS_SECRET_ACCESS_KEY": "hunter2"}).items():
        monkeypatch.setenv(name, value)
    check_credentials_after(server, "0")
    try:
        with pytest.raises(StorageError, match=r"grants access.*AWS_PROFILE") as caught:
            open_folder(f"{bucket}/skill").read_bytes("weights")
        with pytest.raises(StorageError, match=r"grants access.*AWS_PROFILE"):
            write(f"{bucket}/skill", {"manifest": ""})
    finally:
        check_credentials_after(server, "inf")
    assert re.search("ACCESS_DENIED|InvalidAccessKeyId", str(caught.value))
    assert "hunter2" not in str(caught.value)


def check_credentials_after(server, num_requests):
    """Make the S3 server accept only known keys, of which it has none."""
    url = f"{server['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    headers = {"Content-Type": "text/plain"}
    request = urllib.request.Request(url, data=num_requests.encode(), headers=headers)
    urllib.request.urlopen(request, timeout=10).close()


def test_a_large_upload_needs_little_memory(bucket):
    done = subprocess.run(
        [sys.executable, "-c", LARGE_WRITER, str(bucket)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 200  # MiB, of the file's 400.


def test_a_process_that_leaves_a_file_open_ends_cleanly(skill):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CARELESS_READER, str(skill)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - start < 10
