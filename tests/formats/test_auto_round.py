"""AutoRound's exports are read as its own modules compute with them."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.catalog import FORMATS, format_of
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, UnsupportedFormat
from pipeline.formats import auto_round, components
from pipeline.quantization_config import Quantization
from pipeline.sizes import dense_sizes
from tests.formats.groups import by_rows, pack_last, packed, quantized

DATA = Path(__file__).parent / "data" / "auto_round"
CASES = json.loads((DATA / "cases.json").read_text())
PLAIN, GPTQ, AWQ = "auto_round", "auto_round:auto_gptq", "auto_round:auto_awq"


def module(codes, zeros, scales, *, bits=4):
    """Codes [I, O], zeros and scales [G, O] as they are, with no g_idx."""
    return {
        "qweight": pack_last(codes.T, bits).T.contiguous(),
        "qzeros": pack_last(zeros, bits),
        "scales": scales.half(),
    }


def eight():
    """Eight inputs of eight outputs, output 0's codes as listed, stored zero point 7, scale 0.5."""
    codes = torch.zeros(8, 8, dtype=torch.int32)
    codes[:, 0] = torch.tensor([0, 1, 7, 8, 9, 15, 8, 3])
    return module(codes, torch.full((1, 8), 7), torch.full((1, 8), 0.5))


def test_eight_values_packed_by_hand():
    """A stored 7 means 7 where auto-round packs in its own way, and 8 where it packs as GPTQ."""
    plain = auto_round.dequantize(packed(eight()), quantized("auto-round", bits=4, group_size=8, packing_format=PLAIN))
    assert plain[0].tolist() == [-3.5, -3.0, 0.0, 0.5, 1.0, 4.0, 0.5, -2.0]
    v1 = auto_round.dequantize(packed(eight()), quantized("auto-round", bits=4, group_size=8, packing_format=GPTQ))
    assert v1[0].tolist() == [-4.0, -3.5, -0.5, 0.0, 0.5, 3.5, 0.0, -2.5]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([2, 3, 4, 8]), group_size=st.sampled_from([8, 32, -1]))
def test_what_was_packed_comes_back(seed, bits, group_size):
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs, groups = 64, 32, 1 if group_size == -1 else 64 // group_size
    codes = torch.randint(2**bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(2**bits, (groups, outputs), generator=generator)
    scales = torch.rand(groups, outputs, generator=generator).half()
    tensors = module(codes, zeros, scales, bits=bits)
    config = quantized("auto-round", bits=bits, group_size=group_size, packing_format=PLAIN)
    order = torch.arange(inputs) // (inputs // groups)
    expected = ((codes - zeros[order]) * scales.float()[order]).T
    assert torch.equal(auto_round.dequantize(packed(tensors), config), expected)
    assert torch.equal(by_rows(auto_round, packed(tensors), config, step=32), expected)
    assert auto_round.dense_shape(packed(tensors), config) == (outputs, inputs)


@pytest.mark.parametrize("case", CASES)
def test_what_auto_round_exported_is_read_as_its_module_computes_with_it(case):
    """Its module rounds (code - zero) * scale to float16; the exact product rounds to that."""
    stored = load_file(DATA / f"{case}.safetensors")
    quantization = Quantization.parse(CASES[case])
    assert format_of(quantization) is FORMATS["auto-round"]
    modules = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    assert len(modules) == 2
    for name in modules:
        parts = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(name)}
        expected = parts.pop("expected")
        weight = auto_round.dequantize(packed(parts, name), quantization)
        assert torch.equal(weight.half(), expected), name


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_known_from_headers(case, tmp_path):
    stored = load_file(DATA / f"{case}.safetensors")
    expected = {
        name.replace("expected", "weight"): tuple(stored.pop(name).shape) for name in list(stored) if "expected" in name
    }
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": CASES[case]}))
    assert dense_sizes(Checkpoint.open(tmp_path), FORMATS["auto-round"]).shapes == expected


