"""NF4 and FP4 are read as bitsandbytes dequantizes the stored bytes."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, NonFinite, UnsupportedFormat
from pipeline.formats import bnb_4bit
from pipeline.jobs import Job
from pipeline.stages import upcast
from tests.checkpoints import tiny_llama
from tests.formats.groups import by_rows, packed, quantized

CONFIG = quantized("bitsandbytes", load_in_4bit=True)
STATE = "weight.quant_state.bitsandbytes__nf4"


def state(**values):
    values = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]} | values
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def module(codes=None, **values):
    """128 codes in two blocks of 64; a code stands for itself, scaled by 1 and by 10."""
    codes = torch.arange(128) % 16 if codes is None else codes
    return {
        "weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        "weight.absmax": torch.tensor([1.0, 10.0]),
        "weight.quant_map": torch.arange(16).float(),
        STATE: state(**values),
    }


def test_eight_values_packed_by_hand():
    """The even element lies in the high nibble."""
    tensors = module() | {"weight": torch.tensor([0x01, 0x23, 0x45, 0x67, *[0xFF] * 60], dtype=torch.uint8)}
    weight = bnb_4bit.dequantize(packed(tensors), CONFIG)
    assert weight.dtype == torch.float32
    assert weight.shape == bnb_4bit.dense_shape(packed(tensors), CONFIG) == (2, 64)
    assert weight[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 15]
    assert set(weight[1].tolist()) == {150.0}


def test_doubly_quantized_scales_are_looked_up_scaled_and_shifted():
    """Scale i is nested_quant_map[absmax[i]] * nested_absmax[i // nested_blocksize] + nested_offset."""
    table = torch.zeros(256)
    table[7], table[9] = 0.5, -1.0
    tensors = module(torch.ones(128, dtype=torch.int64), nested_blocksize=1, nested_offset=3.0) | {
        "weight.absmax": torch.tensor([7, 9], dtype=torch.uint8),
        "weight.nested_absmax": torch.tensor([2.0, 4.0]),
        "weight.nested_quant_map": table,
    }
    weight = bnb_4bit.dequantize(packed(tensors), CONFIG)
    assert weight[:, 0].tolist() == [0.5 * 2 + 3, -1.0 * 4 + 3]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    blocksize=st.sampled_from([32, 64, 4096]),
    shape=st.sampled_from([(2, 64), (3, 43), (5, 20), (64, 128)]),
)
def test_what_was_packed_comes_back(seed, blocksize, shape):
    """Also with a short last block, and an odd number of weights."""
    generator = torch.Generator().manual_seed(seed)
    count = shape[0] * shape[1]
    codes = torch.randint(16, (count + count % 2,), generator=generator)
    scales = torch.rand(-(-count // blocksize), generator=generator)
    table = torch.rand(16, generator=generator)
    tensors = module(codes, blocksize=blocksize, shape=shape) | {"weight.absmax": scales, "weight.quant_map": table}
    expected = (table[codes[:count]] * scales[torch.arange(count) // blocksize]).view(shape)
    assert torch.equal(bnb_4bit.dequantize(packed(tensors), CONFIG), expected)
    assert torch.equal(by_rows(bnb_4bit, packed(tensors), CONFIG, step=2), expected)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"weight.absmax": torch.ones(3)}, CheckpointError, r"weight.absmax has shape \[3\], expected \[2\]"),
        (
            {"weight.absmax": torch.ones(2, dtype=torch.uint8)},
            CheckpointError,
            "weight.absmax is uint8, expected float",
        ),
        ({"weight.absmax": torch.tensor([1.0, torch.nan])}, NonFinite, "weight.absmax holds NaN"),
        ({"weight.quant_map": None}, MissingTensor, "weight.quant_map is in no shard"),
        ({"weight.quant_map": torch.full((16,), torch.inf)}, NonFinite, "weight.quant_map holds"),
        ({"weight": None}, MissingTensor, "weight is in no shard"),
        ({"weight": torch.zeros(63, 1, dtype=torch.uint8)}, CheckpointError, "weight has 63 bytes, but"),
        ({STATE: None}, MissingTensor, "has 0 quant_state tensors"),
        ({STATE: torch.tensor([123, 34], dtype=torch.uint8)}, CheckpointError, "is not JSON"),
        ({STATE: torch.tensor([255, 254], dtype=torch.uint8)}, CheckpointError, "is not JSON"),
        ({STATE: torch.tensor([91, 93], dtype=torch.uint8)}, CheckpointError, "is list, not an object"),
        ({STATE: state(shape=None)}, CheckpointError, "cannot be read"),
        ({STATE: state(shape=[-2, -64])}, CheckpointError, "which cannot be"),
        ({STATE: state(nested_offset=float("nan"))}, CheckpointError, "which cannot be"),
        ({STATE: state(blocksize=48)}, UnsupportedFormat, "in blocks of 48 cannot be read"),
        ({STATE: state(blocksize="many")}, CheckpointError, "cannot be read"),
        ({STATE: state(quant_type="af4")}, UnsupportedFormat, "bitsandbytes af4"),
        ({STATE: state(quant_type=["nf4"])}, UnsupportedFormat, r"bitsandbytes \['nf4'\]"),
        ({"weight.nested_absmax": torch.ones(1)}, CheckpointError, "weight.absmax is float32, expected uint8"),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(change, error, said):
    tensors = {name: tensor for name, tensor in (module() | change).items() if tensor is not None}
    with pytest.raises(error, match=said):
        bnb_4bit.dequantize(packed(tensors), CONFIG)


def test_a_wrong_count_of_scales_is_known_before_anything_is_computed():
    with pytest.raises(CheckpointError, match=r"weight.absmax has shape \[3\], expected \[2\]"):
        bnb_4bit.dense_shape(packed(module() | {"weight.absmax": torch.ones(3)}), CONFIG)


def write(folder, **options):
    """A checkpoint that bitsandbytes wrote through transformers, quantized from a tiny Llama."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed, so there is nothing to compare with")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dense = tiny_llama(folder / "dense", layers=1)
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder / "source")
    return folder / "source"


def dequantized(stored, module, dtype):
    """What bitsandbytes makes of the bytes as they lie in the file: it never ran the model."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    parts = {name.removeprefix(f"{module}."): t for name, t in stored.items() if name.startswith(f"{module}.weight.")}
    quant_state = QuantState.from_dict(parts, device=torch.device("cpu"))
    quant_state.dtype = dtype
    return dequantize_4bit(stored[f"{module}.weight"], quant_state)


@pytest.mark.parametrize(
    "options",
    [
        {"bnb_4bit_quant_type": "nf4"},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.float32},
    ],
    ids=["nf4", "nf4-double", "fp4", "fp4-double-in-bf16", "nf4-in-fp32"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_checkpoint_bitsandbytes_wrote_becomes_the_weights_it_computes_with(tmp_path, options, dtype):
    source = write(tmp_path, **options)
    (output,) = upcast.run(Job(inputs={"source": source}, options={"dtype": dtype}, workspace=tmp_path))
    dense, stored = load_file(output.folder / "model.safetensors"), load_file(source / "model.safetensors")
    modules = [name.removesuffix(".weight.absmax") for name in stored if name.endswith(".weight.absmax")]
    assert len(modules) == 7
    assert output.metrics["dequantized"] == 7
    for name in modules:
        weight = dense[f"{name}.weight"]
        assert torch.equal(weight, dequantized(stored, name, weight.dtype)), name
    assert Checkpoint.open(output.folder).quantization is None
