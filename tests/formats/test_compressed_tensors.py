"""compressed-tensors is read as its own library reads it."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from pipeline.catalog import FORMATS
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, NonFinite, UnsupportedFormat
from pipeline.formats import compressed_tensors
from pipeline.jobs import Job
from pipeline.sizes import dense_sizes
from pipeline.stages import upcast
from tests.checkpoints import tiny_llama
from tests.formats.groups import by_rows, pack_last, packed, quantized

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
INT4 = {"num_bits": 4, "type": "int", "strategy": "channel"}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 4}


def config(weights, *, targets=("Linear",), **raw):
    groups = {"group_0": {"targets": list(targets), "weights": weights}}
    values = {"format": "pack-quantized", "quantization_status": "compressed", "config_groups": groups, "ignore": []}
    return quantized("compressed-tensors", **(values | raw))


def eight():
    """Codes -8, -7, -1, 0, 1, 7, 0, -5, stored with 8 added; scale 0.5."""
    return {
        "weight_packed": pack_last(torch.tensor([[0, 1, 7, 8, 9, 15, 8, 3]]), 4),
        "weight_scale": torch.tensor([[0.5]], dtype=torch.bfloat16),
        "weight_shape": torch.tensor([1, 8]),
    }


EIGHT = [-4.0, -3.5, -0.5, 0.0, 0.5, 3.5, 0.0, -2.5]


def test_eight_values_packed_by_hand():
    weight = compressed_tensors.dequantize(packed(eight()), config(INT4))
    assert weight.dtype == torch.float32
    assert weight[0].tolist() == EIGHT


def test_zero_points_are_packed_down_each_column():
    """Zero points -1 and 2 of two outputs are the nibbles 7 and 10 of one word."""
    tensors = eight()
    tensors["weight_packed"] = tensors["weight_packed"].repeat(2, 1)
    tensors["weight_scale"] = torch.tensor([[0.5], [0.5]])
    tensors["weight_shape"] = torch.tensor([2, 8])
    asymmetric = config(INT4 | {"symmetric": False})
    for zeros in (torch.tensor([[0xA7]], dtype=torch.int32), torch.tensor([[-1], [2]], dtype=torch.int8)):
        weight = compressed_tensors.dequantize(packed(tensors | {"weight_zero_point": zeros}), asymmetric)
        assert weight[0].tolist() == [value + 0.5 for value in EIGHT]
        assert weight[1].tolist() == [value - 1.0 for value in EIGHT]


def test_nvfp4_divides_its_scales_by_the_global_one():
    """Low nibble first: codes 1.0 and -6.0; scale 448 over 64."""
    packed_codes = torch.tensor([[0xF2] * 8], dtype=torch.uint8)
    scale = torch.full((1, 1), 448.0).to(E4M3)
    tensors = {"weight_packed": packed_codes, "weight_scale": scale, "weight_global_scale": torch.tensor([64.0])}
    nvfp4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    weight = compressed_tensors.dequantize(packed(tensors), config(nvfp4, format="nvfp4-pack-quantized"))
    assert weight[0].tolist() == [7.0, -42.0] * 8


def test_g_idx_says_which_group_an_input_is_in():
    codes = torch.full((1, 8), 9)
    tensors = {
        "weight_packed": pack_last(codes, 4), "weight_scale": torch.tensor([[1.0, 2.0]]),
        "weight_shape": torch.tensor([1, 8]), "weight_g_idx": torch.tensor([0, 1, 1, 0, 0, 1, 0, 1], dtype=torch.int32),
    }  # fmt: skip
    ordered = config(GROUPS | {"actorder": "group"})
    assert compressed_tensors.dequantize(packed(tensors), ordered)[0].tolist() == [1, 2, 2, 1, 1, 2, 1, 2]
    tensors["weight_g_idx"] = torch.full((8,), -1)  # never set
    assert compressed_tensors.dequantize(packed(tensors), ordered)[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]


def compressed(seed, weights, layout, *, outputs, inputs, dtype=torch.bfloat16):
    """A random module as the library compresses it: tensors, and the weight that it decompresses them to."""
    generator = torch.Generator().manual_seed(seed)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    args = scheme.weights
    grid = {
        "tensor": (1,), "channel": (outputs, 1), "group": (outputs, inputs // (args.group_size or 1)),
        "tensor_group": (outputs, inputs // (args.group_size or 1)),
        "block": tuple(-(-n // m) for n, m in zip((outputs, inputs), args.block_structure or (1, 1), strict=True)),
    }[args.strategy]  # fmt: skip
    state = {"weight": torch.randn(outputs, inputs, generator=generator).to(dtype)}
    spread = 2.0 ** (args.num_bits - 1) if args.type == "int" else {4: 6.0, 6: 7.5, 8: 448.0}[args.num_bits]
    scale = ((1 + torch.rand(grid, generator=generator)) * 2 / spread).to(dtype)
    if layout.startswith("mx"):
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = torch.tensor([100.0])
        scale = (scale.float() * 100).to(E4M3).to(dtype)
    state["weight_scale"] = scale
    if not args.symmetric:
        half = 2 ** (args.num_bits - 1)
        state["weight_zero_point"] = torch.randint(-half, half, grid, dtype=torch.int8, generator=generator)
    library = BaseCompressor.get_value_from_registry(layout)
    tensors = library.compress(state, scheme)
    return tensors, library.decompress(tensors, scheme)["weight"]


def check(tensors, expected, quantization):
    group = packed(tensors)
    weight = compressed_tensors.dequantize(group, quantization)
    assert torch.equal(weight.to(expected.dtype), expected)
    assert torch.equal(by_rows(compressed_tensors, group, quantization, step=128), weight)
    assert compressed_tensors.dense_shape(group, quantization) == tuple(expected.shape)


@pytest.mark.parametrize("bits", range(2, 9))
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    outputs=st.integers(33, 150),  # the library cannot unpack zero points that fill no more than one word
    groups=st.integers(1, 4),
    strategy=st.sampled_from(["tensor", "channel", "group"]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_packed_integers_are_what_the_library_decompresses(bits, seed, outputs, groups, strategy, symmetric, dtype):
    """The library rounds to the scales' dtype what is exact here."""
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    inputs = 24 * groups if strategy == "group" else 24 * groups - 1
    weights |= {"group_size": 24} if strategy == "group" else {}
    tensors, expected = compressed(seed, weights, "pack-quantized", outputs=outputs, inputs=inputs, dtype=dtype)
    check(tensors, expected, config(weights))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    outputs=st.integers(1, 150),
    case=st.sampled_from(
        [
            ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
            ("int-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": False}),
            ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
            ("naive-quantized", {"num_bits": 4, "strategy": "group", "group_size": 24, "symmetric": False}),
            ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
            ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
            ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 24}),
            ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}),
            ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
        ]
    ),
)
def test_whole_bytes_are_what_the_library_decompresses(seed, outputs, case):
    """Blocks at the edges are cut short."""
    layout, weights = case
    tensors, expected = compressed(seed, weights, layout, outputs=outputs, inputs=72, dtype=torch.float32)
    check(tensors, expected, config(weights, format=layout))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    outputs=st.integers(1, 150),
    case=st.sampled_from(
        [
            ("nvfp4-pack-quantized", {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}),
            ("mxfp4-pack-quantized", MX | {"num_bits": 4}),
            ("mxfp6-pack-quantized", MX | {"num_bits": 6}),
            ("mxfp8-quantized", MX | {"num_bits": 8}),
        ]
    ),
)
def test_small_floats_are_what_the_library_decompresses(seed, outputs, case):
    layout, weights = case
    weights = weights | {"type": "float"}
    tensors, expected = compressed(seed, weights, layout, outputs=outputs, inputs=96)
    assert layout != "mxfp8-quantized" or tensors["weight_scale"].dtype == torch.uint8
    check(tensors, expected, config(weights, format=layout))


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 4, "strategy": "group", "group_size": 24},
        {"num_bits": 4, "strategy": "group", "group_size": 24, "symmetric": False},
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 3, "strategy": "tensor", "symmetric": False},
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ],
)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)])
def test_frozen_weights_are_rounded_as_each_forward_pass_of_the_library_does(weights, dtypes):
    generator = torch.Generator().manual_seed(4)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    grid = {"group": (150, 3), "channel": (150, 1), "tensor": (1,), "block": (10, 3)}[weights["strategy"]]
    weight = torch.randn(150, 72, generator=generator).to(dtypes[0])
    scale = (0.01 + torch.rand(grid, generator=generator) / 4).to(dtypes[1])
    zeros = torch.randint(-4, 4, grid, dtype=torch.int8, generator=generator)
    zeros = zeros if not weights.get("symmetric", True) else torch.zeros_like(zeros)
    zeros = zeros if weights.get("type") != "float" else None
    expected = fake_quantize(weight, scale, zeros, scheme.weights)
    tensors = {"weight": weight, "weight_scale": scale, "weight_zero_point": zeros}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    before = weight.clone()
    check(tensors, expected, config(weights, format="dense", quantization_status="frozen"))
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    "raw",
    [
        {"format": "dense", "quantization_status": "compressed"},
        {"format": "pack-quantized", "quantization_status": "decompressed"},
    ],
)
def test_decompressed_weights_are_what_the_model_computes_with(raw):
    weight = torch.randn(4, 8).bfloat16()
    group = packed({"weight": weight, "weight_scale": torch.ones(4, 1)})
    assert torch.equal(compressed_tensors.dequantize(group, config(INT4, **raw)), weight.float())