def test_a_modules_own_name_wins_over_patterns_and_the_first_pattern_over_the_next():
    extra = {
        ".*down.*": {},
        "(": {"bits": 3},
        ".*proj": {"bits": 8},
        ".*": {"bits": 2, "group_size": 16},
        "a.up_proj": {"group_size": 64, "bits": None},
    }
    config = quantized("auto-round", bits=4, group_size=32, extra_config=extra)
    found = {
        name: auto_round.own_quantization(name, config) for name in ("a.up_proj", "a.down_proj", "lm_head", "a.gate")
    }
    assert {name: (own.bits, own.group_size) for name, own in found.items()} == {
        "a.up_proj": (4, 64), "a.down_proj": (8, 32), "lm_head": (2, 16), "a.gate": (2, 16),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({}, "gptq"),
        ({"packing_format": "auto"}, "gptq"),
        ({"packing_format": "auto_round:gptq"}, "gptq"),
        ({"packing_format": "auto_round:gptqmodel"}, "gptq_v2"),
        ({"backend": "auto"}, "gptq"),
        ({"backend": "auto_round:gptq:exllamav2"}, "gptq"),
        ({"backend": "auto", "packing_format": PLAIN}, "gptq_v2"),
    ],
)
def test_the_config_says_how_zero_points_are_stored(config, layout):
    own = auto_round.own_quantization("layer", quantized("auto-round", bits=4, **config))
    assert own.raw == {"checkpoint_format": layout}


def test_awq_is_handed_on_as_gemm():
    own = auto_round.own_quantization("layer", quantized("intel/auto-round", bits=4, packing_format=AWQ))
    assert (own.method, own.layout) == ("awq", "gemm")


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"packing_format": "auto_round:fp8_static"}, UnsupportedFormat, "packed as auto_round:fp8_static cannot"),
        ({"packing_format": "mlx"}, UnsupportedFormat, "packed as mlx cannot be read"),
        ({"backend": "auto_round:exllamav2"}, UnsupportedFormat, "packed as auto_round:exllamav2"),
        ({"data_type": "mx_fp"}, UnsupportedFormat, "layer: auto-round with mx_fp and 16-bit activations"),
        ({"act_bits": 8}, UnsupportedFormat, "int and 8-bit activations"),
        ({"rotation_config": {"kind": "hadamard"}}, UnsupportedFormat, "a rotation_config cannot be read"),
        ({"act_bits": "few"}, CheckpointError, "unreadable value"),
        ({"extra_config": [1]}, CheckpointError, "extra_config is no object"),
        ({"extra_config": {"layer": 4}}, CheckpointError, "extra_config is no object"),
        ({"extra_config": {"layer": {"bits": "four"}}}, CheckpointError, "unreadable value"),
        ({"extra_config": {"layer": {"bits": 16}}}, CheckpointError, "says it has 16 bits"),
        ({"bits": 5}, UnsupportedFormat, "auto-round with bits 5 cannot be read"),
        ({"packing_format": AWQ, "bits": 8}, UnsupportedFormat, "awq with bits 8 cannot be read, only 4"),
        ({"group_size": 0}, UnsupportedFormat, "group size 0"),
        ({"bits": 8}, CheckpointError, "qweight has shape|expected"),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(config, error, said):
    with pytest.raises(error, match=said):
        auto_round.dequantize(packed(eight()), quantized("auto-round", **({"bits": 4, "group_size": 8} | config)))


def test_a_pattern_that_hangs_is_refused_and_what_is_none_is_passed_over(monkeypatch):
    monkeypatch.setattr(components, "PATTERN_SECONDS", 0.1)
    extra = {"(": {"bits": 8}, "(x{1,9999}){1,9999}" * 49: {"bits": 8}}
    with pytest.raises(CheckpointError, match=r"extra_config pattern .* takes too long to match xxx"):
        auto_round.own_quantization("x" * 100, quantized("auto-round", bits=4, extra_config=extra))
