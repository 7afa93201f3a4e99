import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

from past_ray.errors import SkillVectorError, StorageError
from past_ray.locations import open_folder
from past_ray.skill.safetensors_file import StoredTensor, lay_out, num_bytes, read_header
from past_ray.skill.weights import open_weights
from tests.skill_folders import assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(
    NAMES,
    st.tuples(
        st.sampled_from([(), (0,), (1,), (3,), (2, 3), (0, 2), (1, 2, 5)]), st.sampled_from(DTYPES)
    ),
    min_size=1,
    max_size=6,
)


def tensors_of(kinds):
    """Number all entries, so that no two tensors have the same content."""
    tensors, start = {}, 0
    for name, (shape, dtype) in kinds.items():
        numel = math.prod(shape)
        tensors[name] = torch.arange(start, start + numel).to(dtype).view(shape)
        start += numel
    return tensors


def our_file(tensors):
    """Lay out a file with our code; the bytes of the tensors go where it says."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    head, stored = lay_out(shapes, {name: tensor.dtype for name, tensor in tensors.items()})
    size = len(head) + sum(t.numel() * t.element_size() for t in tensors.values())
    content = bytearray(size)
    content[: len(head)] = head
    for name, tensor in tensors.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        content[stored[name].offset : stored[name].offset + len(data)] = data
    return bytes(content)


def read(content, folder):
    (folder / "x.safetensors").write_bytes(content)
    with open_folder(folder).open("x.safetensors") as file:
        return read_header(file, "x.safetensors")


def damaged(content, folder):
    with pytest.raises(StorageError) as caught:
        read(content, folder)
    message = str(caught.value)
    assert message.startswith("x.safetensors must be a complete safetensors file, but ")
    assert message.endswith("Copy or train it again.")
    return message


def with_header(text, data=b""):
    return struct.pack("<Q", len(text)) + text + data


def one_tensor(**entry):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry
    return with_header(json.dumps({"w": entry}).encode(), bytes(8))


NO_TABLE = "its header is no tensor table"
DAMAGED = {
    "empty": (b"", "it has 0 bytes"),
    "no length": (b"1234567", "it has 7 bytes"),
    "endless header": (struct.pack("<Q", 2**63) + b"{}", f"its header claims {2**63} bytes of 10"),
    "no JSON": (with_header(b"not json"), NO_TABLE),
    "a list": (with_header(b"[1, 2]"), NO_TABLE),
    "a number for a tensor": (with_header(b'{"w": 1}'), NO_TABLE),
    "a dtype alone": (with_header(b'{"w": {"dtype": "F32"}}'), NO_TABLE),
    "no text": (with_header(b"\xff\xfe{}"), NO_TABLE),
    "endless nesting": (with_header(b"[" * 200_000), NO_TABLE),
    "shape too large": (one_tensor(shape=[3]), "F32[3] does not fill bytes 0 to 8"),
    "negative shape": (one_tensor(shape=[-1, -2]), "F32[-1, -2] does not fill bytes 0 to 8"),
    "negative offset": (one_tensor(data_offsets=[-8, 0]), "does not fill bytes -8 to 0"),
    "one offset": (one_tensor(data_offsets=[0]), NO_TABLE),
    "infinite offset": (one_tensor(data_offsets=[0, math.inf]), NO_TABLE),
    "gap": (one_tensor(data_offsets=[4, 12]), "w starts at byte"),
    "more data": (one_tensor() + b"1234", "and the file has"),
    "less data": (one_tensor()[:-1], "and the file has"),
}
"""File and what the message says of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@given(kinds=TENSORS)
def test_the_library_reads_what_we_lay_out(kinds):
    tensors = tensors_of(kinds)
    loaded = load(our_file(tensors))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded[name], tensor)


