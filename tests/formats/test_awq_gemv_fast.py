"""AWQ GEMV fast is read as AutoAWQ packed it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.errors import CheckpointError, MissingTensor, NonFinite, UnsupportedFormat
from pipeline.formats import awq_gemv_fast
from tests.formats.groups import by_rows, packed, quantized

DATA = Path(__file__).parent / "data" / "awq_gemv"


def stream(codes):
    """Codes [O, I] as int16 [O / 4, I], one nibble at a time, by the formula of the layout."""
    outputs, inputs = codes.shape
    values = codes.tolist()
    places = [
        (block, r, half, b, e, d)
        for block in range(inputs // 64)
        for r in range(4)
        for half in range(2)
        for b in range(4)
        for e in range(2)
        for d in range(4)
    ]
    rows = []
    for n in range(outputs // 4):
        nibbles = [values[4 * n + r][64 * block + 32 * half + 8 * d + 2 * b + e] for block, r, half, b, e, d in places]
        words = [sum(nibbles[i + k] << 4 * k for k in range(4)) for i in range(0, len(nibbles), 4)]
        rows.append([word - 0x10000 if word >> 15 else word for word in words])
    return torch.tensor(rows, dtype=torch.int16)


def module(codes, zeros, scales, *, room=8, name="qzeros"):
    """Codes [O, I], zeros and scales [G, O], the last two padded to `room` groups."""
    padding = (0, 0, 0, room - len(zeros))
    scaled = torch.nn.functional.pad(-(zeros * scales), padding).half()
    return {"qweight": stream(codes), "scales": torch.nn.functional.pad(scales, padding).half(), name: scaled}


def four():
    """Four outputs of 64 inputs, output r's codes r + i (mod 16), zero point 8, scale 0.5."""
    codes = (torch.arange(4)[:, None] + torch.arange(64)) % 16
    return module(codes, torch.full((1, 4), 8), torch.full((1, 4), 0.5))


def test_eight_values_packed_by_hand():
    """The first word holds inputs 0, 8, 16, 24, then 1, 9, 17, 25; output 1 starts 16 words on."""
    codes = torch.zeros(4, 64, dtype=torch.int64)
    codes[0, [0, 8, 16, 24, 1, 9, 17, 25]] = torch.arange(1, 9)
    codes[1, 0] = 15
    tensors = module(codes, torch.full((1, 4), 8), torch.full((1, 4), 0.5))
    assert tensors["qweight"][0, :2].tolist() == [0x4321, 0x8765 - 0x10000]
    assert tensors["qweight"][0, 16] == 0x000F
    weight = awq_gemv_fast.dequantize(packed(tensors), quantized("awq", group_size=64))
    assert weight.dtype == torch.float32
    assert weight[0, [0, 8, 16, 24, 1, 9, 17, 25]].tolist() == [-3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]
    assert weight[1, :2].tolist() == [3.5, -4.0]
    assert weight[2:].eq(-4.0).all()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    group_size=st.sampled_from([32, 64, -1]),
    name=st.sampled_from(["qzeros", "scaled_zeros"]),
)
def test_what_was_packed_comes_back(seed, group_size, name):
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = 128, 12
    groups = 1 if group_size == -1 else inputs // group_size
    codes = torch.randint(16, (outputs, inputs), generator=generator)
    zeros = torch.randint(16, (groups, outputs), generator=generator)
    scales = torch.rand(groups, outputs, generator=generator).half()
    tensors = module(codes, zeros, scales, name=name)
    config = quantized("awq", bits=4, group_size=group_size)
    order = torch.arange(inputs) // (inputs // groups)
    expected = codes * scales.float()[order].T + tensors[name].float()[order].T
    assert torch.equal(awq_gemv_fast.dequantize(packed(tensors), config), expected)
    assert torch.equal(by_rows(awq_gemv_fast, packed(tensors), config, step=4), expected)
    assert awq_gemv_fast.dense_shape(packed(tensors), config) == (outputs, inputs)


@pytest.mark.parametrize("size", [32, 128])
def test_what_autoawq_packed_is_read_as_the_weight_it_was_given(size):
    """But for the rounding of zero * scale to float16, which the file has and the weight has not."""
    tensors = load_file(DATA / f"gemv_fast-{size}.safetensors")
    expected = tensors.pop("expected")
    weight = awq_gemv_fast.dequantize(packed(tensors), quantized("awq", group_size=size, version="gemv_fast"))
    bound = tensors["qzeros"].float().abs().T[:, : 128 // size].repeat_interleave(size, 1) * 2**-11
    assert ((weight - expected).abs() <= bound + 1e-7).all()


@pytest.mark.parametrize(
    ("change", "config", "error", "said"),
    [
        ({"qweight": None}, {}, MissingTensor, "qweight is in no shard"),
        ({"qzeros": None}, {}, MissingTensor, "qzeros is in no shard"),
        ({"scales": None}, {}, MissingTensor, "scales is in no shard"),
        ({"scales": torch.full((8, 4), torch.inf)}, {}, NonFinite, "scales holds NaN or infinity"),
        ({"qzeros": torch.full((8, 4), torch.nan)}, {}, NonFinite, "qzeros holds NaN or infinity"),
        ({"scales": torch.ones(8, 8)}, {}, CheckpointError, r"scales has shape \[8, 8\], expected \[any, 4\]"),
        ({"qzeros": torch.ones(7, 4)}, {}, CheckpointError, r"qzeros has shape \[7, 4\], expected \[8, 4\]"),
        ({"qweight": torch.zeros(1, 64, dtype=torch.int32)}, {}, CheckpointError, "qweight is int32, expected int16"),
        ({"qweight": torch.zeros(1, 48, dtype=torch.int16)}, {}, CheckpointError, "48 columns, expected a multiple"),
        ({"qweight": torch.zeros(1, 640, dtype=torch.int16)}, {}, CheckpointError, "8 groups, expected 10 or more"),
        ({}, {"group_size": 48}, UnsupportedFormat, "group size 48 does not divide its 64 inputs"),
        ({}, {"bits": 8}, UnsupportedFormat, "bits 8 cannot be read, only 4"),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(change, config, error, said):
    tensors = {name: tensor for name, tensor in (four() | change).items() if tensor is not None}
    with pytest.raises(error, match=said):
        awq_gemv_fast.dequantize(packed(tensors), quantized("awq", **({"bits": 4, "group_size": 64} | config)))