@pytest.mark.parametrize(
    ("module", "scale"),
    [
        ("model.layers.0.self_attn.q_proj", 1.0),
        ("model.layers.0.mlp.experts.0.up_proj", 2.0),
        ("model.layers.7.mlp.down_proj", 4.0),
        ("model.embed_tokens", 8.0),
    ],
)
def test_names_come_before_patterns_and_patterns_before_classes(module, scale):
    """Each scheme's bits make another weight of the same word."""
    bits = {1.0: 4, 2.0: 8, 4.0: 2, 8.0: 3}[scale]
    targets = {"Linear": 4, "re:.*experts.*": 8, "model.layers.7.mlp.down_proj": 2, "Embedding": 3}
    groups = {
        f"group_{i}": {"targets": [target], "weights": INT4 | {"num_bits": n}, "format": "pack-quantized"}
        for i, (target, n) in enumerate(targets.items())
    }
    mixed = config(INT4, format="mixed-precision", config_groups=groups)
    tensors = {
        "weight_packed": pack_last(torch.full((1, 8), 1), bits), "weight_scale": torch.tensor([[scale]]),
        "weight_shape": torch.tensor([1, 8]),
    }  # fmt: skip
    weight = compressed_tensors.dequantize(packed(tensors, module), mixed)
    assert weight.tolist() == [[(1 - 2 ** (bits - 1)) * scale] * 8]


