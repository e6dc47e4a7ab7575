"""FP8 is read as transformers reads it."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from pipeline.catalog import FORMATS
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, NonFinite
from pipeline.formats import fp8
from pipeline.jobs import Job
from pipeline.sizes import dense_sizes
from pipeline.stages import upcast
from tests.checkpoints import tiny_llama
from tests.formats.groups import by_rows, packed, quantized

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


def fp8_config(*block):
    return quantized("fp8", **({"weight_block_size": list(block)} if block else {}))


def eight():
    """Eight weights in blocks of 1 x 4: 0x38 is 1.0, 0x40 is 2.0, 0x01 is 2 ** -9, 0x7E is 448."""
    codes = torch.tensor([[0x38, 0xB8, 0x40, 0x00, 0x01, 0x7E, 0xFE, 0x3C]], dtype=torch.uint8)
    return {"weight": codes.view(E4M3), "weight_scale_inv": torch.tensor([[0.5, 2.0]])}


def test_eight_values_packed_by_hand():
    """The scale is a multiplier, whatever its name says."""
    weight = fp8.dequantize(packed(eight()), fp8_config(1, 4))
    assert weight.dtype == torch.float32
    assert weight[0].tolist() == [0.5, -0.5, 1.0, 0.0, 2.0**-8, 896.0, -896.0, 3.0]


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_the_scales_go_by_four_names(name):
    tensors = eight()
    tensors[name] = tensors.pop("weight_scale_inv")
    assert fp8.dequantize(packed(tensors), fp8_config(1, 4))[0, 0] == 0.5


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_code_is_what_torch_casts_it_to(dtype):
    """An odd number of weights goes one by one; NaN stays NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    for part in (codes[None], codes[None, 1:], codes[None, 1:-1]):
        weight = fp8.dequantize(packed({"weight": part, "weight_scale": torch.tensor(1.0)}), fp8_config())
        assert torch.equal(weight.isnan(), part.float().isnan())
        assert torch.equal(weight.nan_to_num(0), part.float().nan_to_num(0))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    outputs=st.integers(1, 300),
    inputs=st.integers(1, 70),
    block=st.sampled_from([(1, 1), (1, 32), (16, 8), (32, 32), (128, 128), (24, 7)]),
    kind=st.sampled_from(["block", "output", "line", "scalar", "one"]),
    dtypes=st.sampled_from([(E4M3, torch.float32), (E5M2, torch.bfloat16), (E4M3, E8M0), (E4M3, torch.uint8)]),
)
def test_what_was_packed_comes_back(seed, outputs, inputs, block, kind, dtypes):
    """Blocks at the edges are cut short."""
    generator = torch.Generator().manual_seed(seed)
    grid = {
        "block": (-(-outputs // block[0]), -(-inputs // block[1])), "output": (outputs, 1), "line": (outputs,),
        "scalar": (), "one": (1,),
    }[kind]  # fmt: skip
    codes = torch.randn(outputs, inputs, generator=generator).to(dtypes[0])
    exponents = torch.randint(118, 136, grid, dtype=torch.uint8, generator=generator)
    values = exponents.view(E8M0).float()
    scales = {E8M0: exponents.view(E8M0), torch.uint8: exponents}.get(dtypes[1], values.to(dtypes[1]))
    if kind == "block":
        wide = values.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:outputs, :inputs]
    else:
        wide = values[:, None] if kind == "line" else values
    expected = codes.float() * wide
    group = packed({"weight": codes, "weight_scale_inv": scales})
    config = fp8_config(*block)
    assert torch.equal(fp8.dequantize(group, config), expected)
    assert torch.equal(by_rows(fp8, group, config, step=128), expected)
    assert fp8.dense_shape(group, config) == (outputs, inputs)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.uint8, E8M0])
@pytest.mark.parametrize("four_bits", [False, True])
def test_transformers_makes_the_same_of_it(scales, four_bits):
    generator = torch.Generator().manual_seed(1)
    if four_bits:
        codes = torch.randint(-128, 128, (64, 48), dtype=torch.int8, generator=generator)
        grid, block = (64, 3), (128, 128)
    else:
        codes, grid, block = torch.randn(64, 96, generator=generator).to(E4M3), (2, 3), (32, 32)
    exponents = torch.randint(118, 136, grid, dtype=torch.uint8, generator=generator)
    stored = {torch.uint8: exponents, E8M0: exponents.view(E8M0)}.get(scales)
    stored = torch.rand(grid, generator=generator).to(scales) if stored is None else stored
    expected = Fp8Dequantize(None)._dequantize_one(codes, stored, output_dtype=torch.float32)
    group = packed({"weight": codes, "scale": stored})
    assert torch.equal(fp8.dequantize(group, fp8_config(*block)), expected)
    assert fp8.dense_shape(group, fp8_config(*block)) == tuple(expected.shape)


