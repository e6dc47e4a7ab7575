"""AWQ is read as gptqmodel's forward pass computes it."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.errors import CheckpointError, MissingTensor, NonFinite, UnsupportedFormat
from pipeline.formats import awq
from pipeline.formats.rounded import Rounded
from pipeline.jobs import Job
from pipeline.quantization_config import Quantization
from pipeline.stages import upcast
from tests.formats.groups import by_rows, check_same, pack_last, packed, quantized

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def interleaved(codes):
    """Codes [R, C] as int32 [R, C / 8]: nibble k of a word holds column ORDER[k] of its eight."""
    return pack_last(codes.reshape(len(codes), -1, 8)[..., ORDER].flatten(1), 4)


def repacked(tensors, weight):
    """The codes that gptqmodel packed, found from the weight that they give."""
    scales = tensors["scales"].T
    size = weight.shape[1] // scales.shape[1]
    groups = (torch.arange(weight.shape[1]) // size).int()
    zeros = [(tensors["qzeros"] >> 4 * nibble & 15).T for nibble in (0, 4, 1, 5, 2, 6, 3, 7)]
    zeros = torch.stack(zeros, 1).flatten(0, 1).to(torch.uint8)
    codes = weight / scales.float()[:, groups] + zeros[:, groups]
    return Rounded(bits=4, codes=codes.round().to(torch.uint8), scales=scales, zeros=zeros, groups=groups)


def eight():
    """Two inputs of eight outputs, zero points 0 to 7, scale 2."""
    return {
        "qweight": interleaved(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8]])),
        "qzeros": interleaved(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])),
        "scales": torch.full((1, 8), 2.0).half(),
    }


def test_eight_values_packed_by_hand():
    """Outputs 0 to 7 lie in nibbles 0, 4, 1, 5, 2, 6, 3, 7."""
    assert eight()["qweight"][0].tolist() == [0x75316420]
    weight = awq.dequantize(packed(eight()), quantized("awq", group_size=2))
    assert weight.dtype == torch.float32
    assert weight.tolist() == [[0, 30], [0, 26], [0, 22], [0, 18], [0, 14], [0, 10], [0, 6], [0, 2]]


def test_group_size_minus_one_is_one_group_of_the_whole_channel():
    weight = awq.dequantize(packed(eight()), quantized("awq", group_size=-1))
    assert weight[7].tolist() == [0, 2]


def test_the_same_values_are_packed_as_they_were_by_hand():
    """Zero points and codes in 8 outputs of two inputs."""
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8]], dtype=torch.uint8).T
    zeros, scales = torch.arange(8, dtype=torch.uint8)[:, None], torch.full((8, 1), 2.0).half()
    rounded = Rounded(bits=4, codes=codes, scales=scales, zeros=zeros, groups=torch.zeros(2, dtype=torch.int32))
    assert all(torch.equal(tensor, eight()[name]) for name, tensor in awq.pack(rounded).items())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), group_size=st.sampled_from([8, 32, -1]))
def test_what_was_packed_comes_back(seed, group_size):
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs, groups = 64, 24, 1 if group_size == -1 else 64 // group_size
    codes = torch.randint(16, (inputs, outputs), generator=generator)
    zeros = torch.randint(16, (groups, outputs), generator=generator)
    scales = torch.rand(groups, outputs, generator=generator).half()
    tensors = {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": scales}
    config = quantized("awq", bits=4, group_size=group_size)
    order = torch.arange(inputs) // (inputs // groups)
    expected = ((codes - zeros[order]) * scales.float()[order]).T
    assert torch.equal(awq.dequantize(packed(tensors), config), expected)
    assert torch.equal(by_rows(awq, packed(tensors), config, step=8), expected)
    assert awq.dense_shape(packed(tensors), config) == (outputs, inputs)
    rounded = Rounded(
        bits=4, codes=codes.T.to(torch.uint8), scales=scales.T, zeros=zeros.T.to(torch.uint8), groups=order.int()
    )
    again = awq.pack(rounded)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(awq.dequantize(packed(again), config), rounded.dense())
    check_same(awq.unpack(packed(again), config), rounded)


@pytest.mark.parametrize(
    ("change", "config", "error", "said"),
    [
        ({"qzeros": None}, {}, MissingTensor, "qzeros is in no shard"),
        ({"scales": torch.full((1, 8), torch.inf)}, {}, NonFinite, "scales holds NaN or infinity"),
        ({"scales": torch.ones(2, 8)}, {}, CheckpointError, r"scales has shape \[2, 8\], expected \[1, 8\]"),
        ({"qweight": torch.zeros(2, 1)}, {}, CheckpointError, "qweight is float32, expected int32"),
        ({}, {"group_size": 3}, UnsupportedFormat, "group size 3 does not divide its 2 inputs"),
        ({}, {"bits": 8}, UnsupportedFormat, "bits 8 cannot be read, only 4"),
        ({}, {"version": "gemv"}, UnsupportedFormat, "layout gemv cannot be read as GEMM"),
        ({}, {"version": "marlin"}, UnsupportedFormat, "layout marlin"),
        ({}, {"checkpoint_format": "gemv_fast"}, UnsupportedFormat, "gemv_fast"),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(change, config, error, said):
    tensors = {name: tensor for name, tensor in (eight() | change).items() if tensor is not None}
    with pytest.raises(error, match=said):
        awq.dequantize(packed(tensors), quantized("awq", **({"bits": 4, "group_size": 2} | config)))


def test_every_layout_gptqmodel_packs_is_read_as_it_computes_with_it(gptqmodel_folder):
    """A forward pass over the identity gives (code - zero) * scale in float16; the exact product rounds to that."""
    cases = json.loads((gptqmodel_folder / "cases.json").read_text())
    names = [name for name in cases if name.startswith("awq")]
    assert len(names) == 3
    for name in names:
        tensors = load_file(gptqmodel_folder / f"{name}.safetensors")
        expected = tensors.pop("expected")
        weight = awq.dequantize(packed(tensors), Quantization.parse(cases[name]))
        assert torch.equal(weight.half(), expected), name
        again = awq.pack(repacked(tensors, weight))
        assert all(torch.equal(again[part], tensor) for part, tensor in tensors.items()), name


def test_a_checkpoint_gptqmodel_wrote_becomes_the_weights_it_computes_with(gptqmodel_folder, tmp_path):
    source = gptqmodel_folder / "whole-awq"
    job = Job(inputs={"source": source}, options={"dtype": "bfloat16"}, workspace=tmp_path)
    (output,) = upcast.run(job)
    dense = load_file(output.folder / "model.safetensors")
    expected = load_file(f"{source}.expected.safetensors")
    assert len(expected) == 7
    for name, weight in expected.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(dense[f"{name}.weight"], weight), name
