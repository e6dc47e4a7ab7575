"""torchao is read as its own tensors dequantize themselves."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, TorchAoConfig

from pipeline.catalog import FORMATS, TORCHAO_TENSORS, format_of
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, NonFinite, UnsupportedFormat
from pipeline.formats import torchao_
from pipeline.jobs import Job
from pipeline.sizes import dense_sizes
from pipeline.stages import upcast
from tests.checkpoints import tiny_llama
from tests.formats.groups import by_rows, packed, quantized


def described(kind="Int8Tensor", block=(1, 4), **data):
    """The config of a checkpoint whose headers say this of `layer.weight`."""
    text = json.dumps({"_type": kind, "_data": {"block_size": list(block), **data}})
    return replace(quantized("torchao"), metadata={"layer.weight": text})


def eight():
    """Two outputs of four inputs, a block each: zero points 1 and 0, scales 0.5 and 2."""
    return {
        "weight_qdata": torch.tensor([[-128, -1, 0, 127], [1, 2, 3, 4]], dtype=torch.int8),
        "weight_scale": torch.tensor([[0.5], [2.0]]),
        "weight_zero_point": torch.tensor([[1], [0]], dtype=torch.int8),
    }


def test_eight_values_packed_by_hand():
    weight = torchao_.dequantize(packed(eight()), described())
    assert weight.dtype == torch.float32
    assert weight.tolist() == [[-64.5, -1.0, -0.5, 63.0], [2.0, 4.0, 6.0, 8.0]]


def test_float8_has_no_zero_point():
    codes = torch.tensor([[0.5, 448.0], [-1.75, 0.0]]).to(torch.float8_e4m3fn)
    tensors = {"weight_qdata": codes, "weight_scale": torch.tensor(2.0)}
    weight = torchao_.dequantize(packed(tensors), described("Float8Tensor", (2, 2)))
    assert weight.tolist() == [[1.0, 896.0], [-3.5, 0.0]]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.sampled_from([1, 8, 48]),
    width=st.sampled_from([8, 32, 64]),
    zeros=st.booleans(),
)
def test_what_was_packed_comes_back(seed, height, width, zeros):
    generator = torch.Generator().manual_seed(seed)
    shape, grid = (48, 64), (48 // height, 64 // width)
    tensors = {
        "weight_qdata": torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8),
        "weight_scale": torch.rand(grid, generator=generator),
    }
    expected = tensors["weight_qdata"].float()
    if zeros:
        tensors["weight_zero_point"] = torch.randint(-128, 128, grid, generator=generator, dtype=torch.int8)
        expected -= tensors["weight_zero_point"].float().repeat_interleave(height, 0).repeat_interleave(width, 1)
    expected *= tensors["weight_scale"].repeat_interleave(height, 0).repeat_interleave(width, 1)
    config = described(block=(height, width))
    assert torch.equal(torchao_.dequantize(packed(tensors), config), expected)
    assert torch.equal(by_rows(torchao_, packed(tensors), config, step=20), expected)
    assert torchao_.dense_shape(packed(tensors), config) == shape


def configurations():
    quantization = pytest.importorskip("torchao.quantization")
    group = quantization.PerGroup(32)
    intx, dynamic = quantization.IntxWeightOnlyConfig, quantization.Int8DynamicActivationIntxWeightConfig
    return {
        "int8": quantization.Int8WeightOnlyConfig(),
        "int8 in groups": quantization.Int8WeightOnlyConfig(granularity=group),
        "int8 with int8 activations": quantization.Int8DynamicActivationInt8WeightConfig(),
        "float8": quantization.Float8WeightOnlyConfig(),
        "int4": intx(weight_dtype=torch.int4, granularity=group),
        "asymmetric int2": intx(
            weight_dtype=torch.int2, granularity=group, mapping_type=quantization.MappingType.ASYMMETRIC
        ),
        "int4 with int8 activations": dynamic(weight_dtype=torch.int4, weight_granularity=group),
    }


@pytest.mark.parametrize(
    "case",
    [
        "int8", "int8 in groups", "int8 with int8 activations", "float8", "int4", "asymmetric int2",
        "int4 with int8 activations",
    ],
)  # fmt: skip
def test_a_checkpoint_transformers_wrote_becomes_the_weights_it_computes_with(case, tmp_path):
    """Its tensors round the products to bfloat16, which the exact ones round to as well."""
    settings = TorchAoConfig(configurations()[case])
    dense = tiny_llama(tmp_path / "dense", layers=1)
    model = LlamaForCausalLM.from_pretrained(dense, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    checkpoint = Checkpoint.open(tmp_path / "source")
    assert format_of(checkpoint.quantization) is FORMATS["torchao"]
    expected = {
        f"{name}.weight": module.weight.dequantize()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight) is not torch.nn.Parameter
    }
    assert len(expected) == 7
    job = Job(inputs={"source": checkpoint.path}, options={"dtype": "bfloat16"}, workspace=tmp_path / "work")
    (output,) = upcast.run(job)
    loaded, loading = LlamaForCausalLM.from_pretrained(output.folder, output_loading_info=True, dtype=torch.bfloat16)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights, shapes = loaded.state_dict(), dense_sizes(checkpoint, FORMATS["torchao"]).shapes
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
        assert shapes[name] == tuple(weight.shape)


def test_what_is_packed_for_one_kernel_is_refused_from_its_header(tmp_path):
    assert set(torchao_.CODES) == set(TORCHAO_TENSORS)
    metadata = {"layer.weight": json.dumps({"_type": "Int4Tensor", "_data": {"block_size": [1, 32]}})}
    save_file({"layer._weight_qdata": torch.zeros(2, 16).char()}, tmp_path / "model.safetensors", metadata)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "torchao"}}')
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.quantization.metadata == metadata
    with pytest.raises(UnsupportedFormat, match="layer: its header names none of torchao's Int8Tensor"):
        dense_sizes(checkpoint, FORMATS["torchao"])


@pytest.mark.parametrize(
    ("change", "config", "error", "said"),
    [
        ({"weight_qdata": None}, described(), MissingTensor, "weight_qdata is in no shard"),
        ({"weight_scale": None}, described(), MissingTensor, "weight_scale is in no shard"),
        ({"weight_scale": torch.full((2, 1), torch.nan)}, described(), NonFinite, "weight_scale holds NaN"),
        ({"weight_scale": torch.ones(2, 2)}, described(), CheckpointError, r"\[2, 2\], expected 2 x 1 values"),
        ({"weight_zero_point": torch.ones(2).bool()}, described(), CheckpointError, "weight_zero_point is bool"),
        ({"weight_zero_point": torch.ones(1)}, described(), CheckpointError, "expected 2 x 1 values"),
        ({"weight_qdata": torch.ones(2, 4)}, described(), CheckpointError, "weight_qdata is float32, expected int8"),
        ({"weight_act_pre_scale": torch.ones(4)}, described(), UnsupportedFormat, "act_pre_scale cannot be read"),
        (
            {"weight_qdata": torch.full((2, 4), torch.nan).to(torch.float8_e4m3fn)},
            described("Float8Tensor"),
            NonFinite,
            "weight_qdata holds NaN",
        ),
        ({}, described(block=(1, 3)), CheckpointError, r"blocks of \[1, 3\] do not divide"),
        ({}, described(block=(0, 4)), CheckpointError, "do not divide"),
        ({}, described(block=(4,)), CheckpointError, "do not divide"),
        ({}, described(block=()), CheckpointError, "do not divide"),
        ({}, described(block=("a", 1)), CheckpointError, "its __metadata__ cannot be read"),
        ({}, described(block=(float("inf"), 1)), CheckpointError, "its __metadata__ cannot be read"),
        ({}, described("Float8Tensor"), CheckpointError, "weight_qdata is int8, expected float8_e4m3fn or"),
        ({}, described("Int4TilePackedTo4dTensor"), UnsupportedFormat, "torchao's Int4TilePackedTo4dTensor cannot"),
        ({}, described("Int4Tensor"), UnsupportedFormat, "torchao's Int4Tensor cannot be read, only Int8Tensor"),
        ({}, quantized("torchao"), CheckpointError, "layer.weight: no shard's __metadata__ says what it is"),
        (
            {},
            replace(quantized("torchao"), metadata={"layer.weight": "[1]"}),
            CheckpointError,
            "its __metadata__ cannot be read",
        ),
        (
            {},
            replace(quantized("torchao"), metadata={"layer.weight": "{"}),
            CheckpointError,
            "its __metadata__ cannot be read",
        ),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(change, config, error, said):
    tensors = {name: tensor for name, tensor in (eight() | change).items() if tensor is not None}
    with pytest.raises(error, match=said):
        torchao_.dequantize(packed(tensors), config)
