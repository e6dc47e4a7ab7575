"""Through the engine: what changed since a packed source was dequantized stays on the source's grid where it is to."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pipeline import child, donors, progress
from pipeline.checkpoint import Checkpoint
from pipeline.digests import digest_shard
from pipeline.errors import ReloadMismatch, UnsupportedFormat
from pipeline.formats import awq, compressed_tensors_pack, gptq
from pipeline.jobs import Job
from pipeline.kept import keep
from pipeline.quantization import engine, rounders, writers
from pipeline.quantization.folder import Order
from pipeline.quantization.grids import nearest
from pipeline.quantization.reloaded import Reloaded
from pipeline.sections import Data
from pipeline.stages import quantize
from pipeline.targets import parse_target
from tests.checkpoints import tiny_llama
from tests.packed_models import configure, store, stored, upcast

LITTLE, MUCH, UNCHANGED = (f"model.layers.0.{name}" for name in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"))
NORM = "model.layers.0.{}_layernorm.weight"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
COMPRESSED = {
    "w4a16": "compressed-tensors:group_size=32", "w8a8": "compressed-tensors:scheme=w8a8",
}  # fmt: skip
# What a source is packed as: the packer, its quantization_config, and the target that asks for the same.
LAYOUTS = {
    "gptq": (gptq.pack, {**GPTQ, "desc_act": False}, "gptq:group_size=32"),
    "gptq desc_act": (gptq.pack, {**GPTQ, "desc_act": True}, "gptq:group_size=32,desc_act=true"),
    "awq": (awq.pack, AWQ, "awq:group_size=32"),
} | {
    scheme: (partial(compressed_tensors_pack.pack, scheme=compressed_tensors_pack.scheme_of(target)),
             compressed_tensors_pack.config_of(target, ["lm_head"]), text)
    for scheme, text in COMPRESSED.items() for target in [parse_target(text)]
}  # fmt: skip
# What holds the codes, and what the grid.
PARTS = {"awq": ("qweight", "scales", "qzeros"), "w4a16": ("weight_packed", "weight_scale"),
         "w8a8": ("weight", "weight_scale")}  # fmt: skip
GPTQ_PARTS = ("qweight", "scales", "qzeros", "g_idx")
SAMPLES = tuple(tuple((7 * i * (i + j) + j) % 250 + 3 for i in range(24)) for j in range(6))


class Case:
    """A source packed in a layout, its upcast, and this with one module moved by a little and one by a lot."""

    def __init__(self, folder, layout):
        pack, config, self.text = LAYOUTS[layout]
        self.source = tiny_llama(folder / "source", layers=1)
        tensors = stored(self.source)
        self.modules = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
        for module in self.modules:
            weight = tensors.pop(f"{module}.weight").float()
            parts = pack(on_a_grid(weight, layout))
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        store(self.source, tensors)
        configure(self.source, quantization_config=config)
        self.before = stored(self.source)
        upcasted = upcast(self.source, folder / "upcast", dtype="bfloat16")
        self.upcast = SimpleNamespace(notes=upcasted.notes, tensors=digests(upcasted.folder))
        self.dense = folder / "dense"
        shutil.copytree(upcasted.folder, self.dense)
        changed = stored(self.dense)
        noise = torch.Generator().manual_seed(0)
        for module, size in {LITTLE: 1e-4, MUCH: 0.01}.items():
            weight = changed[f"{module}.weight"]
            moved = weight + size * torch.randn(weight.shape, generator=noise).to(weight.dtype)
            changed[f"{module}.weight"] = moved
        store(self.dense, changed)

    def donor(self, target):
        found = donors.of_source(target, "source", Checkpoint.open(self.source), self.upcast)
        assert found is not None
        return found

    def order(self, folder, options="", **others):
        target = parse_target(f"{self.text}{options}")
        donor = self.donor(target)
        shapes = {name: info.shape for name, info in Checkpoint.open(self.dense).tensors.items()}
        kept = keep(target, shapes, digests(self.dense), (donor,)).modules
        return Order(
            dense=self.dense, out=folder / "out", scratch=folder / "scratch", target=target, calibration=SAMPLES,
            **{"kept": kept, "grid_of": donor, **others},
        )  # fmt: skip

    def write(self, folder, options="", **others):
        (written,) = engine.write([self.order(folder, options, **others)])
        return load_file(folder / "out" / "model.safetensors"), written


def on_a_grid(weight, layout):
    """The nearest codes; where the groups are ordered, any order."""
    inputs = weight.shape[1]
    order = torch.arange(inputs)
    if "desc_act" in layout:
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
    grid = {"bits": 8, "group_size": -1} if layout == "w8a8" else {"bits": 4, "group_size": 32}
    dtype = torch.bfloat16 if layout in COMPRESSED else torch.float16
    found = nearest(weight[:, order], symmetric=layout != "awq", dtype=dtype, **grid)
    back = torch.argsort(order)
    return replace(found, codes=found.codes[:, back], groups=found.groups[back])


def digests(folder):
    return digest_shard(folder / "model.safetensors")[1]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return {layout: Case(tmp_path_factory.mktemp(layout), layout) for layout in LAYOUTS}


def moved(case, tensors, part):
    """The modules of which a packed tensor is other than the source's."""
    return {name for name in case.modules if not torch.equal(tensors[f"{name}.{part}"], case.before[f"{name}.{part}"])}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("gptq", ""),
        ("gptq", ",rounding=nearest"),
        ("gptq desc_act", ""),
        ("gptq desc_act", ",static_groups=true"),
        ("awq", ""),
        ("w4a16", ""),
        ("w4a16", ",rounding=nearest"),
        ("w8a8", ""),
    ],
)
def test_keep_leaves_scales_and_zeros_as_they_were_and_fresh_does_not(cases, tmp_path, layout, options):
    case = cases[layout]
    fresh, _ = case.write(tmp_path / "fresh", options)
    kept, _ = case.write(tmp_path / "keep", f"{options},grid=keep")
    codes, *grid = PARTS.get(layout, GPTQ_PARTS)
    for part in grid:
        assert not moved(case, kept, part)
    assert {LITTLE, MUCH} == moved(case, fresh, grid[0])
    assert MUCH in moved(case, kept, codes) <= {LITTLE, MUCH}
    assert UNCHANGED not in moved(case, fresh, codes)
    assert torch.equal(kept["lm_head.weight"], stored(case.dense)["lm_head.weight"])


