import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from past_ray.errors import StorageError
from past_ray.locations import Folder, open_folder, write_folder

PLAIN_NAMES_ONLY = ["", ".", "..", "../secret", "sub/file", "/etc/passwd", "nul\0"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "manifest.json").write_text('{"rank": 8}')
    (tmp_path / "sub").mkdir()
    return open_folder(tmp_path)


@pytest.fixture
def closed_store(monkeypatch, tmp_path):
    """Environment without credentials, whose stores refuse every connection."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "CLOUDSDK_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")


def read(folder, name, *, size, offset):
    buffer = bytearray(size)
    with folder.open(name) as file:
        file.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def write_skill(place, files, *, failure=None):
    with write_folder(place, commit="manifest") as writer:
        for name in files:
            (writer.path / name).write_text(f"{name} of {files}")
            writer.finished(name)
        if failure:
            raise failure


def test_a_path_a_file_uri_and_the_home_sign_name_the_same_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    places = [tmp_path / "a", str(tmp_path / "a"), f"file://{tmp_path}/a", "~/a", "a", Path("~/a")]
    assert {open_folder(place) for place in places} == {Folder(f"{tmp_path}/a")}


def test_a_file_uri_is_read_as_python_writes_it(tmp_path):
    place = tmp_path / "a b%"
    assert open_folder(place.as_uri()).path == place


def test_the_scheme_tells_what_is_local():
    assert open_folder("/data/skill").is_local
    assert not open_folder("s3://bucket/skill").is_local
    assert str(open_folder("gs://bucket/skill/")) == "gs://bucket/skill"


@pytest.mark.parametrize("place", ["hdfs://host/skill", "file://skill", "s3://", "http://host/x"])
def test_a_place_that_cannot_be_is_refused_with_the_schemes_that_can(place):
    with pytest.raises(StorageError, match="file, s3 and gs"):
        open_folder(place)


def test_a_uri_that_lost_a_slash_in_a_path_is_refused():
    with pytest.raises(StorageError, match="given as text"):
        open_folder(Path("s3://bucket/skill"))


def test_a_remote_folder_has_no_path():
    with pytest.raises(StorageError, match="s3://bucket/skill must be a local folder"):
        _ = open_folder("s3://bucket/skill").path


def test_division_goes_into_a_subfolder(folder, tmp_path):
    assert (folder / "sub").path == tmp_path / "sub"
    assert (open_folder("s3://bucket/a") / "b").uri == "s3://bucket/a/b"
    assert (open_folder("/") / "data").uri == "/data"


def test_a_folder_survives_pickling():
    folder = open_folder("s3://bucket/skill")
    assert pickle.loads(pickle.dumps(folder)) == folder


def test_names_are_the_sorted_files_and_a_missing_folder_has_none(folder):
    assert folder.names() == ["manifest.json", "weights"]
    assert (folder / "absent").names() == []
    assert [(folder / name).exists() for name in ("sub", "absent", "weights")] == [True] + [
        False
    ] * 2


def test_has_means_a_file(folder):
    assert [folder.has(name) for name in ("weights", "sub", "absent")] == [True, False, False]


def test_what_was_written_is_read(folder):
    assert folder.size("weights") == 1024
    assert folder.read_bytes("weights") == bytes(range(256)) * 4
    assert folder.read_text("manifest.json") == '{"rank": 8}'
    assert folder.read_json("manifest.json") == {"rank": 8}


@pytest.mark.parametrize("name", ["absent", "sub"])
@pytest.mark.parametrize("method", ["size", "read_bytes", "read_text", "read_json", "open"])
def test_reading_what_is_no_file_names_it(folder, method, name):
    with pytest.raises(StorageError, match=f"^{folder}/{name} must be"):
        getattr(folder, method)(name)


@pytest.mark.parametrize("name", PLAIN_NAMES_ONLY)
@pytest.mark.parametrize(
    "method", ["has", "size", "read_bytes", "read_json", "open", "__truediv__"]
)
@pytest.mark.parametrize("place", ["/data", "s3://bucket/skill"])
def test_a_name_cannot_lead_out_of_its_folder(place, method, name):
    with pytest.raises(StorageError, match="must be plain"):
        getattr(open_folder(place), method)(name)


def test_text_that_is_not_utf8_is_refused_with_its_position(folder):
    (folder.path / "latin").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(StorageError, match=r"latin must be UTF-8 text, .* at byte 3"):
        folder.read_text("latin")


@pytest.mark.parametrize("text", ["[1]", "{", "", "null"])
def test_json_that_is_no_object_is_refused(folder, text):
    (folder.path / "broken.json").write_text(text)
    with pytest.raises(StorageError, match=r"broken\.json must hold a JSON object"):
        folder.read_json("broken.json")


@given(offset=st.integers(0, 1024), size=st.integers(0, 1024))
def test_a_range_is_read_whole_or_not_at_all(tmp_path_factory, offset, size):
    content = bytes(range(256)) * 4
    folder = open_folder(tmp_path_factory.getbasetemp())
    (folder.path / "ranges").write_bytes(content)
    if offset + size <= len(content):
        assert read(folder, "ranges", size=size, offset=offset) == content[offset : offset + size]
    else:
        with pytest.raises(StorageError, match=f"at least {offset + size} bytes, found 1024"):
            read(folder, "ranges", size=size, offset=offset)


def test_a_matrix_is_filled_in_place(folder):
    expected = np.arange(12, dtype=np.float32).reshape(3, 4)
    (folder.path / "matrix").write_bytes(b"head" + expected.tobytes())
    matrix = np.zeros((3, 4), dtype=np.float32)
    with folder.open("matrix") as file:
        file.read_into(memoryview(matrix), 4)
    np.testing.assert_array_equal(matrix, expected)


def test_a_file_cut_while_open_is_reported_as_truncated(folder):
    with folder.open("weights") as file:
        os.truncate(folder.path / "weights", 100)
        with pytest.raises(StorageError, match="weights must have at least 200 bytes, found 100"):
            file.read_into(memoryview(bytearray(150)), 50)


def test_threads_share_one_open_file(folder):
    content = np.random.default_rng(0).bytes(1 << 20)
    (folder.path / "large").write_bytes(content)

    def part(start):
        buffer = bytearray(4096)
        file.read_into(memoryview(buffer), start)
        return bytes(buffer)

    with folder.open("large") as file, ThreadPoolExecutor(8) as threads:
        assert b"".join(threads.map(part, range(0, 1 << 20, 4096))) == content


def test_a_closed_file_is_not_read(folder):
    with folder.open("weights") as file:
        pass
    file.close()
    with pytest.raises(StorageError, match="closed file"):
        file.read_into(memoryview(bytearray(1)), 0)


def test_a_local_folder_is_replaced_as_a_whole(tmp_path):
    write_skill(tmp_path / "skill", ["manifest", "old"])
    write_skill(tmp_path / "skill", ["manifest", "new"])
    folder = open_folder(tmp_path / "skill")
    assert folder.names() == ["manifest", "new"]
    assert folder.read_text("manifest") == "manifest of ['manifest', 'new']"


def test_a_local_folder_stays_when_its_writer_fails(tmp_path):
    write_skill(tmp_path / "skill", ["manifest"])
    with pytest.raises(KeyError, match="no luck"):
        write_skill(tmp_path / "skill", ["manifest", "weights"], failure=KeyError("no luck"))
    assert open_folder(tmp_path / "skill").names() == ["manifest"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["skill"]


def test_a_local_folder_stays_when_its_writer_forgets_the_commit_file(tmp_path):
    write_skill(tmp_path / "skill", ["manifest"])
    with pytest.raises(StorageError, match="skill must get a file 'manifest'"):
        write_skill(tmp_path / "skill", ["weights"])
    assert open_folder(tmp_path / "skill").names() == ["manifest"]


@pytest.mark.parametrize(
    ("place", "advice"),
    [
        ("s3://bucket/skill", ["AWS_ACCESS_KEY_ID", "AWS_PROFILE", "role", "AWS_ENDPOINT_URL"]),
        (
            "gs://bucket/skill",
            ["GOOGLE_APPLICATION_CREDENTIALS", "gcloud auth application-default"],
        ),
    ],
)
def test_a_store_out_of_reach_is_reported_in_seconds_with_what_to_do(closed_store, place, advice):
    start = time.monotonic()
    with pytest.raises(
        StorageError, match=rf"^{place}/weights must .* at 127\.0\.0\.1:1 said: "
    ) as e:
        open_folder(place).read_bytes("weights")
    assert time.monotonic() - start < 20
    assert [words for words in advice if words not in str(e.value)] == []


def test_a_password_in_the_address_of_a_store_is_not_shown(closed_store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:hunter2@127.0.0.1:1")
    with pytest.raises(StorageError) as caught:
        open_folder("s3://bucket/skill").has("weights")
    assert "hunter2" not in str(caught.value)


def test_google_credentials_that_are_missing_are_reported_in_seconds(closed_store, monkeypatch):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/absent/key.json")
    start = time.monotonic()
    with pytest.raises(
        StorageError, match=r"^gs://bucket/skill must .* /absent/key\.json .* `gcloud auth"
    ):
        open_folder("gs://bucket/skill").names()
    assert time.monotonic() - start < 20


def test_local_folders_do_without_pyarrow(tmp_path):
    code = (
        "import sys; from past_ray.locations import open_folder, write_folder\n"
        "with write_folder(sys.argv[1], commit='a') as writer:\n"
        "    (writer.path / 'a').write_text('1')\n"
        "assert open_folder(sys.argv[1]).read_text('a') == '1'\n"
        "sys.exit('pyarrow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "skill")], check=True)
