"""GPTQ is read as gptqmodel reads it."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, NonFinite, UnsupportedFormat
from pipeline.formats import gptq
from pipeline.formats.rounded import Rounded
from pipeline.jobs import Job
from pipeline.quantization_config import Quantization
from pipeline.stages import upcast
from tests.formats.groups import by_rows, check_same, pack_last, packed, quantized

V2 = {"checkpoint_format": "gptq_v2"}


def module(codes, zeros, scales, *, bits=4, g_idx=None):
    """Codes [I, O], zeros and scales [G, O] as a module with v2 zeros."""
    tensors = {
        "qweight": pack_last(codes.T, bits).T.contiguous(),
        "qzeros": pack_last(zeros, bits),
        "scales": scales.half(),
    }
    return tensors if g_idx is None else tensors | {"g_idx": torch.tensor(g_idx, dtype=torch.int32)}


def eight():
    """Eight inputs of one output (and seven of zeros), zero point 8, scale 0.5."""
    codes = torch.zeros(8, 8, dtype=torch.int32)
    codes[:, 0] = torch.tensor([0, 1, 7, 8, 9, 15, 8, 3])
    return module(codes, torch.full((1, 8), 8), torch.full((1, 8), 0.5), g_idx=[0] * 8)


EIGHT = [-4.0, -3.5, -0.5, 0.0, 0.5, 3.5, 0.0, -2.5]


def test_eight_values_packed_by_hand():
    weight = gptq.dequantize(packed(eight()), quantized("gptq", bits=4, group_size=8, **V2))
    assert weight.dtype == torch.float32
    assert weight[0].tolist() == EIGHT


def test_v1_stores_zero_points_minus_one():
    tensors = eight()
    tensors["qzeros"] = torch.tensor([[0x77777777]], dtype=torch.int32)
    for version in ({}, {"checkpoint_format": "gptq"}, {"format": "gptq"}):
        weight = gptq.dequantize(packed(tensors), quantized("gptq", bits=4, group_size=8, **version))
        assert weight[0].tolist() == EIGHT


def test_a_v1_zero_point_of_zero_borrows_from_its_neighbour():
    """Zero points 0 and 8 are word 0x...80; less 0x...11 they are stored as 0x...6F, and 6 means 8, not 7."""
    tensors = eight()
    tensors["qzeros"] = torch.tensor([[0x7777776F]], dtype=torch.int32)
    weight = gptq.dequantize(packed(tensors), quantized("gptq", bits=4, group_size=8))
    assert weight[:3, 0].tolist() == [0.0, -4.0, -4.0]


def test_group_size_minus_one_is_one_group_of_the_whole_channel():
    weight = gptq.dequantize(packed(eight()), quantized("gptq", bits=4, group_size=-1, **V2))
    assert weight[0].tolist() == EIGHT


def test_g_idx_says_which_group_an_input_is_in():
    codes = torch.full((8, 8), 9)
    scales = torch.stack([torch.ones(8), torch.full((8,), 2.0)])
    tensors = module(codes, torch.full((2, 8), 8), scales, g_idx=[0, 1, 1, 0, 0, 1, 0, 1])
    weight = gptq.dequantize(packed(tensors), quantized("gptq", bits=4, group_size=4, desc_act=True, **V2))
    assert weight[3].tolist() == [1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 1.0, 2.0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), group_size=st.sampled_from([8, 24, 64, -1]), ordered=st.booleans())
def test_what_was_packed_comes_back(bits, seed, group_size, ordered):
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs, groups = 64, 96, 1 if group_size == -1 else -(-64 // group_size)
    codes = torch.randint(2**bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(2**bits, (groups, outputs), generator=generator)
    scales = torch.rand(groups, outputs, generator=generator).half()
    order = torch.arange(inputs) // (inputs if group_size == -1 else group_size)
    order = order[torch.randperm(inputs, generator=generator)] if ordered else order
    tensors = module(codes, zeros, scales, bits=bits, g_idx=order.tolist())
    config = quantized("gptq", bits=bits, group_size=group_size, desc_act=ordered, **V2)
    expected = ((codes - zeros[order]) * scales.float()[order]).T
    assert torch.equal(gptq.dequantize(packed(tensors), config), expected)
    assert torch.equal(by_rows(gptq, packed(tensors), config, step=32), expected)
    assert gptq.dense_shape(packed(tensors), config) == (outputs, inputs)


def test_eight_values_are_written_as_they_were_packed_by_hand():
    groups = torch.zeros(8, dtype=torch.int32)
    codes = torch.tensor([[0, 1, 7, 8, 9, 15, 8, 3]] + [[0] * 8] * 7, dtype=torch.uint8)
    scales, zeros = torch.full((8, 1), 0.5).half(), torch.full((8, 1), 8, dtype=torch.uint8)
    written = gptq.pack(Rounded(bits=4, codes=codes, scales=scales, zeros=zeros, groups=groups))
    expected = eight() | {"qzeros": torch.tensor([[0x77777777]], dtype=torch.int32)}
    assert list(written) == ["qweight", "qzeros", "scales", "g_idx"]
    for part, tensor in expected.items():
        assert torch.equal(written[part], tensor), part
        assert (written[part].dtype, written[part].is_contiguous()) == (tensor.dtype, True), part


def test_a_zero_point_of_zero_borrows_from_its_neighbour_when_written():
    zeros = torch.tensor([[0], *[[8]] * 7], dtype=torch.uint8)
    part = {"scales": torch.ones(8, 1).half(), "groups": torch.zeros(8, dtype=torch.int32)}
    written = gptq.pack(Rounded(bits=4, codes=torch.zeros(8, 8, dtype=torch.uint8), zeros=zeros, **part))
    assert written["qzeros"].tolist() == [[0x7777776F]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), group_size=st.sampled_from([16, 32, 64, -1]), ordered=st.booleans())
def test_what_was_rounded_is_read_back_bit_for_bit(bits, seed, group_size, ordered):
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs, size = 64, 96, 64 if group_size == -1 else group_size
    groups = torch.arange(inputs, dtype=torch.int32) // size
    groups = groups[torch.randperm(inputs, generator=generator)] if ordered else groups
    count = {"dtype": torch.uint8, "generator": generator}
    rounded = Rounded(
        bits=bits, codes=torch.randint(2**bits, (outputs, inputs), **count),
        zeros=torch.randint(2**bits, (outputs, inputs // size), **count),
        scales=torch.rand(outputs, inputs // size, generator=generator).half(), groups=groups,
    )  # fmt: skip
    config = quantized("gptq", bits=bits, group_size=group_size, desc_act=ordered)
    written = packed(gptq.pack(rounded))
    assert torch.equal(gptq.dequantize(written, config), rounded.dense())
    assert gptq.dense_shape(written, config) == (outputs, inputs)
    check_same(gptq.unpack(written, config), rounded)


def test_the_codes_of_v2_come_back_too_and_without_a_g_idx():
    rounded = gptq.unpack(packed(eight()), quantized("gptq", bits=4, group_size=8, **V2))
    assert rounded.codes[0].tolist() == [0, 1, 7, 8, 9, 15, 8, 3]
    assert rounded.zeros.tolist() == [[8]] * 8
    assert rounded.dense()[0].tolist() == EIGHT
    without = {name: tensor for name, tensor in eight().items() if name != "g_idx"}
    check_same(gptq.unpack(packed(without), quantized("gptq", bits=4, group_size=8, **V2)), rounded)


def test_a_grid_of_scales_that_are_no_float16_is_not_taken():
    tensors = eight() | {"scales": torch.ones(1, 8)}
    with pytest.raises(CheckpointError, match="scales is float32, expected float16"):
        gptq.unpack(packed(tensors), quantized("gptq", bits=4, group_size=8, **V2))


def test_dynamic_gives_a_module_other_bits_and_group_size():
    codes = torch.arange(64).reshape(8, 8)
    tensors = module(codes, torch.full((2, 8), 128), torch.ones(2, 8), bits=8, g_idx=[0, 0, 0, 0, 1, 1, 1, 1])
    dynamic = {r"+:.*\.up": {"bits": 8, "group_size": 4}, r"-:.*\.gate": {}}
    config = quantized("gptq", bits=4, group_size=8, dynamic=dynamic, **V2)
    assert torch.equal(gptq.dequantize(packed(tensors, "a.up"), config), (codes - 128).float().T)
    with pytest.raises(CheckpointError, match="says it is dense"):
        gptq.dequantize(packed(tensors, "a.gate"), config)
    with pytest.raises(CheckpointError, match="qweight has 2 rows, expected 1"):
        gptq.dequantize(packed(tensors, "a.down"), config)


@pytest.mark.parametrize(
    ("change", "config", "error", "said"),
    [
        ({"qzeros": None}, {}, MissingTensor, "qzeros is in no shard"),
        ({"scales": None}, {}, MissingTensor, "scales is in no shard"),
        ({"g_idx": None}, {"desc_act": True}, MissingTensor, "desc_act is on, but g_idx is in no shard"),
        (
            {"g_idx": torch.tensor([0, 0, 0, 0, 0, 0, 0, 9])},
            {},
            CheckpointError,
            "names groups 0 to 9, but there are 1",
        ),
        ({"g_idx": torch.tensor([0, 0, 0, 0, 0, 0, 0, -1])}, {}, CheckpointError, "names groups -1 to 0"),
        ({"scales": torch.full((1, 8), torch.nan)}, {}, NonFinite, "scales holds NaN"),
        ({"scales": torch.full((2, 8), 1.0)}, {}, CheckpointError, r"scales has shape \[2, 8\], expected \[1, 8\]"),
        ({"qzeros": torch.zeros(1, 2, dtype=torch.int32)}, {}, CheckpointError, r"qzeros has shape \[1, 2\]"),
        ({"qweight": torch.zeros(1, 8, dtype=torch.int64)}, {}, CheckpointError, "qweight is int64, expected int32"),
        ({"qweight": torch.zeros(8, dtype=torch.int32)}, {}, CheckpointError, "qweight has shape"),
        ({}, {"group_size": 3}, CheckpointError, r"expected \[3, 1\]"),
        ({}, {"group_size": 0}, UnsupportedFormat, "group size 0"),
        ({}, {"bits": 5}, UnsupportedFormat, "bits 5 cannot be read"),
        ({}, {"bits": 3}, UnsupportedFormat, "3 bits pack 32 codes"),
        ({}, {"bits": 8}, CheckpointError, "qweight has 1 rows, expected 2"),
        ({}, {"checkpoint_format": "marlin"}, UnsupportedFormat, "checkpoint_format marlin"),
        ({}, {"pack_dtype": "int64"}, UnsupportedFormat, "packed in int64"),
        ({}, {"dynamic": {"(": {}}}, CheckpointError, "is no regular expression"),
        ({}, {"dynamic": {".*": {"bits": "four"}}}, CheckpointError, "unreadable value"),
        ({}, {"dynamic": {".*": {"bits": float("inf")}}}, CheckpointError, "unreadable value"),
        ({}, {"dynamic": {".*": 4}}, CheckpointError, r"dynamic '\.\*' is int, expected an object"),
        ({}, {"dynamic": [1]}, CheckpointError, "dynamic is list"),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(change, config, error, said):
    tensors = {name: tensor for name, tensor in (eight() | change).items() if tensor is not None}
    with pytest.raises(error, match=said):
        gptq.dequantize(packed(tensors), quantized("gptq", **({"bits": 4, "group_size": 8} | config)))


def test_a_g_idx_out_of_range_is_known_before_anything_is_computed():
    with pytest.raises(CheckpointError, match="g_idx names groups 9 to 9, but there are 1"):
        gptq.dense_shape(packed(eight() | {"g_idx": torch.full((8,), 9)}), quantized("gptq", bits=4, group_size=8))


def test_a_group_size_larger_than_any_weight_is_one_group():
    plain = gptq.dequantize(packed(eight()), quantized("gptq", bits=4, group_size=8))
    assert torch.equal(gptq.dequantize(packed(eight()), quantized("gptq", bits=4, group_size=10**25)), plain)


def test_a_dynamic_pattern_that_backtracks_forever_does_not_hang():
    config = {"bits": 4, "group_size": 8, **V2}
    harmless = quantized("gptq", dynamic={"(a+)+$": {"bits": 8}}, **config)
    assert gptq.dequantize(packed(eight(), "a" * 80 + ".proj"), harmless)[0].tolist() == EIGHT
    hostile = quantized("gptq", dynamic={"(x{1,9999}){1,9999}" * 50: {"bits": 8}}, **config)
    with pytest.raises(CheckpointError, match=r"dynamic pattern .* takes too long"):
        gptq.dequantize(packed(eight(), "x" * 100), hostile)


def test_every_layout_gptqmodel_packs_is_read_as_its_kernel_reads_it(gptqmodel_folder):
    """The kernel rounds (code - zero) * scale to float16; the exact product rounds to that."""
    cases = json.loads((gptqmodel_folder / "cases.json").read_text())
    names = [name for name in cases if name.startswith("gptq")]
    assert len(names) == 36
    for name in names:
        tensors = load_file(gptqmodel_folder / f"{name}.safetensors")
        expected = tensors.pop("expected")
        assert expected.dtype == torch.float16
        weight = gptq.dequantize(packed(tensors), Quantization.parse(cases[name]))
        assert torch.equal(weight.half(), expected), name


def test_every_layout_gptqmodel_packs_is_written_as_it_packs_it(gptqmodel_folder):
    cases = json.loads((gptqmodel_folder / "cases.json").read_text())
    names = [name for name, case in cases.items() if case.get("checkpoint_format") == "gptq"]
    assert len(names) == 24
    for name in names:
        tensors = load_file(gptqmodel_folder / f"{name}.safetensors")
        expected = {part: tensors[part] for part in ("qweight", "qzeros", "scales", "g_idx")}
        grid = {"scales": expected["scales"].T, "groups": expected["g_idx"], "zeros": tensors["zeros"]}
        written = gptq.pack(Rounded(bits=cases[name]["bits"], codes=tensors["codes"], **grid))
        for part, tensor in expected.items():
            assert written[part].dtype == tensor.dtype, (name, part)
            assert torch.equal(written[part], tensor), (name, part)


def test_a_checkpoint_gptqmodel_wrote_becomes_the_weights_it_computes_with(gptqmodel_folder, tmp_path):
    """Act order, asymmetric, v1, down_proj at 8 bits in groups of 64, o_proj left dense."""
    source = gptqmodel_folder / "whole-gptq"
    job = Job(inputs={"source": source}, options={"dtype": "float32"}, workspace=tmp_path)
    (output,) = upcast.run(job)
    dense = load_file(output.folder / "model.safetensors")
    expected = load_file(f"{source}.expected.safetensors")
    assert len(expected) == 6
    for name, weight in expected.items():
        assert torch.equal(dense[f"{name}.weight"].to(weight.dtype), weight), name
    kept = Checkpoint.open(source)
    assert kept.tensors["model.layers.0.self_attn.o_proj.weight"].dtype == "BF16"
