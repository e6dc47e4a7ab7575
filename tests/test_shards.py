"""Tensors go in by group and out to their place."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.catalog import DENSE, FORMATS
from pipeline.checkpoint import INDEX, Checkpoint
from pipeline.errors import CorruptShard, NoSpace
from pipeline.shard_writer import ShardWriter
from pipeline.shards import DTYPE_NAMES, ShardReader


def checkpoint(folder, *shards):
    """A folder of these shards with an index."""
    for i, tensors in enumerate(shards):
        save_file(tensors, folder / f"{i}.safetensors")
    weight_map = {name: f"{i}.safetensors" for i, tensors in enumerate(shards) for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


def tensors_of(group):
    return {name: tensor.tolist() for name, tensor in group.tensors.items()}


def shapes(tensors):
    return {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_a_packed_module_is_one_group_wherever_its_tensors_lie(tmp_path):
    source = checkpoint(
        tmp_path,
        {"a.qweight": torch.tensor([1]), "a.scales": torch.tensor([2]), "norm.weight": torch.tensor([3])},
        {"a.qzeros": torch.tensor([4]), "a.g_idx": torch.tensor([5]), "a.bias": torch.tensor([6])},
    )
    with ShardReader(source) as reader:
        groups = {group.dense_name: group for group in reader.groups(FORMATS["gptq"])}
        assert tensors_of(groups["a.weight"]) == {"qweight": [1], "scales": [2], "qzeros": [4], "g_idx": [5]}
        assert [name for name, group in groups.items() if group.packed] == ["a.weight"]
        assert tensors_of(groups["a.bias"]) == {"bias": [6]}
        assert set(groups) == {"a.weight", "a.bias", "norm.weight"}


def test_every_tensor_is_in_exactly_one_group(tmp_path):
    names = ["x", "a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4", "b.weight", "b.weight_extra"]
    source = checkpoint(tmp_path, {name: torch.tensor([i]) for i, name in enumerate(names)})
    with ShardReader(source) as reader:
        found = [
            f"{group.module}.{part}".removeprefix(".")
            for group in reader.groups(FORMATS["bnb-4bit"])
            for part in group.tensors
        ]
        assert sorted(found) == sorted(names)
        assert [group.dense_name for group in reader.groups(DENSE)] == list(source.tensors)


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": 1, "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}},
        {"a": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 6]}},
    ],
    ids=["metadata", "dtype"],
)
def test_what_safetensors_itself_cannot_read_is_a_sentence(tmp_path, header):
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(raw).to_bytes(8, "little") + raw + bytes(header["a"]["data_offsets"][1])
    )
    (tmp_path / "config.json").write_text("{}")
    with ShardReader(Checkpoint.open(tmp_path)) as reader, pytest.raises(CorruptShard, match="a cannot be read"):
        reader["a"]


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_is_written_as_safetensors_reads_it(tmp_path, dtype):
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "one": torch.ones((), dtype=torch.float32).to(dtype)}
    with ShardWriter(tmp_path, shapes(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in ("a",))
    assert shapes(found) == shapes(tensors)


def test_tensors_may_be_empty_transposed_and_written_in_any_order(tmp_path):
    tensors = {"empty": torch.zeros(0, 3), "t": torch.arange(6.0).reshape(2, 3).T, "z": torch.tensor([9.0])}
    with ShardWriter(tmp_path, shapes(tensors)) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_exceeds_a_shard_goes_to_the_next_and_an_index_says_so(tmp_path):
    """40 + 40 bytes fit a shard of 100, the next 40 do not; 400 bytes have a shard of their own."""
    tensors = {
        name: torch.full((n,), float(n)) for name, n in (("a", 10), ("b", 10), ("c", 10), ("big", 100), ("d", 1))
    }
    (tmp_path / "config.json").write_text("{}")
    with ShardWriter(tmp_path, shapes(tensors), max_shard_bytes=100) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    written = Checkpoint.open(tmp_path)
    assert {name: int(shard[6:11]) for name, shard in written.weight_map.items()} == {
        "a": 1,
        "b": 1,
        "c": 2,
        "big": 3,
        "d": 4,
    }
    assert set(written.shards) == {f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)}
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": 524}
    with ShardReader(written) as reader:
        assert all(torch.equal(reader[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_never_written_or_written_otherwise_than_announced_is_a_bug(tmp_path):
    announced = {"a": ("F32", (2,))}
    with pytest.raises(AssertionError, match=r"never written: \['a'\]"), ShardWriter(tmp_path, announced):
        pass
    assert not list(tmp_path.iterdir())
    with ShardWriter(tmp_path, announced) as writer:
        with pytest.raises(AssertionError):
            writer.write("a", torch.zeros(2, dtype=torch.float16))
        with pytest.raises(AssertionError):
            writer.write("a", torch.zeros(3))
        writer.write("a", torch.zeros(2))
        with pytest.raises(AssertionError, match="written twice"):
            writer.write("a", torch.zeros(2))


def test_an_error_inside_the_block_comes_through_and_leaves_no_index(tmp_path):
    announced = {"a": ("F32", (20,)), "b": ("F32", (20,))}
    with pytest.raises(KeyError), ShardWriter(tmp_path, announced, max_shard_bytes=100) as writer:
        writer.write("gone", torch.zeros(2))
    assert not (tmp_path / INDEX).exists()


def test_a_full_disk_says_so_before_the_first_tensor(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(NoSpace, match=r"cannot hold the 4\.00 GB"), ShardWriter(tmp_path, {"a": ("F32", (10**9,))}):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