def test_a_name_that_no_target_knows_has_the_only_scheme_there_is():
    only = config(INT4, targets=["re:language_model.*", "re:vision.*"])
    assert compressed_tensors.dequantize(packed(eight(), "model.lm.up_proj"), only)[0].tolist() == EIGHT


def test_which_tensors_belong_together():
    """What quantized activations and caches need is left over; a dense module keeps its weight."""
    row = FORMATS["compressed-tensors"]
    left = ["a.up.input_scale", "a.up.input_zero_point", "a.up.input_global_scale", "a.attn.k_scale", "a.attn.v_scale"]
    names = [
        "a.up.weight_packed", "a.up.weight_scale", "a.up.weight_shape", "a.up.bias", "a.norm.weight", *left,
        "a.down.weight", "a.down.weight_scale", "lm_head.weight",
    ]  # fmt: skip
    assert row.packed_modules(names) == {
        "a.down": (".weight", ".weight_scale"),
        "a.up": (".weight_packed", ".weight_scale", ".weight_shape"),
    }
    assert [name for name in names if name.endswith(row.leftovers)] == left


WHOLE8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
FP8 = {"weight": torch.ones(2, 8).to(E4M3), "weight_scale": torch.ones(2, 1)}
ONLINE = {"config_groups": {"R3": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}
FOLDED = {"config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight_input"}]}}}


def test_transforms_that_are_folded_into_the_weights_change_nothing():
    weight = compressed_tensors.dequantize(packed(eight()), config(INT4, transform_config=FOLDED))
    assert weight[0].tolist() == EIGHT


