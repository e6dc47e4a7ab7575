"""Digests of frozen weights: every byte counts, nothing else does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline.errors import CheckFailed
from pipeline.training import frozen
from pipeline.training.frozen import check_frozen, frozen_digests
from tests.checkpoints import tiny_llama


class Parts(torch.nn.Module):
    """A trained weight, a frozen one, a stored buffer as GPTQ's are, and one that the module computes for itself."""

    def __init__(self):
        super().__init__()
        self.trained = torch.nn.Parameter(torch.zeros(4))
        self.still = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T, requires_grad=False)
        self.register_buffer("qweight", torch.arange(8, dtype=torch.int32))
        self.register_buffer("inv_freq", torch.ones(4), persistent=False)


def test_what_is_looked_at_is_what_is_frozen_and_stored():
    assert list(frozen_digests(Parts())) == ["still", "qweight"]
    assert list(frozen_digests(Parts(), changing=lambda name: name == "qweight")) == ["still"]


def test_equal_bytes_have_equal_digests_and_one_bit_more_another(monkeypatch):
    parts = Parts()
    before = frozen_digests(parts)
    monkeypatch.setattr(frozen, "CHUNK", 3)  # however it is cut
    assert frozen_digests(Parts()) == before
    parts.trained.data += 1
    parts.inv_freq += 1
    check_frozen(before, frozen_digests(parts))
    parts.qweight[7] ^= 1
    with pytest.raises(CheckFailed, match="train: qweight changed while frozen"):
        check_frozen(before, frozen_digests(parts))
    parts.still.data[0, 0] = -0.0
    with pytest.raises(CheckFailed, match="train: qweight and 1 other changed while frozen"):
        check_frozen(before, frozen_digests(parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.uint8, torch.float64])
def test_every_dtype_shape_and_layout_has_a_digest_of_its_own(dtype):
    module = torch.nn.Module()
    tensors = {
        "matrix": torch.zeros(2, 3), "turned": torch.zeros(3, 2), "number": torch.zeros(()), "empty": torch.zeros(0),
    }  # fmt: skip
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor.to(dtype))
    found = frozen_digests(module)
    assert len(set(found.values())) == len(tensors)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "model", hidden=64, intermediate=96)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), "absmax"),
        (BitsAndBytesConfig(load_in_8bit=True), "SCB"),
    ],
)
def test_a_quantized_bases_packed_weights_and_scales_are_looked_at(base, config, scales):
    pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    ids = torch.arange(8)[None] + 3
    model.eval()
    with torch.no_grad():
        model(ids)  # the first pass may repack the weights
    before = frozen_digests(model)
    with torch.no_grad():
        model(ids)
    check_frozen(before, frozen_digests(model))
    projection = model.model.layers[0].self_attn.q_proj
    name = "model.layers.0.self_attn.q_proj"
    assert any(key.startswith(f"{name}.") and key.endswith(scales) for key in before)
    projection.weight.data[0, 0] ^= 1
    with pytest.raises(CheckFailed, match=rf"{name}\.weight changed"):
        check_frozen(before, frozen_digests(model))
    projection.weight.data[0, 0] ^= 1
    held = projection.weight.quant_state.absmax if scales == "absmax" else projection.state.SCB
    held.view(-1)[0] += 1
    with pytest.raises(CheckFailed, match=rf"{name}.*\.{scales} changed"):
        check_frozen(before, frozen_digests(model))
