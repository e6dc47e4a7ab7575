"""bitsandbytes int8 is read as bitsandbytes dequantizes the stored bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.errors import CheckpointError, MissingTensor, NonFinite, UnsupportedFormat
from pipeline.formats import bnb_int8
from pipeline.jobs import Job
from pipeline.stages import upcast
from tests.checkpoints import tiny_llama
from tests.formats.groups import packed, quantized

CONFIG = quantized("bitsandbytes", load_in_8bit=True)


def eight():
    return {
        "weight": torch.tensor([[127, -127, 0, 1], [127, -128, 64, -1]], dtype=torch.int8),
        "SCB": torch.tensor([127.0, 254.0]),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def test_eight_values_packed_by_hand():
    weight = bnb_int8.dequantize(packed(eight()), CONFIG)
    assert weight.dtype == torch.float32
    assert torch.equal(weight.round(decimals=3), torch.tensor([[127.0, -127, 0, 1], [254, -256, 128, -2]]))
    assert bnb_int8.dense_shape(packed(eight()), CONFIG) == (2, 4)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_row_that_reaches_its_scale_comes_back_to_half_a_step(seed):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    scale = weight.abs().amax(1)
    tensors = {"weight": (weight * 127 / scale[:, None]).round().to(torch.int8), "SCB": scale}
    error = (bnb_int8.dequantize(packed(tensors), CONFIG) - weight).abs()
    assert (error <= 0.501 * scale[:, None] / 127).all()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"weight_format": torch.tensor(1, dtype=torch.uint8)}, UnsupportedFormat, "weight_format is 1"),
        ({"SCB": torch.ones(3)}, CheckpointError, r"SCB has shape \[3\], expected \[2\]"),
        ({"SCB": torch.tensor([1.0, torch.nan])}, NonFinite, "SCB holds NaN"),
        ({"SCB": None}, MissingTensor, "SCB is in no shard"),
        ({"weight": torch.zeros(2, 4)}, CheckpointError, "weight is float32, expected int8"),
        ({"weight": None}, MissingTensor, "weight is in no shard"),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(change, error, said):
    tensors = {name: tensor for name, tensor in (eight() | change).items() if tensor is not None}
    with pytest.raises(error, match=said):
        bnb_int8.dequantize(packed(tensors), CONFIG)


def test_eight_values_are_packed_by_hand():
    made = bnb_int8.pack(torch.tensor([[127.0, -127.0, 0.0, 1.4], [2.0, 1.0, -0.5, -2.0]]))
    assert made["weight"].tolist() == [[127, -127, 0, 1], [127, 64, -32, -127]]  # 63.5 and 31.75; ties go to even
    assert made["SCB"].tolist() == [127.0, 2.0]
    assert (made["weight_format"].item(), made["weight_format"].dtype) == (0, torch.uint8)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 1), (3, 43), (64, 128), (1030, 1030)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    size=st.sampled_from([1.0, 1000.0, 1e-4, 1e-7]),
)
def test_what_is_packed_is_bitsandbytes_own(seed, shape, dtype, size):
    """Through float16, whose denormals and zeros a small weight becomes; some rows are zeros to begin with."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="there is nothing to compare with")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(size).to(dtype)
    weight[1::3] = 0
    made = bnb_int8.pack(weight)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    assert torch.equal(made["weight"], codes)
    assert torch.equal(made["SCB"], scales)
    assert bnb_int8.shapes(shape) == {name: (t.dtype, tuple(t.shape)) for name, t in made.items()}


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity"), (1e5, "too large for")]
)
def test_a_weight_that_float16_cannot_hold_is_refused(value, said):
    weight = torch.randn(4, 8)
    weight[2, 3] = value
    with pytest.raises(NonFinite, match=said):
        bnb_int8.pack(weight)


def test_a_checkpoint_bitsandbytes_wrote_becomes_the_weights_it_computes_with(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed, so there is nothing to compare with")
    from bitsandbytes.functional import int8_vectorwise_dequant
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dense = tiny_llama(tmp_path / "dense", layers=1)
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "source")
    (output,) = upcast.run(
        Job(inputs={"source": tmp_path / "source"}, options={"dtype": "bfloat16"}, workspace=tmp_path)
    )
    stored = load_file(tmp_path / "source" / "model.safetensors")
    written = load_file(output.folder / "model.safetensors")
    modules = [name.removesuffix(".SCB") for name in stored if name.endswith(".SCB")]
    assert len(modules) == 7
    for name in modules:
        expected = int8_vectorwise_dequant(stored[f"{name}.weight"], stored[f"{name}.SCB"])
        assert torch.equal(written[f"{name}.weight"], expected.bfloat16()), name