def test_awq_moves_no_scales_in_a_layer_on_stored_grids(cases, tmp_path, monkeypatch):
    """Even where every module may be rounded anew: the norms carry the scales that the source was packed with."""
    monkeypatch.setattr(rounders, "search_scales", lambda _, gram, **__: torch.full_like(gram[0], 2))
    case = cases["awq"]
    dense = stored(case.dense)
    folded, _ = case.write(tmp_path / "fresh", kept={})
    assert not torch.equal(folded[NORM.format("input")], dense[NORM.format("input")])
    for grid in ("keep", "better"):
        found, _ = case.write(tmp_path / grid, f",grid={grid}", kept={})
        for norm in ("input", "post_attention"):
            assert torch.equal(found[NORM.format(norm)], dense[NORM.format(norm)])


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"w8a8"}))  # bfloat16 does not hold its codes exactly
def test_an_unchanged_module_that_is_not_copied_keeps_its_bytes_on_its_grid(cases, tmp_path, layout):
    case = cases[layout]
    found, written = case.write(tmp_path, ",grid=keep", kept={})
    assert moved(case, found, PARTS.get(layout, GPTQ_PARTS)[0]) <= {LITTLE, MUCH}
    assert written.survival.keys() == {LITTLE, MUCH}


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_better_takes_of_both_module_by_module(cases, tmp_path, layout):
    case = cases[layout]
    kept, better = (case.write(tmp_path / grid, f",grid={grid}")[0] for grid in ("keep", "better"))
    fresh, _ = case.write(tmp_path / "fresh")
    for module in (LITTLE, MUCH):
        parts = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
        assert any(all(torch.equal(better[part], one[part]) for part in parts) for one in (kept, fresh))
    assert LITTLE not in moved(case, better, "scales")


@pytest.mark.parametrize("grid", ["fresh", "keep", "better"])
@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_what_training_did_to_each_module_is_said(cases, tmp_path, layout, grid):
    said = []
    with progress.shown_by(said.append):
        _, written = cases[layout].write(tmp_path, f",grid={grid}")
    little, much = written.survival[LITTLE], written.survival[MUCH]
    assert written.survival.keys() == {LITTLE, MUCH}
    assert 0 < little.change_in_steps < 0.1 < much.change_in_steps
    assert little.changed_codes < 0.001
    assert much.changed_codes > 0.1
    (text,) = [event.text for event in said if isinstance(event, progress.Message)]
    assert "undo the training of 1 of 2 changed modules" in text
    assert LITTLE in text
    assert ("grid: better" in text) == (grid != "better")


