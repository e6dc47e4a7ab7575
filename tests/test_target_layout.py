"""A source is a target's own only where its config and its headers say the same of every module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import Checkpoint
from pipeline.errors import UnsupportedFormat
from pipeline.target_layout import check_grid, matches, same_options
from pipeline.targets import BASE_TARGETS, parse_target
from tests.every_format import good

FORMATS = ("gptq", "gptq desc_act", "gptq 3 bits", "awq", "nf4", "fp4", "int8", "gemv", "dense", "fp8",
           "compressed-tensors int4", "float-quantized")  # fmt: skip
TARGETS = {
    "gptq": "gptq", "gptq desc_act": "gptq:desc_act=true", "gptq 3 bits": "gptq:bits=3", "awq": "awq", "nf4": "nf4",
    "int8": "int8", "compressed-tensors int4": "compressed-tensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: good(root / name.replace(" ", "-"), name) for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
def test_a_source_matches_the_target_that_asks_for_it_and_no_other(folders, name):
    source = Checkpoint.open(folders[name])
    found = {of for of, text in TARGETS.items() if matches(parse_target(text), source)}
    assert found == {name} & TARGETS.keys()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gptq", "gptq:group_size=64"),
        ("gptq", "gptq:symmetric=false"),
        ("gptq", "gptq:bits=8"),
        ("awq", "awq:group_size=64"),
        ("nf4", "nf4:double_quant=false"),
        ("nf4", "fp4"),
        ("compressed-tensors int4", "compressed-tensors:group_size=64"),
        ("compressed-tensors int4", "compressed-tensors:group_size=-1"),
        ("compressed-tensors int4", "compressed-tensors:scheme=w8a8"),
        ("float-quantized", "compressed-tensors:scheme=fp8"),  # its inputs are not rounded
    ],
)
def test_another_option_is_another_grid(folders, name, text):
    assert not matches(parse_target(text), Checkpoint.open(folders[name]))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("dense", "gptq:grid=keep", "gptq-4bit: grid keep needs a source that is packed as gptq.*dense is dense"),
        ("awq", "gptq:grid=better", "is awq; leave grid out"),
        ("gptq", "gptq:group_size=64,grid=keep", "is packed with others; leave grid out"),
        ("gptq", "gptq:grid=keep", ""),
        ("awq", "awq:grid=better", ""),
        ("compressed-tensors int4", "compressed-tensors:grid=keep", ""),
        (
            "gptq",
            "compressed-tensors:grid=keep",
            "w4a16: grid keep needs a source that is packed as compressed-tensors",
        ),
        ("dense", "awq", ""),
        ("dense", "nf4", ""),
    ],
)
def test_a_grid_is_kept_only_where_the_source_has_it(folders, name, text, said):
    source = Checkpoint.open(folders[name])
    if not said:
        check_grid(parse_target(text), source)
        return
    with pytest.raises(UnsupportedFormat, match=said):
        check_grid(parse_target(text), source)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("nf4", True),
        ("nf4:double_quant=true", True),
        ("nf4:type=nf4", True),
        ("fp4", False),
        ("nf4:double_quant=false", False),
        ("gptq", False),
    ],
)
def test_an_option_left_out_is_its_default(text, same):
    assert same_options(parse_target(text), BASE_TARGETS["nf4"]) is same


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gptq", {"dynamic": {"-:lm_head": {}}}),
        ("gptq", {"checkpoint_format": "gptq_v2"}),
        ("gptq", {"checkpoint_format": ["gptq"]}),
        ("gptq", {"format": "marlin"}),
        ("gptq", {"lm_head": True}),
        ("gptq", {"desc_act": None}),
        ("gptq", {"pack_dtype": "int16"}),
        ("awq", {"version": "gemv"}),
        ("awq", {"zero_point": False}),
        ("nf4", {"bnb_4bit_quant_storage": "bfloat16"}),
        ("nf4", {"bnb_4bit_use_double_quant": None}),
        ("int8", {"llm_int8_threshold": 0.0}),
        ("int8", {"llm_int8_has_fp16_weight": True}),
        ("compressed-tensors int4", {"quantization_status": "frozen"}),
        ("compressed-tensors int4", {"kv_cache_scheme": {"num_bits": 8}}),
        ("compressed-tensors int4", {"config_groups": {}}),
        ("compressed-tensors int4", {"config_groups": ["W4A16"]}),
        ("compressed-tensors int4", {"config_groups": {"W4A16": ["Linear"]}}),
    ],
)
def test_what_a_config_leaves_unsaid_or_says_otherwise_is_not_the_same(tmp_path, name, keys):
    folder = good(tmp_path / "source", name)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= keys
    (folder / "config.json").write_text(json.dumps(config))
    assert not matches(parse_target(TARGETS[name]), Checkpoint.open(folder))


@pytest.mark.parametrize(
    ("name", "part", "tensor"),
    [
        ("gptq", "g_idx", None),
        ("gptq", "scales", torch.ones(2, 128, dtype=torch.float16)),  # groups of 64 in this module alone
        ("gptq", "scales", torch.ones(1, 128, dtype=torch.bfloat16)),
        ("nf4", "weight.absmax", torch.zeros(128, dtype=torch.uint8)),  # blocks of 128
        ("nf4", "weight.absmax", torch.zeros(256)),
        ("int8", "SCB", torch.ones(128, 1)),
    ],
)
def test_a_module_that_lies_otherwise_is_seen_in_its_headers(tmp_path, name, part, tensor):
    folder = good(tmp_path / "source", name)
    tensors = load_file(folder / "model.safetensors")
    key = f"model.layers.0.self_attn.q_proj.{part}"
    assert tensors.pop(key).shape is not None
    save_file(tensors if tensor is None else {**tensors, key: tensor}, folder / "model.safetensors")
    assert not matches(parse_target(TARGETS[name]), Checkpoint.open(folder))
