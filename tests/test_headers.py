"""A safetensors header is believed only where it accounts for every byte of its file."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from pipeline.errors import CorruptShard
from pipeline.headers import pack_header, read_header

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(folder, header, body=b"\0" * 8):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    return path


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """A file that is written over and over."""
    return tmp_path_factory.mktemp("header") / "model.safetensors"


def test_what_safetensors_wrote_is_read(tmp_path):
    tensors = {"b": torch.zeros(3, 5, dtype=torch.bfloat16), "a": torch.tensor(7), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == {
        "a": ("I64", ()), "b": ("BF16", (3, 5)), "none": ("F32", (0, 4)),
    }  # fmt: skip
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert int.from_bytes(raw[header["a"].start : header["a"].end], "little") == 7


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    header = {"last": {**ENTRY, "data_offsets": [8, 16]}, "first": ENTRY}
    assert list(read_header(written(tmp_path, header, b"\0" * 16))) == ["first", "last"]


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["F32", "BF16", "U8"]), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
        min_size=1,
        max_size=5,
    )
)
def test_a_packed_header_is_read_back_and_accepted_by_safetensors(shard, tensors):
    header, positions = pack_header(tensors)
    assert len(header) % 8 == 0
    sizes = {"F32": 4, "BF16": 2, "U8": 1}
    total = sum(sizes[dtype] * torch.Size(shape).numel() for dtype, shape in tensors.values())
    shard.write_bytes(header + b"\0" * total)
    found = read_header(shard)
    assert {name: (info.dtype, info.shape, info.start) for name, info in found.items()} == {
        name: (dtype, shape, positions[name]) for name, (dtype, shape) in tensors.items()
    }
    assert {name: tuple(tensor.shape) for name, tensor in load(shard.read_bytes()).items()} == {
        name: shape for name, (_, shape) in tensors.items()
    }


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_a_file_cut_short_is_refused(tmp_path, size):
    save_file({"a": torch.zeros(100)}, tmp_path / "x.safetensors")
    path = tmp_path / "cut.safetensors"
    path.write_bytes((tmp_path / "x.safetensors").read_bytes()[:size])
    with pytest.raises(CorruptShard, match=r"cut\.safetensors: .*download it again"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        ([1], "no JSON object"),
        ({"a": 1}, "unreadable entry"),
        ({"a": {**ENTRY, "dtype": "F31"}}, "unreadable entry"),
        ({"a": {**ENTRY, "dtype": []}}, "unreadable entry"),
        ({"a": {**ENTRY, "shape": None}}, "unreadable entry"),
        ({"a": {**ENTRY, "shape": ["2"]}}, "does not span|unreadable"),
        ({"a": {**ENTRY, "shape": [-1, -2]}}, "does not span"),
        ({"a": {**ENTRY, "shape": [2.0]}}, "does not span"),
        ({"a": {**ENTRY, "shape": [3]}}, "does not span"),
        ({"a": {**ENTRY, "data_offsets": [0, 8, 16]}}, "unreadable entry"),
        ({"a": {**ENTRY, "data_offsets": [8, 16]}}, "starts at byte"),
        ({"a": ENTRY, "b": ENTRY}, "b starts at byte"),
        ({}, "its header accounts for"),
        ({"a": {**ENTRY, "shape": [4], "data_offsets": [0, 16]}}, "its header accounts for"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, said):
    with pytest.raises(CorruptShard, match=said):
        read_header(written(tmp_path, header))


def test_a_header_longer_than_the_file_is_not_even_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptShard, match="says its header has 1152921504606846976 bytes, but the file has 10"):
        read_header(path)


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(CorruptShard, match="No such file"):
        read_header(tmp_path / "gone.safetensors")
