"""AWQ's scales and clips make a layer's output better by its Gram matrix, and never worse."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoint import Checkpoint
from pipeline.errors import NonFinite
from pipeline.formats import awq as layout
from pipeline.quantization.awq import clip, scaled, search_scales
from pipeline.quantization.grids import nearest
from pipeline.shards import ShardReader, TensorGroup
from tests.formats.groups import packed, quantized

EXAMPLE = Path(__file__).parents[2] / "examples/stdlib-lm-awq"


def error(change, gram):
    """tr(D H D^T) in float64, as it is written."""
    change = change.double()
    return float((change @ gram.double() @ change.T).trace())


def round_awq(weight, *, group_size):
    return nearest(weight, bits=4, group_size=group_size, symmetric=False)


def rounding_error(weight, gram, group_size):
    return error(round_awq(weight, group_size=group_size).dense() - weight, gram)


def inputs(count, generator, *, tokens=512):
    """Inputs [tokens, count] that depend on each other; a few are many times larger than the rest."""
    mixed = torch.randn(tokens, count, generator=generator) @ torch.randn(count, count, generator=generator)
    sizes = torch.ones(count)
    sizes[torch.randperm(count, generator=generator)[: count // 32]] = 20
    return mixed / count**0.5 * sizes


def example(outputs=128, count=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = inputs(count, generator)
    return torch.randn(outputs, count, generator=generator) / 16, x.T @ x


def test_a_group_by_hand():
    """-3 to 12 in 15 steps: scale 1, zero point 3."""
    rounded = round_awq(torch.tensor([[-3.0, 0.0, 4.4, 12.0]]), group_size=4)
    assert rounded.scales.tolist() == [[1]]
    assert rounded.zeros.tolist() == [[3]]
    assert rounded.codes.tolist() == [[0, 3, 7, 15]]
    assert rounded.dense().tolist() == [[-3, 0, 4, 12]]


def test_a_group_of_one_sign_keeps_its_values():
    """Its grid reaches to 0, where AutoAWQ's would end at 15 steps of a third."""
    dense = round_awq(torch.tensor([[5.0, 10.0], [-5.0, -10.0]]), group_size=2).dense()
    torch.testing.assert_close(dense, torch.tensor([[5.0, 10.0], [-5.0, -10.0]]), rtol=0.07, atol=0)


def test_codes_are_the_nearest_for_the_scale_that_is_stored():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    rounded = round_awq(weight, group_size=32)
    scales = rounded.scales.float().repeat_interleave(32, 1)
    steps = torch.arange(16.0)[:, None, None] - rounded.zeros.float().repeat_interleave(32, 1)
    nearest = (steps * scales - weight).abs().amin(0)
    torch.testing.assert_close((rounded.dense() - weight).abs(), nearest)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([16, 64, -1]), power=st.integers(-18, 14))
def test_every_weight_is_within_half_a_step_and_packs_to_what_it_is(seed, size, power):
    """A step is a scale; below float16's smallest there is one step to 0."""
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    weight[3] = 0
    rounded = round_awq(weight, group_size=size)
    steps = rounded.scales.float().repeat_interleave(64 // rounded.scales.shape[1], 1)
    # Rounding the scale to float16 moves the last code by up to 15 / 2048 of a step, and by half of one below 2 ** -14.
    allowed = torch.where(steps < 2.0**-14, 8.0 * 2.0**-24 + steps, steps * 0.52)
    assert bool(((rounded.dense() - weight).abs() <= allowed).all())
    assert not rounded.dense()[3].any()
    tensors = layout.pack(rounded)
    assert torch.equal(layout.dequantize(packed(tensors), quantized("awq", bits=4, group_size=size)), rounded.dense())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e6])
def test_what_float16_cannot_scale_is_refused(value):
    weight = torch.ones(8, 16)
    weight[5, 5] = value
    with pytest.raises(NonFinite, match="NaN, or values so large that no float16 scale"):
        round_awq(weight, group_size=16)


def test_scaled_is_the_gram_matrix_of_the_divided_inputs():
    generator = torch.Generator().manual_seed(0)
    x, scales = inputs(32, generator).double(), torch.rand(32, generator=generator).double() + 0.5
    torch.testing.assert_close(scaled(x.T @ x, scales), (x / scales).T @ (x / scales))


def test_the_search_helps_where_few_inputs_are_large():
    weight, gram = example()
    scales = search_scales([weight], gram, group_size=64)
    assert scales.dtype == torch.float32
    assert rounding_error(weight * scales, scaled(gram, scales), 64) < 0.8 * rounding_error(weight, gram, 64)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_never_loses(seed):
    """Weights and inputs without any pattern leave nothing to gain; all rows are compared."""
    generator = torch.Generator().manual_seed(seed)
    weight, gram = torch.randn(16, 64, generator=generator), torch.eye(64)
    scales = search_scales([weight], gram, group_size=16)
    after = rounding_error(weight * scales, scaled(gram, scales), 16)
    assert after <= rounding_error(weight, gram, 16) * (1 + 1e-5)


