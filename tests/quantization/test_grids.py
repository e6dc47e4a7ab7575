"""A grid spans its weights, is stored as it is used, and every weight takes the nearest code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import NonFinite
from pipeline.formats.rounded import Rounded
from pipeline.quantization.gptq import round_gptq
from pipeline.quantization.grids import SMALLEST_SCALE, find_grid, nearest, onto
from pipeline.targets import GPTQTarget

OPTIONS = {"bits": 4, "group_size": -1, "symmetric": False}


def random(rows, columns, *, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_a_grid_divides_the_range_from_the_least_to_the_largest_weight():
    """-2 … 5.5 in 15 steps of 0.5: zero lies four steps up."""
    scales, zeros = find_grid(torch.tensor([[-2.0, 5.5, 1.0, 0.2]]), **OPTIONS)
    assert (scales.dtype, zeros.dtype) == (torch.float16, torch.uint8)
    assert (scales.tolist(), zeros.tolist()) == ([[0.5]], [[4]])
    rounded = nearest(torch.tensor([[-2.0, 5.5, 1.0, 0.2]]), **OPTIONS)
    assert rounded.codes.tolist() == [[0, 15, 6, 4]]
    assert rounded.dense().tolist() == [[-2.0, 5.5, 1.0, 0.0]]


def test_zero_is_on_every_grid():
    scales, zeros = find_grid(torch.tensor([[3.0, 7.5], [-3.0, -7.5]]), **OPTIONS)
    assert (scales.tolist(), zeros.tolist()) == ([[0.5], [0.5]], [[0], [15]])


@pytest.mark.parametrize("row", [[-7.5, 1.0], [7.5, -1.0], [7.5, 1.0]])
def test_a_symmetric_grid_spans_the_largest_weight_on_both_sides(row):
    """The last row has no negative weight; GPTQ's own quantizer would give it half the scale."""
    scales, zeros = find_grid(torch.tensor([row]), bits=4, group_size=-1, symmetric=True)
    assert (scales.tolist(), zeros.tolist()) == ([[1.0]], [[8]])


def test_each_group_of_inputs_has_its_own_grid():
    weight = torch.tensor([[0.0, 1.5, 0.0, 3.0], [0.0, 6.0, 0.0, 12.0]])
    rounded = nearest(weight, bits=2, group_size=2, symmetric=False)
    assert rounded.scales.tolist() == [[0.5, 1.0], [2.0, 4.0]]
    assert rounded.groups.tolist() == [0, 0, 1, 1]
    assert rounded.groups.dtype == torch.int32
    assert torch.equal(rounded.dense(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_stay_zeros_on_a_harmless_scale(symmetric):
    rounded = nearest(torch.zeros(3, 8), bits=4, group_size=4, symmetric=symmetric)
    assert rounded.scales.float().allclose(torch.tensor(2 / 15), rtol=1e-3)
    assert rounded.zeros.eq(8).all()
    assert not rounded.dense().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_nearest_for_the_scale_as_it_is_stored(dtype, symmetric):
    """0.1 is no float16: after 15 steps of what is stored instead, codes chosen for 0.1 would be no nearest ones."""
    weight = random(64, 128)
    rounded = nearest(weight, bits=8, group_size=128, symmetric=symmetric, dtype=dtype)
    assert rounded.scales.dtype == dtype
    step, zero = rounded.scales.double(), rounded.zeros.double()
    every = torch.arange(256)[:, None, None] - zero
    best = ((every * step - weight.double()) ** 2).argmin(0)
    assert torch.equal(rounded.codes.long(), best)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), symmetric=st.booleans(), mse=st.booleans(), exponent=st.integers(-7, 4),
    group_size=st.sampled_from([8, 32, -1]),
)  # fmt: skip
def test_no_weight_inside_the_range_is_off_by_more_than_half_a_step(bits, seed, symmetric, mse, exponent, group_size):
    weight = random(5, 32, seed=seed) * 10.0**exponent
    rounded = nearest(weight, bits=bits, group_size=group_size, symmetric=symmetric, mse=mse)
    assert int(rounded.codes.max()) < 2**bits
    assert int(rounded.zeros.max()) < 2**bits
    steps = torch.index_select(rounded.scales.float(), 1, rounded.groups.long())
    inner = (rounded.codes > 0) & (rounded.codes < 2**bits - 1)
    off = (rounded.dense() - weight).abs() / steps
    assert bool((off[inner] <= 0.5 + 1e-4).all())
    if not (symmetric or mse or exponent < -2):  # a scale below 6e-5 has fewer digits
        assert float(off.max()) < 0.6


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_on_a_grid_stay_where_they_are(symmetric):
    once = nearest(random(16, 64), bits=4, group_size=16, symmetric=symmetric)
    again = onto(once.dense(), once)
    assert torch.equal(again.codes, once.codes)
    assert torch.equal(onto(once.dense().bfloat16().float(), once).codes, once.codes)