@pytest.mark.parametrize(
    ("change", "weights", "raw", "error", "said"),
    [
        ({"weight_scale": None}, INT4, {}, MissingTensor, "weight_scale is in no shard"),
        ({"weight_packed": None}, INT4, {}, MissingTensor, "weight is in no shard"),
        ({"weight_shape": None}, INT4 | {"num_bits": 3}, {}, MissingTensor, "weight_shape is in no shard"),
        ({}, INT4 | {"symmetric": False}, {}, MissingTensor, "weight_zero_point is in no shard"),
        ({"weight_scale": torch.tensor([[torch.nan]])}, INT4, {}, NonFinite, "weight_scale holds NaN"),
        ({"weight_scale": torch.tensor([[1]])}, INT4, {}, CheckpointError, "weight_scale is int64, expected"),
        ({"weight_scale": torch.ones(1, 2)}, INT4, {}, CheckpointError, r"shape \[1, 2\], expected \[1, 1\]"),
        ({"weight_shape": torch.tensor([1, 9])}, INT4, {}, CheckpointError, "is not 4 bits for each weight"),
        ({"weight_shape": torch.tensor([1, -8])}, INT4, {}, CheckpointError, "is not 4 bits for each weight"),
        ({"weight_shape": torch.tensor([1.0, 8])}, INT4, {}, CheckpointError, "weight_shape is float32"),
        ({"weight_packed": torch.zeros(1, 1)}, INT4, {}, CheckpointError, "weight_packed is float32"),
        ({}, INT4 | {"num_bits": 8}, {}, CheckpointError, "is not 8 bits for each weight"),
        ({}, INT4 | {"num_bits": 9}, {}, UnsupportedFormat, "int weights of 9 bits"),
        ({}, INT4 | {"num_bits": 1}, {}, UnsupportedFormat, "int weights of 1 bits"),
        ({}, WHOLE8 | {"num_bits": 5}, {}, UnsupportedFormat, "float weights of 5 bits"),
        ({}, INT4 | {"type": "complex"}, {}, UnsupportedFormat, "complex weights"),
        ({}, INT4 | {"num_bits": "four"}, {}, CheckpointError, "unreadable value"),
        ({}, INT4 | {"strategy": "token"}, {}, UnsupportedFormat, "strategy token"),
        ({}, GROUPS | {"group_size": 3}, {}, UnsupportedFormat, "group size 3 does not divide its 8 inputs"),
        ({}, GROUPS | {"group_size": 0}, {}, UnsupportedFormat, "strategy group with group size 0"),
        ({}, INT4 | {"strategy": "block", "block_structure": [0, 4]}, {}, UnsupportedFormat, "strategy block"),
        ({}, GROUPS, {}, CheckpointError, r"weight_scale has shape \[1, 1\], expected \[1, 2\]"),
        (
            {"weight_scale": torch.ones(1, 2), "weight_g_idx": torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])},
            GROUPS,
            {},
            CheckpointError,
            "names groups 0 to 2, but there are 2",
        ),
        ({"weight_packed": None} | FP8, INT4, {}, CheckpointError, "weight is float8_e4m3fn, but its scheme says int"),
        ({"weight_packed": None} | FP8, WHOLE8 | {"num_bits": 4}, {}, CheckpointError, "says float of 4 bits"),
        ({"weight_packed": None, "weight": torch.ones(1, 8)}, INT4, {}, CheckpointError, "weight is float32, but"),
        (
            {"weight_packed": None, "weight": torch.ones(1, 8)},
            WHOLE8 | {"num_bits": 4},
            {"quantization_status": "frozen"},
            UnsupportedFormat,
            "frozen float weights of 4 bits",
        ),
        ({"weight_packed": torch.zeros(1, 8, dtype=torch.uint8)}, WHOLE8, {}, CheckpointError, "8-bit floats cannot"),
        (
            {"weight_packed": torch.zeros(1, 8, dtype=torch.uint8)},
            GROUPS | {"type": "float", "strategy": "tensor_group", "group_size": 16},
            {},
            MissingTensor,
            "weight_global_scale is in no shard",
        ),
        ({}, INT4, {"format": "marlin-24"}, UnsupportedFormat, "layout marlin-24 cannot be read"),
        ({}, INT4, {"format": "sparse-bitmask"}, UnsupportedFormat, "layout sparse-bitmask cannot be read"),
        ({}, INT4, {"format": ["a"]}, UnsupportedFormat, "cannot be read"),
        ({}, INT4, {"sparsity_config": {"format": "sparse-24-bitmask"}}, UnsupportedFormat, "sparse-24-bitmask"),
        ({}, INT4, {"transform_config": ONLINE}, UnsupportedFormat, "transform R3 changes activations"),
        ({}, INT4, {"transform_config": {"config_groups": [1]}}, CheckpointError, "transform_config cannot be read"),
        ({}, {"num_bits": 4, "strategy": "group"}, {}, UnsupportedFormat, "strategy group with group size None"),
        ({}, INT4 | {"num_bits": float("inf")}, {}, CheckpointError, "has an unreadable value"),
        ({}, INT4, {"ignore": 3, "modules_to_not_convert": []}, CheckpointError, "ignore is int, expected a list"),
        ({}, INT4, {"config_groups": {}}, CheckpointError, "config_groups holds no schemes"),
        ({}, INT4, {"config_groups": {"W4A16": ["Linear"]}}, CheckpointError, "config_groups holds no schemes"),
        ({}, INT4, {"config_groups": {"a": {"targets": "Linear"}}}, CheckpointError, "targets that are no list"),
        ({}, INT4, {"config_groups": {"a": {"targets": ["Linear"]}}}, CheckpointError, "has no weights"),
        ({}, INT4, {"ignore": ["re:lay.*"]}, CheckpointError, "ignore says it is dense"),
        ({}, INT4, {"ignore": ["re:("]}, CheckpointError, "ignore pattern .* is no regular expression"),
        (
            {},
            INT4,
            {"config_groups": {n: {"targets": [n], "weights": INT4 | {"group_size": n}} for n in ("a.b", "c")}},
            CheckpointError,
            "no target of quantization_config.config_groups is this module",
        ),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(change, weights, raw, error, said):
    tensors = {name: tensor for name, tensor in (eight() | change).items() if tensor is not None}
    with pytest.raises(error, match=said):
        compressed_tensors.dequantize(packed(tensors), config(weights, **raw))


