"""NF4 and FP4 are written as bitsandbytes quantizes the same weights on a CPU, bit for bit."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import NonFinite
from pipeline.formats import bnb_4bit, bnb_4bit_pack, bnb_dynamic, shares
from tests.formats.groups import packed, quantized

CONFIG = quantized("bitsandbytes", load_in_4bit=True)
OPTIONS = [{"kind": kind, "double_quant": double} for kind in ("nf4", "fp4") for double in (True, False)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def written_by_bitsandbytes(weight, *, kind, double_quant):
    functional = pytest.importorskip("bitsandbytes.functional", reason="there is nothing to compare with")
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double_quant)
    return {"weight": codes, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}


def assert_the_same(found, expected):
    assert list(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        # Bytes, since -0.0 is not 0.0 on disk.
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_eight_values_packed_by_hand():
    """Each becomes the code of the nearest value, the even one in the high nibble; the state says the rest."""
    weight = torch.tensor([[2.0, -2.0, 0.0, 1.0], [-0.1, 0.1, 1.1, -1.9]])
    made = bnb_4bit_pack.pack(weight, kind="nf4", double_quant=False)
    assert made["weight"].tolist() == [[0xF0], [0x7C], [0x68], [0xD0]]
    assert made["weight.absmax"].tolist() == [2.0]
    assert json.loads(bytes(made["weight.quant_state.bitsandbytes__nf4"].tolist())) == {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 4]
    }  # fmt: skip


def test_fp4_by_hand():
    """FP4's codes are a sign, two bits of exponent and one of mantissa, in twelfths of the largest."""
    weight = torch.tensor([[12.0, 8.0, 6.0, 4.0, 3.0, 2.0, 0.0, -12.0, -8.0, -6.0, -4.0, -3.0, -2.0, 0.0625]])
    made = bnb_4bit_pack.pack(weight, kind="fp4", double_quant=False)
    assert bytes(made["weight"].flatten().tolist()).hex() == "325476" + "0b" + "adcfe1"


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 1), (2, 64), (3, 43), (5, 20), (64, 128), (129, 257), (257, 256)]),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(OPTIONS),
    power=st.sampled_from([1, 3, 9]),
    size=st.sampled_from([1.0, 300.0, 1e-3, 1e-38]),
    zeros=st.sampled_from([0.0, 0.5, 0.99]),
)
def test_every_byte_is_bitsandbytes_own(seed, shape, dtype, options, power, size, zeros):
    """Of smooth and skewed weights, sparse ones and denormal ones; with a short last block and an odd number too."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(shape, generator=generator).mul_(2).sub_(1).pow_(power).mul_(size)
    weight = torch.where(torch.rand(shape, generator=generator) < zeros, 0.0, weight).to(dtype)
    assert_the_same(bnb_4bit_pack.pack(weight, **options), written_by_bitsandbytes(weight, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_quotients_on_and_around_each_midpoint_go_where_bitsandbytes_sends_them(options):
    """A cell of the table is 65,536 floats wide: every bound is met from both sides, in and beside its own cell."""
    values = torch.tensor(sorted(bnb_4bit_pack._VALUES[options["kind"]]))
    bounds = ((values[:-1] + values[1:]) / 2).view(torch.int32)
    steps = torch.cat([torch.arange(-70_000, 70_000, 997), torch.arange(-40, 41)]).to(torch.int32)
    near = (bounds[:, None] + steps).flatten().view(torch.float32)
    near = torch.cat([near[near.abs() <= 1], torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0])])
    near = torch.nn.functional.pad(near, (0, -near.numel() % 63)).view(-1, 63)
    weight = torch.cat([near, torch.ones(len(near), 1)], dim=1)  # the block's largest is 1: quotients are the weights
    assert_the_same(bnb_4bit_pack.pack(weight, **options), written_by_bitsandbytes(weight, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.3])
def test_a_weight_that_is_the_same_everywhere_is_packed_as_bitsandbytes_packs_it(options, value):
    weight = torch.full((33, 100), value)
    assert_the_same(bnb_4bit_pack.pack(weight, **options), written_by_bitsandbytes(weight, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_how_tiles_are_shared_among_threads_changes_nothing(monkeypatch, dtype):
    weight = torch.randn(5 * 511 + 3, 65, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = written_by_bitsandbytes(weight, kind="nf4", double_quant=False)
    for cores in (1, 2, 3, 16):
        monkeypatch.setattr(shares, "cores", lambda cores=cores: cores)
        assert_the_same(bnb_4bit_pack.pack(weight, kind="nf4", double_quant=False), expected)


def test_a_transposed_weight_is_packed_as_it_reads():
    weight = torch.randn(96, 40)
    expected = bnb_4bit_pack.pack(weight.T.contiguous(), kind="nf4", double_quant=True)
    assert_the_same(bnb_4bit_pack.pack(weight.T, kind="nf4", double_quant=True), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 43), (300, 64)])
def test_shapes_are_known_before_packing(options, shape):
    weight = torch.randn(shape).bfloat16()
    made = bnb_4bit_pack.pack(weight, **options)
    assert bnb_4bit_pack.shapes(weight, **options) == {name: (t.dtype, tuple(t.shape)) for name, t in made.items()}


def test_without_double_quantization_shapes_need_no_weight():
    weight = torch.empty(300, 64, dtype=torch.bfloat16, device="meta")
    found = bnb_4bit_pack.shapes(weight, kind="nf4", double_quant=False)
    assert found["weight"] == (torch.uint8, (9600, 1))


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["nf4", "fp4"]))
def test_what_was_read_back_is_packed_to_the_same_weights(seed, kind):
    """NF4's bytes come back too; FP4 has two zeros, and a small weight above zero takes the other one first."""
    weight = torch.randn(20, 50, generator=torch.Generator().manual_seed(seed))
    made = bnb_4bit_pack.pack(weight, kind=kind, double_quant=False)
    read = bnb_4bit.dequantize(packed(made), CONFIG)
    again = bnb_4bit_pack.pack(read, kind=kind, double_quant=False)
    assert torch.equal(bnb_4bit.dequantize(packed(again), CONFIG), read)
    assert kind == "fp4" or torch.equal(again["weight"], made["weight"])


@pytest.mark.parametrize(
    ("value", "place", "options"), list(itertools.product([float("nan"), float("inf")], [0, -1], OPTIONS)), ids=str
)
def test_a_weight_that_is_no_number_is_refused(value, place, options):
    weight = torch.randn(3, 43)
    weight.view(-1)[place] = value
    for work in (bnb_4bit_pack.pack, bnb_4bit_pack.shapes) if options["double_quant"] else (bnb_4bit_pack.pack,):
        with pytest.raises(NonFinite, match="holds NaN or infinity"):
            work(weight, **options)


def test_the_dynamic_type_is_bitsandbytes_own():
    functional = pytest.importorskip("bitsandbytes.functional", reason="there is nothing to compare with")
    assert torch.equal(bnb_dynamic.dynamic_map(), functional.create_dynamic_map())


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-40, 0.0])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 10_000])
def test_nested_scales_are_bitsandbytes_own(size, count):
    functional = pytest.importorskip("bitsandbytes.functional", reason="there is nothing to compare with")
    scales = torch.randn(count, generator=torch.Generator().manual_seed(count)) * size
    scales[::7] = 0
    expected, state = functional.quantize_blockwise(scales, blocksize=256)
    codes, outer = bnb_dynamic.nest(scales, torch.tensor(0.0))
    assert torch.equal(codes, expected)
    assert torch.equal(outer, state.absmax)