def test_sequential_calibration_stays_on_the_grid_and_sees_the_weights_before_they_are_replaced(cases, tmp_path):
    case = cases["gptq"]
    found, written = case.write(tmp_path, ",grid=keep,sequential=true", kept={})
    assert not moved(case, found, "scales")
    assert written.survival.keys() == {LITTLE, MUCH}


def test_without_a_source_nothing_is_said_of_survival(cases, tmp_path):
    _, written = cases["gptq"].write(tmp_path, kept={}, grid_of=None)
    assert written.survival == {}


def test_what_an_order_with_another_grid_or_other_copies_left_is_not_gone_on_with(cases, tmp_path):
    """With fewer copies the files of the layers would hold too little."""
    case, marks = cases["gptq"], set()
    source = case.donor(parse_target(case.text))
    other = replace(source, packed=dict.fromkeys(source.packed, "other"))
    for others in ({}, {"kept": {}}, {"grid_of": None}, {"grid_of": other}, {}):
        order = case.order(tmp_path, ",grid=keep", **others)
        engine._prepare(order, order.open())
        marks.add((order.scratch / "order.sha256").read_text())
    assert len(marks) == 4


def test_a_source_that_changed_since_its_upcast_is_refused(cases, tmp_path):
    case = cases["gptq"]
    other = tmp_path / "source"
    shutil.copytree(case.source, other)
    tensors = stored(other)
    tensors[f"{MUCH}.qweight"][0, 0] += 1
    store(other, tensors)
    donor = donors.of_source(parse_target("gptq:group_size=32"), "source", Checkpoint.open(other), case.upcast)
    with pytest.raises(ReloadMismatch, match=rf"^{MUCH}: its packed tensors in .*source.* restore that folder"):
        case.write(tmp_path, ",grid=keep", grid_of=donor, kept={})


def test_a_weight_that_was_divided_since_has_no_stored_grid(cases, tmp_path):
    case = cases["awq"]
    notes = {**case.upcast.notes, "dropped": {"act.scales": f"{donors.DIVIDED}{MUCH}.weight"}}
    upcasted = SimpleNamespace(notes=notes, tensors=case.upcast.tensors)
    donor = donors.of_source(parse_target("awq:group_size=32"), "source", Checkpoint.open(case.source), upcasted)
    found, written = case.write(tmp_path, ",grid=keep", grid_of=donor)
    assert moved(case, found, "scales") == {MUCH}
    assert written.survival.keys() == {LITTLE}


def job(case, workspace, donated, **options):
    rows = workspace / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the sum of {i} and {i + 1}"}) + "\n" for i in range(50)))
    target = parse_target(case.text).model_copy(update=options)
    return Job(
        inputs={"dense": case.dense},
        options={"targets": [target.model_dump()], "calibration": {"samples": 4, "sequence_length": 16}, "seed": 0},
        workspace=workspace, data={"calibration": Data(path=str(rows))}, donors={target.variant: donated},
    )  # fmt: skip


def test_the_stage_notes_what_survives_and_counts_what_does_not(cases, tmp_path, monkeypatch):
    seen = []
    good = Reloaded(modules=7, module="", module_deviation=0.0, deviation=None, bound=0.0, seconds=0.0)
    monkeypatch.setattr(child, "run", lambda _, orders, **__: seen.extend(orders) or engine.write(orders))
    monkeypatch.setattr(writers, "reload", lambda made: [good] * len(made))
    case = cases["gptq"]
    donor = case.donor(parse_target("gptq:group_size=32"))
    (output,) = quantize.run(job(case, tmp_path, (donor,), grid="keep"))
    assert seen[0].grid_of == donor
    assert output.notes["survival"].keys() == {LITTLE, MUCH}
    little, much = output.notes["survival"][LITTLE], output.notes["survival"][MUCH]
    assert little.keys() == {"changed_codes", "change_in_steps"}
    assert little["change_in_steps"] == float(f"{little['change_in_steps']:.6g}")
    assert output.metrics["rounded_away"] == 1
    assert output.metrics["changed_codes"] == pytest.approx(
        (little["changed_codes"] + much["changed_codes"]) / 2, abs=1e-6
    )


@pytest.mark.parametrize("grid", ["keep", "better"])
def test_a_grid_that_nothing_is_known_of_is_refused_before_any_row_is_read(cases, tmp_path, grid):
    with pytest.raises(UnsupportedFormat, match=rf"awq-4bit: grid {grid} needs to know .* or leave grid out"):
        next(quantize.run(job(cases["awq"], tmp_path, (), grid=grid)))
