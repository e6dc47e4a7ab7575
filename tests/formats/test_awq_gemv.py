"""AWQ GEMV is read as AutoAWQ packed it."""

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
from pipeline.formats import awq_gemv
from pipeline.jobs import Job
from pipeline.sizes import dense_sizes
from pipeline.stages import upcast
from tests.checkpoints import tiny_llama
from tests.formats.groups import by_rows, pack_last, packed, quantized

DATA = Path(__file__).parent / "data" / "awq_gemv"


def module(codes, zeros, scales, *, width=1):
    """Codes [O, I], zeros and scales [O, G], the last two padded to `width` words of eight."""
    padding = (0, 8 * width - zeros.shape[1])
    return {
        "qweight": pack_last(codes, 4),
        "qzeros": pack_last(torch.nn.functional.pad(zeros, padding), 4),
        "scales": torch.nn.functional.pad(scales, padding).half(),
    }


def eight():
    """One output of eight inputs in two groups of four; zero points 8 and 0, scales 0.5 and 2."""
    codes = torch.tensor([[0, 1, 7, 8, 9, 15, 0, 3]])
    return module(codes, torch.tensor([[8, 0]]), torch.tensor([[0.5, 2.0]]))


def test_eight_values_packed_by_hand():
    tensors = eight()
    assert tensors["qweight"].tolist() == [[0x30F98710]]
    assert tensors["qzeros"].tolist() == [[0x08]]
    weight = awq_gemv.dequantize(packed(tensors), quantized("awq", group_size=4))
    assert weight.dtype == torch.float32
    assert weight.tolist() == [[-4.0, -3.5, -0.5, 0.0, 18.0, 30.0, 0.0, 6.0]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), group_size=st.sampled_from([8, 32, -1]), spare=st.integers(0, 2))
def test_what_was_packed_comes_back(seed, group_size, spare):
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = 64, 24
    groups = 1 if group_size == -1 else inputs // group_size
    codes = torch.randint(16, (outputs, inputs), generator=generator)
    zeros = torch.randint(16, (outputs, groups), generator=generator)
    scales = torch.rand(outputs, groups, generator=generator).half()
    tensors = module(codes, zeros, scales, width=1 + spare)
    config = quantized("awq", bits=4, group_size=group_size)
    order = torch.arange(inputs) // (inputs // groups)
    expected = (codes - zeros[:, order]) * scales.float()[:, order]
    assert torch.equal(awq_gemv.dequantize(packed(tensors), config), expected)
    assert torch.equal(by_rows(awq_gemv, packed(tensors), config, step=8), expected)
    assert awq_gemv.dense_shape(packed(tensors), config) == (outputs, inputs)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_what_autoawq_packed_is_read_as_the_weight_it_was_given(size):
    tensors = load_file(DATA / f"gemv-{size}.safetensors")
    expected = tensors.pop("expected")
    weight = awq_gemv.dequantize(packed(tensors), quantized("awq", group_size=size, version="gemv"))
    assert torch.equal(weight, expected)


@pytest.mark.parametrize(
    ("change", "config", "error", "said"),
    [
        ({"qweight": None}, {}, MissingTensor, "qweight is in no shard"),
        ({"qzeros": None}, {}, MissingTensor, "qzeros is in no shard"),
        ({"scales": None}, {}, MissingTensor, "scales is in no shard"),
        ({"scales": torch.full((1, 8), torch.nan)}, {}, NonFinite, "scales holds NaN or infinity"),
        ({"scales": torch.ones(1, 16)}, {}, CheckpointError, r"scales has shape \[1, 16\], expected \[1, 8\]"),
        ({"qzeros": torch.zeros(2, 1, dtype=torch.int32)}, {}, CheckpointError, r"expected \[1, any\]"),
        ({"qweight": torch.zeros(1, 1)}, {}, CheckpointError, "qweight is float32, expected int32"),
        ({"qweight": torch.zeros(1, 0, dtype=torch.int32)}, {}, UnsupportedFormat, "its 0 inputs"),
        ({"qzeros": torch.zeros(1, 0, dtype=torch.int32), "scales": torch.ones(1, 0)}, {}, CheckpointError, "0 groups"),
        ({}, {"group_size": 3}, UnsupportedFormat, "group size 3 does not divide its 8 inputs"),
        ({}, {"bits": 8}, UnsupportedFormat, "bits 8 cannot be read, only 4"),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(change, config, error, said):
    tensors = {name: tensor for name, tensor in (eight() | change).items() if tensor is not None}
    with pytest.raises(error, match=said):
        awq_gemv.dequantize(packed(tensors), quantized("awq", **({"bits": 4, "group_size": 4} | config)))


@pytest.mark.parametrize(
    ("config", "row"),
    [
        ({}, "awq"),
        ({"version": "GEMM"}, "awq"),
        ({"version": "exllama"}, "awq"),
        ({"version": "GEMV"}, "awq-gemv"),
        ({"checkpoint_format": "gemv"}, "awq-gemv"),
        ({"format": "gemv_fast"}, "awq-gemv-fast"),
        ({"version": "gemv", "backend": "llm-awq"}, "awq-gemv-fast"),
    ],
)
def test_the_config_says_which_layout_it_is(config, row):
    assert format_of(quantized("awq", bits=4, **config)) is FORMATS[row]


def test_a_layout_nobody_reads_is_refused_with_those_that_are():
    with pytest.raises(UnsupportedFormat, match=r"awq in layout marlin cannot be read, only gemm, .*gemv, gemv_fast"):
        format_of(quantized("awq", version="marlin"))


def test_a_whole_checkpoint_becomes_the_dense_one_it_stands_for(tmp_path):
    source = tiny_llama(tmp_path / "source", layers=1)
    tensors, expected = load_file(source / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj" in name]:
        outputs, inputs = tensors.pop(name).shape
        generator = torch.Generator().manual_seed(len(name))
        codes = torch.randint(16, (outputs, inputs), generator=generator)
        parts = module(codes, torch.full((outputs, inputs // 32), 8), torch.full((outputs, inputs // 32), 0.125))
        tensors |= {name.replace("weight", part): tensor for part, tensor in parts.items()}
        expected[name] = (codes - 8).float() / 8
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}
    (source / "config.json").write_text(json.dumps(config))
    (output,) = upcast.run(Job(inputs={"source": source}, options={"dtype": "float32"}, workspace=tmp_path / "work"))
    model, loading = LlamaForCausalLM.from_pretrained(output.folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = model.state_dict()
    assert len(expected) == 7
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    shapes = dense_sizes(Checkpoint.open(source), FORMATS["awq-gemv"]).shapes
    assert all(shapes[name] == tuple(weight.shape) for name, weight in expected.items())