@pytest.mark.parametrize("key", ["targets", "ignore"])
def test_a_pattern_that_backtracks_forever_does_not_hang(key):
    pattern = "re:" + "(x{1,9999}){1,9999}" * 50
    hostile = config(INT4, targets=[pattern]) if key == "targets" else config(INT4, ignore=[pattern])
    with pytest.raises(CheckpointError, match=rf"{key} pattern .* takes too long"):
        compressed_tensors.dequantize(packed(eight(), "x" * 100), hostile)


def written_by_the_library(folder, groups):
    """A tiny Llama that ModelCompressor compressed and saved; what its modules decompress to."""
    source = tiny_llama(folder, layers=1)
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    apply_quantization_config(
        model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="frozen"),
        show_progress=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.data.copy_(0.005 + torch.rand(parameter.shape, generator=generator) / 100)
        if name.endswith("_zero_point"):
            parameter.data.copy_(torch.randint(-3, 3, parameter.shape, generator=generator))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(source)
    compressor.update_config(source)
    compressor.decompress_model(model)
    return source, model.state_dict()


def test_an_upcast_model_has_the_weights_that_the_library_decompresses(tmp_path):
    """Four schemes in one model, three formats; all packed as the library itself writes them."""
    asymmetric = GROUPS | {"group_size": 32, "symmetric": False}
    groups = {
        "group_0": {"targets": ["re:.*self_attn.[qk]_proj"], "weights": asymmetric},
        "group_1": {"targets": ["model.layers.0.mlp.down_proj"], "weights": INT4 | {"num_bits": 8}},
        "group_2": {"targets": ["re:.*mlp.gate_proj"], "weights": WHOLE8, "format": "float-quantized"},
        "group_3": {"targets": ["Linear"], "weights": GROUPS | {"num_bits": 3, "group_size": 128}},
    }
    source, expected = written_by_the_library(tmp_path / "source", groups)
    raw = json.loads((source / "config.json").read_text())["quantization_config"]
    assert raw["format"] == "mixed-precision"
    job = Job(inputs={"source": source}, options={"dtype": "bfloat16"}, workspace=tmp_path / "work")
    (output,) = upcast.run(job)
    dense = load_file(output.folder / "model.safetensors")
    assert output.metrics["dequantized"] == 7
    assert all(torch.equal(tensor, expected[name]) for name, tensor in dense.items())
    opened = Checkpoint.open(source)
    shapes = dense_sizes(opened, FORMATS["compressed-tensors"]).shapes
    assert shapes == {name: tuple(tensor.shape) for name, tensor in dense.items()}
    _, info = LlamaForCausalLM.from_pretrained(output.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize(("columns", "scales"), [(48, 6), (48, 3), (72, 3)], ids=["nvfp4", "mxfp4", "mxfp6"])
def test_small_floats_have_their_size_from_the_header(tmp_path, columns, scales):
    tensors = {
        "a.weight_packed": torch.zeros(5, columns, dtype=torch.uint8),
        "a.weight_scale": torch.zeros(5, scales, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    assert dense_sizes(Checkpoint.open(tmp_path), FORMATS["compressed-tensors"]).shapes == {"a.weight": (5, 96)}
