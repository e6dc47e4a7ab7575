"""HQQ is read as its own layers compute with it."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from pipeline.catalog import FORMATS, format_of
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, NonFinite, UnsupportedFormat
from pipeline.formats import hqq
from pipeline.jobs import Job
from pipeline.sizes import dense_sizes
from pipeline.stages import upcast
from tests.checkpoints import tiny_llama
from tests.formats.groups import by_rows, packed, quantized

LAYERS = load_file(Path(__file__).parent / "data" / "hqq" / "layers.safetensors")
CASES = sorted({name.rpartition(".")[0] for name in LAYERS})
NAMES = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}


def text(value):
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def pack(table, bits):
    """A table of codes [R, C] as words [ceil(R / P), C], the run of rows that comes first in the highest bits."""
    runs = 10 if bits == 3 else 8 // bits
    rows = -(-len(table) // runs)
    padded = torch.zeros(rows * runs, table.shape[1], dtype=torch.int64)
    padded[: len(table)] = table
    parts = padded.view(runs, rows, -1)
    words = sum(parts[run] << bits * (runs - 1 - run) for run in range(runs))
    return words.to(torch.int32 if bits == 3 else torch.uint8)


def module(codes, zeros, scales, *, bits, size, axis):
    """Codes [O, I], zeros and scales [G] as HQQ stores them."""
    table = codes.reshape(-1, size) if axis == 1 else codes.reshape(size, -1)
    shape = (-1, 1) if axis == 1 else (1, -1)
    return {
        "W_q": pack(table, bits),
        "scale": scales.view(shape),
        "zero": zeros.view(shape),
        "shape": torch.tensor(codes.shape),
        "group_size": torch.tensor(size, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "packing": text(NAMES[bits]),
        "view_as_float": torch.tensor(0, dtype=torch.uint8),
        "quant_scale": torch.tensor(0, dtype=torch.uint8),
        "quant_zero": torch.tensor(0, dtype=torch.uint8),
    }


def eight():
    """Two outputs of four inputs, a group each: zero points 8 and 0.5, scales 0.5 and 2."""
    codes = torch.tensor([[0, 1, 7, 15], [1, 2, 3, 4]])
    return module(codes, torch.tensor([8, 0.5]), torch.tensor([0.5, 2.0]), bits=4, size=4, axis=1)


def test_eight_values_packed_by_hand():
    """The first row has the high nibbles, the second the low ones."""
    tensors = eight()
    assert tensors["W_q"].tolist() == [[0x01, 0x12, 0x73, 0xF4]]
    weight = hqq.dequantize(packed(tensors), quantized("hqq"))
    assert weight.dtype == torch.float32
    assert weight.tolist() == [[-4.0, -3.5, -0.5, 3.5], [1.0, 3.0, 5.0, 7.0]]


def test_axis_0_groups_down_the_columns():
    codes = torch.tensor([[0, 1, 7, 15], [1, 2, 3, 4]])
    scales = torch.tensor([0.5, 1.0, 2.0, 4.0])
    tensors = module(codes, torch.zeros(4), scales, bits=4, size=2, axis=0)
    assert tensors["W_q"].tolist() == [[0x01, 0x12, 0x73, 0xF4]]
    weight = hqq.dequantize(packed(tensors), quantized("hqq"))
    assert weight.tolist() == [[0.0, 1.0, 14.0, 60.0], [0.5, 2.0, 6.0, 16.0]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([8, 4, 3, 2, 1]),
    axis=st.sampled_from([0, 1]),
    size=st.sampled_from([16, 24, 48, 64]),
)
def test_what_was_packed_comes_back(seed, bits, axis, size):
    """With groups that end in the middle of a row, too."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = 64, 48
    groups = outputs * inputs // size
    codes = torch.randint(2**bits, (outputs, inputs), generator=generator)
    zeros, scales = torch.rand(groups, generator=generator), torch.rand(groups, generator=generator)
    tensors = module(codes, zeros, scales, bits=bits, size=size, axis=axis)
    table = codes.float().view(-1, size).T if axis == 1 else codes.float().view(size, -1)
    dense = (table - zeros) * scales
    expected = (dense.T if axis == 1 else dense).reshape(outputs, inputs)
    config = quantized("hqq")
    assert torch.equal(hqq.dequantize(packed(tensors), config), expected)
    for step in (3, 16):
        assert torch.equal(by_rows(hqq, packed(tensors), config, step=step), expected)
    assert hqq.dense_shape(packed(tensors), config) == (outputs, inputs)


@pytest.mark.parametrize("case", CASES)
def test_what_hqq_wrote_is_read_as_it_dequantizes_it(case):
    """In float32 to the bit; in a narrower compute dtype hqq rounds the difference, then the product."""
    tensors = {name.removeprefix(f"{case}."): tensor for name, tensor in LAYERS.items() if name.startswith(f"{case}.")}
    expected = tensors.pop("expected")
    assert set(tensors) - {"W_q"} == {part.removeprefix(".") for part in FORMATS["hqq"].components} - {"W_q"}
    weight = hqq.dequantize(packed(tensors), quantized("hqq"))
    if expected.dtype == torch.float32:
        assert torch.equal(weight, expected)
    else:
        assert torch.allclose(weight, expected.float(), rtol=2 * torch.finfo(expected.dtype).eps, atol=0)


