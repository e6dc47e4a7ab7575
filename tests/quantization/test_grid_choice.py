"""A module stays on its stored grid, gets a new one, or whichever loses less of the output."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from pipeline.formats.rounded import split, stack
from pipeline.quantization.gptq import round_gptq, trace_error
from pipeline.quantization.grid_choice import anew_by_awq, anew_by_gptq, on_awq_grid, settle
from pipeline.quantization.grids import nearest, onto
from pipeline.targets import AWQTarget, GPTQTarget
from tests.formats.groups import check_same

TARGET = GPTQTarget(format="gptq", group_size=32, symmetric=False)
AWQ = AWQTarget(format="awq", group_size=32)


def layer(outputs=16, inputs=64, *, seed=0):
    """A weight, and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(outputs, inputs, generator=generator), mixed.T @ mixed


def modules():
    """Two modules of one input: `near` lies almost on its stored grid, in the middle of it, `far` partly beyond."""
    old, gram = layer()
    grid = nearest(old, bits=4, group_size=32, symmetric=False)
    near = replace(grid, codes=grid.codes.clamp(4, 11)).dense() + 0.0001 * old
    return {"near": near, "far": 3 * layer(seed=1)[0]}, {"near": grid, "far": grid}, gram


def settled(grid, *, names=("near", "far"), gram=True, target=TARGET):
    weights, stored, given = modules()
    given = given if gram else None
    fresh = partial(anew_by_gptq, gram=given, target=target)
    stored = {name: stored[name] for name in names}
    return settle(weights, stored, given, grid=grid, target=target, fresh=fresh)


def test_what_is_stacked_comes_apart_again():
    parts = [nearest(layer(outputs, seed=outputs)[0], bits=4, group_size=32, symmetric=True) for outputs in (3, 5)]
    for found, expected in zip(split(stack(parts), [3, 5]), parts, strict=True):
        check_same(found, expected)


def test_keep_leaves_the_grid_and_fresh_does_not():
    weights, stored, gram = modules()
    kept, fresh = settled("keep"), settled("fresh")
    for name in weights:
        assert torch.equal(kept[name].scales, stored[name].scales)
        assert torch.equal(kept[name].zeros, stored[name].zeros)
        assert not torch.equal(fresh[name].scales, stored[name].scales)
        check_same(kept[name], round_gptq(weights[name], gram, target=TARGET, fixed=stored[name]))


def test_better_is_whichever_loses_less_and_never_worse():
    weights, _, gram = modules()
    kept, fresh, better = settled("keep"), settled("fresh"), settled("better")
    check_same(better["near"], kept["near"])
    check_same(better["far"], fresh["far"])
    for name, weight in weights.items():
        errors = [trace_error(found[name].dense() - weight, gram) for found in (better, kept, fresh)]
        assert errors[0] == min(errors)


@pytest.mark.parametrize("grid", ["keep", "better"])
def test_a_module_without_a_stored_grid_gets_a_new_one(grid):
    check_same(settled(grid, names=("near",))["far"], settled("fresh")["far"])


def test_without_a_gram_the_nearest_codes_and_the_plain_error_decide():
    weights, stored, _ = modules()
    target = TARGET.model_copy(update={"rounding": "nearest"})
    better = settled("better", gram=False, target=target)
    assert torch.equal(better["near"].scales, stored["near"].scales)
    check_same(better["near"], onto(weights["near"], stored["near"]))
    check_same(better["far"], nearest(weights["far"], bits=4, group_size=32, symmetric=False))


def test_grids_whose_inputs_are_grouped_otherwise_are_rounded_by_themselves():
    weights, stored, gram = modules()
    ordered = round_gptq(weights["far"], gram, target=TARGET.model_copy(update={"desc_act": True}))
    assert not torch.equal(ordered.groups, stored["near"].groups)
    fresh = partial(anew_by_gptq, gram=gram, target=TARGET)
    found = settle(weights, stored | {"far": ordered}, gram, grid="keep", target=TARGET, fresh=fresh)
    assert torch.equal(found["near"].groups, stored["near"].groups)
    check_same(found["far"], round_gptq(weights["far"], gram, target=TARGET, fixed=ordered))


def test_awqs_grid_is_kept_with_gptqs_compensation():
    weights, stored, gram = modules()
    fresh = partial(anew_by_awq, gram=gram, target=AWQ)
    kept = settle(weights, stored, gram, grid="keep", target=on_awq_grid(AWQ), fresh=fresh)
    better = settle(weights, stored, gram, grid="better", target=on_awq_grid(AWQ), fresh=fresh)
    assert torch.equal(kept["far"].scales, stored["far"].scales)
    check_same(better["near"], kept["near"])
    check_same(better["far"], fresh(weights)["far"])
