"""ModelOpt's NVFP4 is compressed-tensors' with its global scale turned over, its FP8 is FP8."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from pipeline.catalog import FORMATS, format_of
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, NonFinite, UnsupportedFormat
from pipeline.formats import modelopt
from pipeline.jobs import Job
from pipeline.sizes import dense_sizes
from pipeline.stages import upcast
from tests.checkpoints import tiny_llama
from tests.formats.groups import by_rows, packed, quantized

E4M3 = torch.float8_e4m3fn
NVFP4 = quantized("modelopt", quant_algo="NVFP4")
FP8 = quantized("modelopt", quant_algo="FP8")


def nvfp4(seed=0, *, outputs=5, groups=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randint(256, (outputs, 8 * groups), dtype=torch.uint8, generator=generator),
        "weight_scale": (1 + torch.rand(outputs, groups, generator=generator) * 400).to(E4M3),
        "weight_scale_2": torch.tensor(0.001953125),
    }


def test_eight_values_packed_by_hand():
    """Low nibble first: codes 1.0 and -6.0; scale 448 times 2 ** -6."""
    tensors = {
        "weight": torch.tensor([[0xF2] * 8], dtype=torch.uint8), "weight_scale": torch.full((1, 1), 448.0).to(E4M3),
        "weight_scale_2": torch.tensor(2.0**-6),
    }  # fmt: skip
    assert modelopt.dequantize(packed(tensors), NVFP4)[0].tolist() == [7.0, -42.0] * 8


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), outputs=st.integers(1, 300), groups=st.integers(1, 4))
def test_compressed_tensors_makes_the_same_of_it(seed, outputs, groups):
    """A power of two, so that turning it over is exact."""
    tensors = nvfp4(seed, outputs=outputs, groups=groups)
    converted = ModelOptNvfp4Converter(targets=["layer"]).process({f"layer.{n}": t for n, t in tensors.items()})
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    expected = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(
        {name.removeprefix("layer."): tensor for name, tensor in converted.items()},
        QuantizationScheme(targets=["layer"], weights=weights),
    )["weight"]
    group = packed(tensors)
    weight = modelopt.dequantize(group, NVFP4)
    assert torch.equal(weight.to(expected.dtype), expected)
    assert torch.equal(by_rows(modelopt, group, NVFP4, step=128), weight)
    assert modelopt.dense_shape(group, NVFP4) == (outputs, 16 * groups)


@pytest.mark.parametrize("shape", [(), (1,), (256,), (2, 1, 3, 1)])
def test_fp8_has_its_scales_by_tensor_output_or_block(shape):
    codes = torch.randn(256, 384).to(E4M3)
    scales = torch.rand(shape)
    group = packed({"weight": codes, "weight_scale": scales})
    wide = scales[:, None] if shape == (256,) else scales
    if len(shape) == 4:
        wide = scales.squeeze().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(modelopt.dequantize(group, FP8), codes.float() * wide)
    assert torch.equal(by_rows(modelopt, group, FP8, step=128), codes.float() * wide)
    assert modelopt.dense_shape(group, FP8) == (256, 384)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"weight": None}, MissingTensor, "weight is in no shard"),
        ({"weight_scale": None}, MissingTensor, "weight_scale is in no shard"),
        ({"weight_scale_2": None}, MissingTensor, "weight_scale_2 is in no shard"),
        ({"weight_scale": torch.ones(5, 2)}, CheckpointError, "weight_scale is float32, expected float8_e4m3fn"),
        ({"weight_scale": torch.ones(5, 1).to(E4M3)}, CheckpointError, r"shape \[5, 1\], expected \[5, 2\]"),
        ({"weight_scale_2": torch.ones(5)}, CheckpointError, r"weight_scale_2 has shape \[5\], expected a scalar"),
        ({"weight_scale_2": torch.tensor(torch.nan)}, NonFinite, "weight_scale holds NaN"),
        ({"weight": torch.zeros(5, 7, dtype=torch.uint8)}, CheckpointError, "which is not 16 codes"),
        ({"weight": torch.zeros(5, 16, dtype=torch.int32)}, CheckpointError, "weight is int32"),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(change, error, said):
    tensors = {name: tensor for name, tensor in (nvfp4() | change).items() if tensor is not None}
    with pytest.raises(error, match=said):
        modelopt.dequantize(packed(tensors), NVFP4)


def test_another_algorithm_is_refused_with_the_tool_that_can():
    with pytest.raises(UnsupportedFormat, match=r"modelopt in layout w4a8_awq cannot be read, .* run it with vllm"):
        format_of(quantized("modelopt", quant_algo="W4A8_AWQ"))


def test_a_model_that_only_hf_quant_config_describes(tmp_path):
    """FP8 and NVFP4 in one model; the file is no part of the dense one."""
    source = tiny_llama(tmp_path / "source", layers=1)
    tensors = load_file(source / "model.safetensors")
    expected = {}
    for seed, name in enumerate([name for name in tensors if "_proj" in name]):
        module = name.removesuffix(".weight")
        outputs, inputs = tensors[name].shape
        if "mlp" in name:
            parts = nvfp4(seed, outputs=outputs, groups=inputs // 16)
            expected[name] = modelopt.dequantize(packed(parts), NVFP4).bfloat16()
        else:
            parts = {"weight": tensors[name].to(E4M3), "weight_scale": torch.tensor(0.3)}
            expected[name] = (parts["weight"].float() * 0.3).bfloat16()
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MIXED_PRECISION"}})
    )
    opened = Checkpoint.open(source)
    assert opened.quantization.method == "modelopt"
    assert "hf_quant_config.json" in opened.files
    job = Job(inputs={"source": source}, options={"dtype": "bfloat16"}, workspace=tmp_path / "work")
    (output,) = upcast.run(job)
    assert not (output.folder / "hf_quant_config.json").exists()
    dense = load_file(output.folder / "model.safetensors")
    assert len(expected) == 7
    assert all(torch.equal(dense[name], weight) for name, weight in expected.items())
    assert dense_sizes(opened, FORMATS["modelopt"]).shapes == {name: tuple(t.shape) for name, t in dense.items()}
    _, info = LlamaForCausalLM.from_pretrained(output.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_damaged_hf_quant_config_is_refused_in_a_sentence(tmp_path):
    source = tiny_llama(tmp_path, layers=1)
    (source / "hf_quant_config.json").write_text('{"quantization": []}')
    with pytest.raises(CheckpointError, match="has no quantization with quant_algo"):
        Checkpoint.open(source)