def without(change):
    return {name: tensor for name, tensor in (eight() | change).items() if tensor is not None}


ONE = torch.tensor(1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"scale": None}, MissingTensor, "scale is in no shard"),
        ({"zero": None}, MissingTensor, "zero is in no shard"),
        ({"shape": None}, MissingTensor, "shape is in no shard"),
        ({"packing": None}, MissingTensor, "packing is in no shard"),
        ({"axis": None}, MissingTensor, "axis is in no shard"),
        ({"scale": torch.full((2, 1), torch.nan)}, NonFinite, "scale holds NaN or infinity"),
        ({"zero": torch.full((2, 1), torch.inf)}, NonFinite, "zero holds NaN or infinity"),
        ({"scale": torch.ones(1, 2)}, CheckpointError, r"scale has shape \[1, 2\], expected \[2, 1\]"),
        ({"zero": torch.ones(2)}, CheckpointError, r"zero has shape \[2\], expected \[2, 1\]"),
        ({"W_q": torch.zeros(1, 4, dtype=torch.int32)}, CheckpointError, "W_q is int32, expected uint8"),
        ({"W_q": torch.zeros(2, 4, dtype=torch.uint8)}, CheckpointError, "W_q holds 8 words, expected 4"),
        ({"view_as_float": ONE}, CheckpointError, "W_q is uint8, expected float16 or"),
        (
            {"view_as_float": ONE, "packing": text("3bit_32"), "W_q": torch.zeros(1, 3).half()},
            CheckpointError,
            "no whole number of words",
        ),
        ({"quant_scale": ONE}, UnsupportedFormat, "hqq with quant_scale cannot be read"),
        ({"quant_zero": ONE}, UnsupportedFormat, "hqq with quant_zero cannot be read"),
        ({"packing": text("5bit_u8")}, UnsupportedFormat, "packing '5bit_u8' cannot be read, only 8bit_u8"),
        ({"packing": torch.tensor([255], dtype=torch.uint8)}, UnsupportedFormat, "cannot be read"),
        ({"shape": torch.tensor([2, 4, 1])}, CheckpointError, r"shape has shape \[3\], expected \[2\]"),
        ({"shape": torch.tensor([2, 0])}, CheckpointError, r"says shape \[2, 0\], group_size 4 and axis 1"),
        ({"group_size": torch.tensor(3)}, CheckpointError, "group_size 3"),
        ({"group_size": torch.tensor(0)}, CheckpointError, "group_size 0"),
        ({"axis": torch.tensor(2)}, CheckpointError, "axis 2"),
        ({"axis": torch.tensor([1])}, CheckpointError, "axis has shape"),
        ({"axis": torch.tensor(0.5)}, CheckpointError, "axis is float32"),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(change, error, said):
    with pytest.raises(error, match=said):
        hqq.dequantize(packed(without(change)), quantized("hqq"))


def test_the_config_says_what_most_modules_have():
    params = {"nbits": 4, "group_size": 64, "axis": 1}
    config = quantized("hqq", quant_config={"weight_quant_params": params}, skip_modules=["lm_head"])
    assert (config.bits, config.group_size, config.ignored) == (4, 64, ("lm_head",))
    assert format_of(config) is FORMATS["hqq"]
    assert format_of(quantized("hqq", quant_config={"self_attn.q_proj": {}})) is FORMATS["hqq"]
    with pytest.raises(CheckpointError, match="quantization_config of hqq has an unreadable value"):
        quantized("hqq", quant_config=[1])


def test_a_whole_checkpoint_becomes_the_dense_one_it_stands_for(tmp_path):
    source = tiny_llama(tmp_path / "source", layers=1)
    tensors, expected = load_file(source / "model.safetensors"), {}
    kinds = itertools.cycle([(8, 1), (4, 0), (3, 1), (2, 0), (1, 1)])
    for name, (bits, axis) in zip([name for name in sorted(tensors) if "_proj" in name], kinds, strict=False):
        codes = torch.randint(2**bits, tensors.pop(name).shape, generator=torch.Generator().manual_seed(len(name)))
        groups = codes.numel() // 32
        parts = module(codes, torch.full((groups,), 2.0), torch.full((groups,), 0.125), bits=bits, size=32, axis=axis)
        tensors |= {name.replace("weight", part): tensor for part, tensor in parts.items()}
        expected[name] = (codes - 2).float() / 8
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "skip_modules": ["lm_head"]}
    (source / "config.json").write_text(json.dumps(config))
    (output,) = upcast.run(Job(inputs={"source": source}, options={"dtype": "float32"}, workspace=tmp_path / "work"))
    model, loading = LlamaForCausalLM.from_pretrained(output.folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = model.state_dict()
    assert len(expected) == 7
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    shapes = dense_sizes(Checkpoint.open(source), FORMATS["hqq"]).shapes
    assert all(shapes[name] == tuple(weight.shape) for name, weight in expected.items())