@pytest.mark.parametrize("grid", [(3, 2, 3), (3, 1, 1), (3,), (), (3, 40, 1), (3, 1, 96)])
def test_fused_experts_have_their_scales_one_after_another(grid):
    """The weight goes by the module's own name, and rows are experts."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randn(3, 40, 96, generator=generator).to(E4M3)
    scales = torch.rand(grid, generator=generator)
    group = packed({"": codes, "scale_inv": scales}, "mlp.experts.down_proj")
    wide = scales[:, None, None] if grid == (3,) else scales
    if grid == (3, 2, 3):
        wide = scales.repeat_interleave(32, 1)[:, :40].repeat_interleave(32, 2)
    expected = codes.float() * wide
    assert torch.equal(fp8.dequantize(group, fp8_config(32, 32)), expected)
    assert torch.equal(by_rows(fp8, group, fp8_config(32, 32), step=1), expected)
    assert fp8.dense_shape(group, fp8_config(32, 32)) == (3, 40, 96)


@pytest.mark.parametrize("rows", [16, 40, 64])
def test_two_rows_of_scales_for_gate_and_up_are_one_for_each(rows):
    """As transformers allots them; 80 outputs in blocks of 64 would else be 64 and 16."""
    codes = torch.randn(3, 2 * rows, 32).to(E4M3)
    scales = torch.rand(3, 2, 1)
    group = packed({"": codes, "scale_inv": scales}, "mlp.experts.gate_up_proj")
    expected = codes.float() * scales.repeat_interleave(rows, 1)
    assert torch.equal(fp8.dequantize(group, fp8_config(64, 64)), expected)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=torch.float32)
    assert torch.equal(fp8.dequantize(group, fp8_config(64, 64)), expected)


def test_which_tensors_belong_together():
    """A `scale` without a weight is some other parameter; fused experts keep their own name."""
    row = FORMATS["fp8"]
    names = [
        "a.q_proj.weight", "a.q_proj.weight_scale_inv", "a.q_proj.activation_scale", "a.q_l2_clip.scale",
        "a.k_proj.weight", "a.k_proj.scale", "a.k_proj.bias", "a.norm.weight", "a.attn.k_scale",
        "a.experts.gate_up_proj", "a.experts.gate_up_proj_scale_inv", "a.experts.gate_up_proj_activation_scale",
    ]  # fmt: skip
    found = row.packed_modules(names)
    assert found == {
        "a.experts.gate_up_proj": ("", "_scale_inv"),
        "a.k_proj": (".scale", ".weight"),
        "a.q_proj": (".weight", ".weight_scale_inv"),
    }
    assert row.dense_name("a.q_proj", found["a.q_proj"]) == "a.q_proj.weight"
    assert row.dense_name("a.experts.gate_up_proj", ("", "_scale_inv")) == "a.experts.gate_up_proj"
    rest = [name for name in names if "scale" in name and not any(name.startswith(module) for module in found)]
    assert rest == ["a.q_l2_clip.scale", "a.attn.k_scale"]
    assert "a.attn.k_scale".endswith(row.leftovers)
    assert "a.experts.gate_up_proj_activation_scale".endswith(row.leftovers)


@pytest.mark.parametrize(
    ("change", "block", "error", "said"),
    [
        ({"weight_scale_inv": None}, (1, 4), MissingTensor, "has none of the scales"),
        ({"weight_scale": torch.ones(1)}, (1, 4), MissingTensor, "has weight_scale_inv and weight_scale of"),
        ({"weight": None}, (1, 4), MissingTensor, "weight is in no shard"),
        ({"weight": torch.ones(1, 8)}, (1, 4), CheckpointError, "weight is float32, expected float8_e4m3fn or"),
        ({"weight": torch.ones(8).to(E4M3)}, (1, 4), CheckpointError, r"weight has shape \[8\], expected a matrix"),
        ({"weight": torch.ones(0, 8).to(E4M3)}, (1, 4), CheckpointError, "weight has shape"),
        ({}, (1, 8), CheckpointError, "no scale for each block of 1 x 8"),
        ({}, (), CheckpointError, "no scale for each block of 128 x 128"),
        ({"weight_scale_inv": torch.ones(1, 2, 1)}, (1, 4), CheckpointError, r"shape \[1, 2, 1\], which is no scale"),
        ({"weight_scale_inv": torch.ones(0)}, (1, 4), CheckpointError, r"shape \[0\], which is no scale"),
        ({"weight_scale_inv": torch.ones(1, 2, dtype=torch.int32)}, (1, 4), CheckpointError, "inv is int32, expected"),
        ({"weight_scale_inv": torch.tensor([[1.0, torch.nan]])}, (1, 4), NonFinite, "weight_scale_inv holds NaN"),
        ({"weight_scale_inv": torch.tensor([[255, 1]], dtype=torch.uint8)}, (1, 4), NonFinite, "holds NaN"),
        ({}, (0, 4), CheckpointError, r"weight_block_size is \[0, 4\]"),
        ({}, (4,), CheckpointError, r"weight_block_size is \[4\]"),
        ({}, ("a", "b"), CheckpointError, "weight_block_size is"),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(change, block, error, said):
    tensors = {name: tensor for name, tensor in (eight() | change).items() if tensor is not None}
    with pytest.raises(error, match=said):
        fp8.dequantize(packed(tensors), fp8_config(*block))


def test_an_upcast_model_has_the_weights_that_transformers_loads(tmp_path):
    source = tiny_llama(tmp_path / "source", layers=1)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if "_proj" in name]:
        outputs, inputs = tensors[name].shape
        tensors[name] = (tensors[name].float() * 1000).to(E4M3)
        scales = torch.rand(-(-outputs // 64), -(-inputs // 32), generator=generator)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 32], "dequantize": True,
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    expected = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    job = Job(inputs={"source": source}, options={"dtype": "bfloat16"}, workspace=tmp_path / "work")
    (output,) = upcast.run(job)
    dense = load_file(output.folder / "model.safetensors")
    assert output.metrics["dequantized"] == 7
    assert all(torch.equal(tensor, expected[name]) for name, tensor in dense.items())
    opened = Checkpoint.open(source)
    assert dense_sizes(opened, FORMATS["fp8"]).shapes == {name: tuple(t.shape) for name, t in dense.items()}
    _, info = LlamaForCausalLM.from_pretrained(output.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