@given(kinds=TENSORS)
def test_we_read_what_the_library_writes(folder, kinds):
    tensors = tensors_of(kinds)
    content = save(tensors, metadata={"format": "pt"})
    found = read(content, folder)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = found[name]
        assert (stored.torch_dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
        data = content[stored.offset : stored.offset + num_bytes(stored)]
        assert data == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(kinds=TENSORS)
def test_data_starts_at_a_multiple_of_eight_and_every_tensor_at_one_of_its_item(kinds):
    shapes = {name: shape for name, (shape, _) in kinds.items()}
    dtypes = {name: dtype for name, (_, dtype) in kinds.items()}
    head, stored = lay_out(shapes, dtypes)
    assert len(head) % 8 == 0
    assert len(head) == 8 + int.from_bytes(head[:8], "little")
    for name, tensor in stored.items():
        assert tensor.offset % dtypes[name].itemsize == 0
    again = lay_out(dict(reversed(shapes.items())), dict(reversed(dtypes.items())))
    assert again == (head, stored)


def test_our_files_say_that_they_hold_torch_tensors(tmp_path):
    (tmp_path / "x").write_bytes(our_file({"w": torch.ones(2)}))
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_occupies_the_bytes_that_its_example_says():
    tensor = StoredTensor(dtype="BF16", shape=(2, 3), offset=128)
    assert (tensor.numel, num_bytes(tensor), tensor.torch_dtype) == (6, 12, torch.bfloat16)
    assert num_bytes(StoredTensor(dtype="F32", shape=(), offset=0)) == 4


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn, torch.complex64],
)
def test_other_dtypes_are_described_and_refused_only_when_they_are_used(folder, dtype):
    content = save({"w": torch.ones(3).to(dtype), "x": torch.ones(2)})
    found = read(content, folder)
    assert num_bytes(found["w"]) == 3 * dtype.itemsize
    with pytest.raises(SkillVectorError, match=f"F32, BF16, F16, found {found['w'].dtype}"):
        _ = found["w"].torch_dtype


@given(position=st.integers(0, 10**6), flipped=st.integers(1, 255))
def test_a_header_with_a_damaged_byte_is_refused_or_still_describes_a_whole_file(
    folder, position, flipped
):
    content = bytearray(our_file({"a": torch.ones(3), "b": torch.ones(2, 2).bfloat16()}))
    head = 8 + int.from_bytes(content[:8], "little")
    content[position % head] ^= flipped
    try:
        found = read(bytes(content), folder)
    except StorageError:
        return
    assert sum(num_bytes(tensor) for tensor in found.values()) == len(content) - head


@given(length=st.integers(0, 10**6))
def test_a_file_cut_off_anywhere_is_refused(folder, length):
    content = our_file({"a": torch.ones(3), "b": torch.ones(2, 2).bfloat16()})
    damaged(content[: length % len(content)], folder)


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_with_what_was_found(folder, case):
    content, told = DAMAGED[case]
    assert told in damaged(content, folder)


def test_overlapping_tensors_are_refused(folder):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"a": entry, "b": entry}).encode()
    assert "starts at byte" in damaged(with_header(text, bytes(8)), folder)


def test_stored_weights_read_any_part_of_a_tensor(tmp_path):
    tensors = {"w": torch.arange(24.0).view(4, 6), "v": torch.arange(5).bfloat16()}
    Path(tmp_path / "model.safetensors").write_bytes(save(tensors))
    weights = open_weights(tmp_path)
    for start, count in ((0, 24), (7, 5), (23, 1), (24, 0)):
        out = torch.empty(count)
        weights.read("w", start, out)
        assert out.tolist() == list(range(start, start + count))
    assert list(weights) == ["v", "w"]
    assert (weights.shapes(), weights.dtypes()["v"]) == ({"v": (5,), "w": (4, 6)}, torch.bfloat16)
    assert_same_bits({name: weights.tensor(name) for name in weights}, tensors)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(save({"w": torch.ones(1000)}))
    weights = open_weights(tmp_path)
    with (tmp_path / "model.safetensors").open("rb+") as file:
        file.truncate(500)
    with pytest.raises(StorageError, match=r"model\.safetensors must have at least .* truncated"):
        weights.tensor("w")