def test_a_stored_grid_may_have_its_groups_in_any_order():
    weight, groups = random(4, 8), torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.int32)
    scales, zeros = torch.tensor([[0.1, 10.0]] * 4).half(), torch.full((4, 2), 8, dtype=torch.uint8)
    rounded = onto(weight, Rounded(bits=4, codes=weight.byte(), scales=scales, zeros=zeros, groups=groups))
    assert not rounded.dense()[:, groups == 1].any()
    assert (rounded.dense() - weight.clamp(-0.8, 0.7))[:, groups == 0].abs().max() < 0.051


def test_a_stored_scale_may_be_zero_or_negative():
    weight = torch.tensor([[0.0, 0.0, 1.0, -1.0]])
    scales, zeros = torch.tensor([[0.0, -0.25]]).half(), torch.full((1, 2), 8, dtype=torch.uint8)
    groups = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    grid = Rounded(bits=4, codes=weight.byte(), scales=scales, zeros=zeros, groups=groups)
    assert onto(weight, grid).dense().tolist() == weight.tolist()
    for ordered in (False, True):
        target = GPTQTarget(format="gptq", desc_act=ordered)
        rounded = round_gptq(weight, torch.eye(4), target=target, fixed=grid)
        assert rounded.dense().tolist() == weight.tolist()
        assert torch.equal(rounded.scales, scales)


@pytest.mark.parametrize("size", [1e-12, 1e-7])
def test_a_step_too_small_for_float16_becomes_its_smallest(size):
    rounded = nearest(random(4, 64) * size, bits=8, group_size=64, symmetric=True)
    assert torch.equal(rounded.scales.float(), torch.full((4, 1), SMALLEST_SCALE))
    assert (rounded.dense() - random(4, 64) * size).abs().max() <= SMALLEST_SCALE / 2


def test_small_weights_of_many_bits_have_steps_below_the_smallest_normal_float16():
    """Steps of 6.1e-5 and more would be off by 3e-5; here they are 2.4e-5, and off by half of that."""
    weight = random(64, 128) * 1e-3
    rounded = nearest(weight, bits=8, group_size=128, symmetric=True)
    assert (rounded.dense() - weight).abs().max() < 1.7e-5


@pytest.mark.parametrize("bad", [1e7, float("inf"), float("nan")])
def test_a_weight_that_no_scale_reaches_is_refused(bad):
    weight = random(4, 64)
    weight[2, 5] = bad
    with pytest.raises(NonFinite, match="no float16 scale"):
        nearest(weight, bits=4, group_size=16, symmetric=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_gives_up_the_extremes_where_that_costs_least(symmetric):
    weight = random(32, 128)
    weight[:, 7] = 6.0
    options = {"bits": 3, "group_size": 64, "symmetric": symmetric}
    plain, searched = nearest(weight, **options), nearest(weight, mse=True, **options)
    errors = [(found.dense() - weight).abs().pow(2.4).view(32, 2, 64).sum(-1) for found in (plain, searched)]
    assert bool((errors[1] <= errors[0]).all())
    assert float(errors[1].sum()) < 0.9 * float(errors[0].sum())
    assert bool((searched.scales <= plain.scales).all())


def test_the_search_finds_the_same_in_pieces(monkeypatch):
    weight, options = random(9, 64), {"bits": 4, "group_size": 32, "symmetric": False, "mse": True}
    whole = nearest(weight, **options)
    monkeypatch.setattr("pipeline.quantization.grids.AT_ONCE", 128)
    pieces = nearest(weight, **options)
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.scales, pieces.scales)
