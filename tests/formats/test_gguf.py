"""GGUF blocks are read as the gguf package reads them."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CheckpointError, UnsupportedFormat
from pipeline.formats import gguf
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup
from tests.formats.groups import by_rows

ANY = Quantization(method="gguf", bits=4, group_size=32, symmetric=True, ignored=(), raw={})
NOT_READ = {"Q8_1", "Q8_K", "Q1_0"}
READ = [kind.name for kind, (weights, _) in GGML_QUANT_SIZES.items() if weights > 1 and kind.name not in NOT_READ]


def packed(tensors):
    return TensorGroup(module="blk.0.attn_q", dense_name="blk.0.attn_q.weight", tensors=tensors, packed=True)


def same(ours, theirs):
    """Equal, where random scales make values NaN as well."""
    return torch.equal(torch.nan_to_num(ours), torch.nan_to_num(torch.from_numpy(theirs)))


def half(value):
    return np.float16(value).tobytes()


def test_eight_values_of_q8_0_packed_by_hand():
    codes = [0, 1, -1, 127, -128, 64, 2, -3]
    row = half(0.5) + np.array(codes + [0] * 24, np.int8).tobytes()
    weight = gguf.dequantize(packed({"Q8_0": torch.tensor([list(row)], dtype=torch.uint8)}), ANY)
    assert weight.dtype == torch.float32
    assert weight[0, :8].tolist() == [0.0, 0.5, -0.5, 63.5, -64.0, 32.0, 1.0, -1.5]


def test_eight_values_of_q4_0_packed_by_hand():
    """Byte i has weight i in its low nibble, weight 16 + i in its high one; 8 stands for zero."""
    row = half(0.25) + bytes([0x08, 0x19, 0xF0, 0x7F]) + bytes([0x88] * 12)
    weight = gguf.dequantize(packed({"Q4_0": torch.tensor([list(row)], dtype=torch.uint8)}), ANY)[0]
    assert weight[:4].tolist() == [0.0, 0.25, -2.0, 1.75]
    assert weight[16:20].tolist() == [-2.0, -1.75, 1.75, -0.25]
    assert not weight[4:16].any()


@pytest.mark.parametrize("kind", READ)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.sampled_from([1, 3, 130, 300]), columns=st.sampled_from([1, 3]))
def test_random_blocks_of_every_type_are_what_the_gguf_package_makes_of_them_also_by_rows(kind, seed, rows, columns):
    dtype = GGMLQuantizationType[kind]
    weights, size = GGML_QUANT_SIZES[dtype]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns * size), dtype=np.uint8)
    group = packed({kind: torch.from_numpy(raw)})
    with np.errstate(all="ignore"):
        expected = dequantize(raw, dtype)
    assert gguf.dense_shape(group, ANY) == (rows, columns * weights)
    assert same(gguf.dequantize(group, ANY), expected)
    assert same(by_rows(gguf, group, ANY, step=128), expected)


def test_a_tensor_larger_than_what_is_read_at_a_time_is_whole():
    raw = np.random.default_rng(0).integers(0, 256, (70, 34 * 256), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = dequantize(raw, GGMLQuantizationType.Q8_0)
    assert expected.size > 2 * gguf.CHUNK
    assert same(gguf.dequantize(packed({"Q8_0": torch.from_numpy(raw)}), ANY), expected)


def test_experts_that_lie_in_two_tensors_of_different_types_are_joined():
    rng = np.random.default_rng(0)
    gate = rng.integers(0, 256, (4, 3, 34), dtype=np.uint8)
    up = rng.integers(0, 256, (4, 5, 18), dtype=np.uint8)
    dense = torch.randn(4, 2, 32).bfloat16()
    group = packed({"0.Q8_0": torch.from_numpy(gate), "1.Q4_0": torch.from_numpy(up), "2.BF16": dense})
    with np.errstate(all="ignore"):
        halves = [dequantize(gate, GGMLQuantizationType.Q8_0), dequantize(up, GGMLQuantizationType.Q4_0)]
    expected = np.concatenate([*halves, dense.float().numpy()], axis=1)
    assert gguf.dense_shape(group, ANY) == (4, 10, 32)
    assert same(gguf.dequantize(group, ANY), expected)
    assert same(by_rows(gguf, group, ANY, step=3), expected)


@pytest.mark.parametrize("kind", sorted(NOT_READ))
def test_a_type_that_no_library_dequantizes_is_refused_by_name(kind):
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    with pytest.raises(UnsupportedFormat, match=f"is of ggml type {kind}, which the gguf package cannot dequantize"):
        gguf.dense_shape(packed({kind: torch.zeros(2, size, dtype=torch.uint8)}), ANY)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"Q8_0": torch.zeros(2, 33, dtype=torch.uint8)}, "in blocks of 34 for Q8_0"),
        ({"Q8_0": torch.zeros(2, 34)}, "expected rows of bytes"),
        (
            {"0.Q8_0": torch.zeros(2, 1, 34, dtype=torch.uint8), "1.Q8_0": torch.zeros(3, 1, 34, dtype=torch.uint8)},
            "cannot be joined",
        ),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(tensors, said):
    with pytest.raises(CheckpointError, match=said):
        gguf.dequantize(packed(tensors), ANY)
