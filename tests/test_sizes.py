"""Dense shapes come from headers, and what cannot be packed is refused with the layer's name."""

from __future__ import annotations

import pytest

from pipeline.catalog import DENSE
from pipeline.checkpoint import Checkpoint
from pipeline.errors import UnsupportedFormat
from pipeline.sizes import Sizes, check_target, dense_sizes
from pipeline.targets import AWQTarget, BitsAndBytesTarget, GPTQTarget, parse_target
from tests.checkpoints import tiny_llama


def sizes(outputs, inputs):
    return Sizes(shapes={"model.layers.0.mlp.up_proj.weight": (outputs, inputs), "lm_head.weight": (7, inputs)})


def test_a_group_size_that_does_not_divide_the_inputs_is_refused_with_those_that_do():
    with pytest.raises(UnsupportedFormat, match=r"group_size 128 .* 96 inputs of model.layers.0.mlp.up_proj.*16, 32$"):
        check_target(sizes(64, 96), AWQTarget(format="awq"))


@pytest.mark.parametrize(
    ("target", "outputs", "inputs", "said"),
    [
        (AWQTarget(format="awq", group_size=16, engine="gptqmodel"), 32, 64, "32 outputs .* multiple of 64"),
        (AWQTarget(format="awq", group_size=16), 24, 64, "24 outputs .* multiple of 16"),
        (GPTQTarget(format="gptq", group_size=-1), 24, 64, "24 outputs .* multiple of 16"),
        (GPTQTarget(format="gptq", bits=8, group_size=-1), 6, 64, "6 outputs .* multiple of 4"),
        (GPTQTarget(format="gptq", group_size=-1), 64, 12, "12 inputs .* multiple of 8"),
        (GPTQTarget(format="gptq", bits=3, group_size=-1), 64, 48, "48 inputs .* multiple of 32"),
        (GPTQTarget(format="gptq", bits=2, group_size=-1), 24, 64, "24 outputs .* multiple of 16"),
    ],
)
def test_sides_that_cannot_be_packed_are_refused_with_the_layer(target, outputs, inputs, said):
    with pytest.raises(UnsupportedFormat, match=said):
        check_target(sizes(outputs, inputs), target)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_fits_is_let_through_whatever_the_heads_size(bits):
    check_target(sizes(64, 96), GPTQTarget(format="gptq", bits=bits, group_size=32))


@pytest.mark.parametrize(
    ("options", "inputs", "said"),
    [
        ("group_size=128", 96, "w4a16: group_size 128 does not divide the 96 inputs of .*; group sizes that fit: 32$"),
        ("group_size=32", 48, "take group_size -1$"),
        ("group_size=-1", 12, "the 12 inputs of .* are no multiple of 8, as vLLM needs"),
    ],
)
def test_int4_in_groups_must_fit_the_inputs(options, inputs, said):
    with pytest.raises(UnsupportedFormat, match=said):
        check_target(sizes(7, inputs), parse_target(f"compressed-tensors:{options}"))
    check_target(sizes(7, inputs), parse_target("compressed-tensors:scheme=w8a8"))
    check_target(sizes(7, inputs), parse_target("compressed-tensors:scheme=fp8"))


def test_sixteen_outputs_are_enough_for_our_own_awq():
    check_target(sizes(48, 96), AWQTarget(format="awq", group_size=32))


def test_bitsandbytes_fits_every_shape():
    check_target(sizes(7, 13), BitsAndBytesTarget(format="bitsandbytes"))


def test_the_linear_layers_leave_out_embeddings_norms_and_the_head(tmp_path):
    found = dense_sizes(Checkpoint.open(tiny_llama(tmp_path, layers=1)), DENSE)
    assert len(found.linears) == 7
    assert not any(part in name for name in found.linears for part in ("embed", "lm_head", "norm"))
    assert found.largest == 256 * 128
