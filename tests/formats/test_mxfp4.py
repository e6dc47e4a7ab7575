"""MXFP4 experts are read as transformers reads them."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pipeline.catalog import FORMATS
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, NonFinite
from pipeline.formats import mxfp4
from pipeline.jobs import Job
from pipeline.sizes import dense_sizes
from pipeline.stages import upcast
from tests.formats.groups import by_rows, packed, quantized

MXFP4 = quantized("mxfp4")


def experts(seed=0, *, count=3, outputs=6, groups=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        "blocks": torch.randint(256, (count, outputs, groups, 16), dtype=torch.uint8, generator=generator),
        "scales": torch.randint(100, 140, (count, outputs, groups), dtype=torch.uint8, generator=generator),
    }


def test_eight_values_packed_by_hand():
    """Low nibble first; code 9 is -0.5; scale 128 is a factor of 2."""
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, :4] = torch.tensor([0x10, 0x92, 0x7F, 0xC5])
    tensors = {"blocks": blocks, "scales": torch.full((1, 1, 1), 128, dtype=torch.uint8)}
    weight = mxfp4.dequantize(packed(tensors), MXFP4)
    assert weight.dtype == torch.float32
    assert weight.shape == (1, 32, 1)
    assert weight[0, :8, 0].tolist() == [0.0, 1.0, 2.0, -1.0, -12.0, 12.0, 6.0, -4.0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4), outputs=st.integers(1, 9), groups=st.integers(1, 3))
def test_any_experts_are_those_that_transformers_converts(seed, count, outputs, groups):
    tensors = experts(seed, count=count, outputs=outputs, groups=groups)
    expected = convert_moe_packed_tensors(tensors["blocks"], tensors["scales"], dtype=torch.float32)
    group = packed(tensors)
    assert torch.equal(mxfp4.dequantize(group, MXFP4), expected)
    assert torch.equal(by_rows(mxfp4, group, MXFP4, step=1), expected)
    assert mxfp4.dense_shape(group, MXFP4) == tuple(expected.shape)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"scales": None}, MissingTensor, "scales is in no shard"),
        ({"blocks": None}, MissingTensor, "blocks is in no shard"),
        ({"scales": torch.zeros(3, 6, 1, dtype=torch.uint8)}, CheckpointError, r"scales has shape \[3, 6, 1\]"),
        ({"scales": torch.zeros(3, 6, 2)}, CheckpointError, "scales is float32, expected uint8"),
        ({"scales": torch.full((3, 6, 2), 255, dtype=torch.uint8)}, NonFinite, "scales holds NaN"),
        ({"blocks": torch.zeros(3, 6, 2, 8, dtype=torch.uint8)}, CheckpointError, "blocks has shape"),
        ({"blocks": torch.zeros(3, 6, 32, dtype=torch.uint8)}, CheckpointError, "blocks has shape"),
        ({"blocks": torch.zeros(3, 6, 2, 16, dtype=torch.int8)}, CheckpointError, "blocks is int8, expected uint8"),
        ({"blocks": torch.zeros(0, 6, 2, 16, dtype=torch.uint8)}, CheckpointError, "which is empty"),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(change, error, said):
    tensors = {name: tensor for name, tensor in (experts() | change).items() if tensor is not None}
    with pytest.raises(error, match=said):
        mxfp4.dequantize(packed(tensors), MXFP4)


def tiny_gpt_oss(folder):
    config = GptOssConfig(
        num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2, vocab_size=128, hidden_size=64,
        intermediate_size=32, head_dim=16, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        sliding_window=16, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_an_upcast_gpt_oss_loads_with_every_key_in_its_place(tmp_path):
    source = tiny_gpt_oss(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    expected = {}
    for seed, name in enumerate([name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]):
        count, inputs, outputs = tensors.pop(name).shape
        parts = experts(seed, count=count, outputs=outputs, groups=inputs // 32)
        tensors |= {f"{name}_{part}": tensor for part, tensor in parts.items()}
        expected[name] = convert_moe_packed_tensors(parts["blocks"], parts["scales"])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (source / "config.json").write_text(json.dumps(config))
    opened = Checkpoint.open(source)
    job = Job(inputs={"source": source}, options={"dtype": "bfloat16"}, workspace=tmp_path / "work")
    (output,) = upcast.run(job)
    dense = load_file(output.folder / "model.safetensors")
    assert len(expected) == 2
    assert all(torch.equal(dense[name], weight) for name, weight in expected.items())
    assert dense_sizes(opened, FORMATS["mxfp4"]).shapes == {name: tuple(t.shape) for name, t in dense.items()}
    _, info = GptOssForCausalLM.from_pretrained(output.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
