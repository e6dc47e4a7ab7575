"""Tensors go in by group and out to their place."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pipeline.catalog import DENSE, FORMATS
from pipeline.checkpoint import INDEX, Checkpoint
from pipeline.errors import CorruptShard
from pipeline.shards import ShardReader


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