def test_layers_that_read_one_tensor_get_the_scales_that_are_best_for_their_sum():
    weights, gram = [example(seed=seed)[0] for seed in range(3)], example()[1]
    scales = search_scales(weights, gram, group_size=64, rows=128)
    together = torch.cat(weights)
    torch.testing.assert_close(scales, search_scales([together], gram, group_size=64, rows=384))


def test_scales_that_must_be_equal_are():
    weight, gram = example()

    def tie(values):
        return values.view(-1, 2, 16).mean(1, keepdim=True).expand(-1, 2, -1).flatten()

    scales = search_scales([weight], gram, group_size=64, tie=tie).view(-1, 2, 16)
    assert torch.equal(scales[:, 0], scales[:, 1])
    assert scales.unique().numel() == 128


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dead=st.integers(0, 32), size=st.sampled_from([8, 32]))
def test_scales_are_finite_and_positive_whatever_is_zero(seed, dead, size):
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(16, 32, generator=generator), inputs(32, generator, tokens=64)
    x[:, :dead] = 0
    weight[:, 32 - dead :: 2] = 0
    scales = search_scales([weight], x.T @ x, group_size=size)
    assert bool((scales.isfinite() & (scales > 0)).all())
    torch.testing.assert_close(scales.max() * scales.min(), torch.tensor(1.0))


@pytest.mark.parametrize("seed", range(3))
def test_clipping_makes_no_row_worse_and_some_better(seed):
    weight, gram = example(seed=seed)
    clipped = clip(weight, gram, group_size=64)
    assert bool((clipped.abs() <= weight.abs()).all())
    assert bool((clipped.sign() * weight.sign() >= 0).all())
    before = [rounding_error(row[None], gram, 64) for row in weight]
    after = [
        error(round_awq(one[None], group_size=64).dense() - row, gram) for one, row in zip(clipped, weight, strict=True)
    ]
    assert all(late <= early * (1 + 1e-4) for early, late in zip(before, after, strict=True))
    assert sum(after) < 0.9 * sum(before)


def test_one_outlier_without_weight_in_the_output_is_clipped():
    """Its input is always near 0, so a range without it costs nothing."""
    weight = torch.linspace(-1, 1, 16)[None].repeat(8, 1)
    weight[:, 3] = 1.9
    gram = torch.eye(16)
    gram[3, 3] = 1e-6
    clipped = clip(weight, gram, group_size=16)
    assert bool((clipped[:, 3] < 1.5).all())
    assert torch.equal(clipped[:, 4:15], weight[:, 4:15])
    assert rounding_error(clipped, gram, 16) < rounding_error(weight, gram, 16)


def test_another_sweep_over_the_groups_makes_no_row_worse():
    weight, gram = example(outputs=16)
    errors = []
    for sweeps in (0, 1, 2):
        found = round_awq(clip(weight, gram, group_size=32, sweeps=sweeps), group_size=32).dense()
        errors.append([error(row[None], gram) for row in found - weight])
    assert errors[0] == [rounding_error(row[None], gram, 32) for row in weight]
    for early, late in pairwise(errors):
        assert all(after <= before * (1 + 1e-4) for before, after in zip(early, late, strict=True))


def test_a_row_is_clipped_alike_in_whatever_company(monkeypatch):
    weight, gram = example(outputs=32)
    together = clip(weight, gram, group_size=64)
    monkeypatch.setattr("pipeline.quantization.awq.ROWS_AT_ONCE", 256)
    torch.testing.assert_close(clip(weight, gram, group_size=64), together)


def test_a_real_layer_is_better_scaled_and_clipped_than_rounded():
    """Layer 3 of the example model, its weights as they were dequantized; the inputs are random, but as uneven."""
    checkpoint = Checkpoint.open(EXAMPLE)
    generator = torch.Generator().manual_seed(0)
    x = inputs(256, generator)
    gram, weights = x.T @ x, []
    with ShardReader(checkpoint) as reader:
        for name in ("gate_proj", "up_proj"):
            module = f"model.layers.3.mlp.{name}"
            parts = {part: reader[f"{module}.{part}"].clone() for part in ("qweight", "qzeros", "scales")}
            group = TensorGroup(module=module, dense_name=f"{module}.weight", tensors=parts, packed=True)
            weights.append(layout.dequantize(group, checkpoint.quantization))
    # The stored grid is found again from dequantized weights: other groups leave something to round.
    scales = search_scales(weights, gram, group_size=128)
    divided = scaled(gram, scales)
    for weight in weights:
        wide = weight * scales
        clipped = round_awq(clip(wide, divided, group_size=128), group_size=128)
        assert error(clipped.dense() - wide, divided) < 0.9 * rounding_error(weight, gram, 128)
