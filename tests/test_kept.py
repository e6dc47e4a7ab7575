"""A module keeps the packed bytes that were made from its weight; AWQ keeps layers whole, or module by module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.kept import Donor, Kept, keep, layer_of, made_from, packable, unfolded, writable
from pipeline.targets import AWQTarget, BitsAndBytesTarget, GPTQTarget, parse_target

GPTQ, AWQ, NF4 = GPTQTarget(format="gptq"), AWQTarget(format="awq"), BitsAndBytesTarget(format="bitsandbytes")
W8A8 = parse_target("compressed-tensors:scheme=w8a8")
MODULES = tuple(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("mlp.up_proj", "mlp.down_proj"))
NORMS = tuple(f"model.layers.{layer}.norm.weight" for layer in (0, 1))
SHAPES = {
    "model.embed_tokens.weight": (64, 8), **dict.fromkeys((f"{module}.weight" for module in MODULES), (8, 8)),
    **dict.fromkeys(NORMS, (8,)), "lm_head.weight": (64, 8),
}  # fmt: skip
DENSE = {name: f"digest of {name}" for name in SHAPES}
PACKED = {module: f"packed {module}" for module in MODULES}


def donor(reference: str, *, folded: bool = False, but: tuple[str, ...] = (), **changes) -> Donor:
    """A donor made from DENSE, but for the tensors in `but`, which were others then."""
    made = {name: "of another weight" if name in but else digest for name, digest in DENSE.items()}
    given_ = {"made_from": made, "packed": PACKED, **changes}
    return Donor(reference=reference, folder=Path(reference), folded=folded, **given_)


def names(kept: Kept) -> dict[str, str]:
    return {module: found.reference for module, found in kept.modules.items()}


def changed(*tensors: str) -> dict[str, str]:
    return {**DENSE, **dict.fromkeys(tensors, "changed")}


def test_every_module_is_kept_where_only_the_head_changed():
    kept = keep(GPTQ, SHAPES, changed("lm_head.weight"), [donor("source")])
    assert names(kept) == dict.fromkeys(MODULES, "source")
    assert kept.described_by == donor("source")
    assert kept.counted == {"source": 4}


@pytest.mark.parametrize("target", [GPTQ, NF4, W8A8])
def test_a_changed_weight_costs_its_own_module_and_no_other(target):
    kept = keep(target, SHAPES, changed(f"{MODULES[1]}.weight", NORMS[0]), [donor("source")])
    assert set(kept.modules) == set(MODULES) - {MODULES[1]}
    assert kept.described_by is None


def test_the_first_donor_that_has_a_module_gives_it():
    donors = [donor("source", but=(f"{MODULES[0]}.weight",)), donor("newer"), donor("older")]
    kept = keep(GPTQ, SHAPES, DENSE, donors)
    assert names(kept) == {MODULES[0]: "newer", **dict.fromkeys(MODULES[1:], "source")}
    assert kept.described_by == donors[0]


@pytest.mark.parametrize("tensor", [f"{MODULES[0]}.weight", NORMS[0]])
def test_anything_that_changed_in_a_layer_costs_the_folded_layer(tensor):
    kept = keep(AWQ, SHAPES, changed(tensor), [donor("bot/awq@v0001", folded=True)])
    assert set(kept.modules) == set(MODULES[2:])
    assert not unfolded(kept.modules)


def test_a_layer_with_another_bias_is_another_layer():
    kept = keep(AWQ, SHAPES, {**DENSE, "model.layers.1.mlp.up_proj.bias": "new"}, [donor("old", folded=True)])
    assert set(kept.modules) == set(MODULES[:2])


def test_modules_of_the_packed_source_are_kept_singly_and_their_layers_fold_no_more():
    kept = keep(AWQ, SHAPES, changed(f"{MODULES[0]}.weight", NORMS[1]), [donor("source")])
    assert set(kept.modules) == set(MODULES[1:])
    assert unfolded(kept.modules) == {"model.layers.0", "model.layers.1"}


def test_a_whole_folded_layer_goes_before_a_part_of_the_source():
    """The source lacks a module that changed since; an earlier artifact has it rounded already, with its layer."""
    then = f"{MODULES[0]}.weight"
    donors = [donor("source", but=(then,)), donor("earlier", folded=True)]
    kept = keep(AWQ, SHAPES, DENSE, donors)
    assert names(kept) == {**dict.fromkeys(MODULES[:2], "earlier"), **dict.fromkeys(MODULES[2:], "source")}
    assert unfolded(kept.modules) == {"model.layers.1"}


def test_a_folded_layer_that_packed_more_than_is_wanted_is_not_taken():
    more = {**PACKED, "model.layers.0.mlp.norm_proj": "packed too"}  # by its name no linear layer
    kept = keep(AWQ, SHAPES, DENSE, [donor("old", folded=True, packed=more)])
    assert set(kept.modules) == set(MODULES[2:])


def test_what_a_donor_left_dense_is_not_waited_for():
    spared = frozenset({MODULES[3], "lm_head"})
    packed = {module: PACKED[module] for module in MODULES[:3]}
    one = donor("earlier", spared=spared, packed=packed)
    assert keep(GPTQ, SHAPES, DENSE, [one]).described_by == one
    # It is another model's word where nothing is the same.
    other = donor("another", spared=spared, packed=packed, made_from={})
    assert MODULES[3] in keep(GPTQ, SHAPES, DENSE, [other]).wanted


def test_a_donor_that_packed_the_head_too_does_not_describe_the_whole():
    kept = keep(NF4, SHAPES, DENSE, [donor("source", packed={**PACKED, "lm_head": "packed"})])
    assert set(kept.modules) == set(MODULES)
    assert kept.described_by is None


def test_gptqmodel_and_sequential_calibration_keep_all_modules_or_none_and_everything_else_any():
    whole = (GPTQTarget(format="gptq", engine="gptqmodel"), AWQTarget(format="awq", engine="gptqmodel"),
             GPTQTarget(format="gptq", sequential=True))  # fmt: skip
    for dense, counts in ((DENSE, (4,) * 6), (changed(f"{MODULES[0]}.weight"), (0, 0, 0, 3, 3, 3))):
        found = [writable(one, keep(one, SHAPES, dense, [donor("source")])) for one in (*whole, GPTQ, AWQ, NF4)]
        assert tuple(len(kept.modules) for kept in found) == counts
        assert {kept.wanted for kept in found} == {frozenset(MODULES)}


def test_without_digests_nothing_is_kept():
    assert keep(GPTQ, SHAPES, {}, [donor("source", made_from={})]).modules == {}
    assert keep(AWQ, SHAPES, {}, [donor("source", made_from={}, folded=True)]).modules == {}


def test_bitsandbytes_packs_every_linear_and_all_others_those_of_layers():
    shapes = {**SHAPES, "model.project_out.weight": (8, 8)}
    assert packable(GPTQ, shapes) == packable(AWQ, shapes) == packable(W8A8, shapes) == set(MODULES)
    assert packable(NF4, shapes) == {*MODULES, "model.project_out"}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.experts.5.up_proj.weight", "model.layers.12"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0"),
        ("3.weight", "3"),
        ("model.norm.weight", None),
        ("model.w2v.weight", None),
        ("layers.1", None),
    ],
)
def test_the_first_number_in_a_name_is_the_layers(name, layer):
    assert layer_of(name) == layer


def test_an_output_is_made_from_its_weights_and_awqs_from_whole_layers():
    assert made_from(GPTQ, MODULES[:1], DENSE) == {f"{MODULES[0]}.weight": DENSE[f"{MODULES[0]}.weight"]}
    assert made_from(AWQ, MODULES[:1], DENSE).keys() == {
        NORMS[0], f"{MODULES[0]}.weight", f"{MODULES[1]}.weight"
    }  # fmt: skip


@given(st.sets(st.sampled_from(sorted(DENSE))), st.booleans(), st.booleans())
def test_no_changed_weight_is_ever_copied(tensors, folded, awq):
    dense = changed(*tensors)
    kept = keep(AWQ if awq else GPTQ, SHAPES, dense, [donor("one", folded=folded and awq)])
    for module in kept.modules:
        assert dense[f"{module}.weight"] == DENSE[f"{module}.weight"]
        if folded and awq:
            assert not [name for name in tensors if layer_of(name) == layer_of(module)]
    assert (kept.described_by is not None) == (set(kept.modules) == set(MODULES))


def test_a_kept_without_donors_is_what_the_target_packs():
    kept = keep(GPTQ, SHAPES, DENSE, [])
    assert (kept.wanted, kept.modules, kept.described_by) == (set(MODULES), {}, None)
    assert replace(kept, wanted=frozenset()).described_by is None
