"""A recipe run again rewrites what changed: the source's packed bytes and those of earlier artifacts are copied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import PACKERS, Size, write
from flows.tables import plan_rows
from pipeline import child, donors
from pipeline.artifacts import Artifact
from pipeline.checkpoint import Checkpoint
from pipeline.errors import ReloadMismatch
from pipeline.execute import run_step
from pipeline.kept import layer_of
from pipeline.manifest import MANIFEST, Origin
from pipeline.plan import Plan, make_plan
from pipeline.quantization import bitsandbytes, writers
from pipeline.quantization.folder import Order, write_folder
from pipeline.quantization.reload import check
from pipeline.quantization.reloaded import Reload, Reloaded
from pipeline.recipe import parse_recipe
from pipeline.targets import parse_target
from tests.checkpoints import tiny_llama

SMALL = Size(hidden=256, intermediate=256, vocabulary=256, layers=2)  # a fourth of it, 64, is the least that AWQ packs
RECIPE = """
name: bot
source: {source}
quantize: [{target}]
calibration: {{data: {rows}, samples: 2, sequence_length: 16}}
store: {store}
"""
TARGETS = {
    "gptq": "{format: gptq}", "gptq desc_act": "{format: gptq, desc_act: true}",
    "gptq 3 bits": "{format: gptq, bits: 3}", "awq": "{format: awq}",
    "nf4": "{format: bitsandbytes}", "int8": "{format: bitsandbytes, bits: 8}",
}  # fmt: skip
Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
NORM = "model.layers.{}.input_layernorm.weight"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"the sum of {i} and {i + 1}"}) + "\n" for i in range(40)))
    return path


@pytest.fixture
def calls(monkeypatch) -> list[Order]:
    """The orders that reach a library, none of which is started: `by_a_library` writes in its place."""
    seen: list[Order] = []

    def reload(made):
        real = all(order.target.format == "bitsandbytes" for order, _ in made)
        return check([Reload.of(*one) for one in made]) if real else [Reloaded(seconds=0.0)] * len(made)

    def run(target, order, **_):
        if isinstance(order, list):
            return [run(target, one) for one in order]
        seen.append(order)
        return bitsandbytes.write(order) if order.target.format == "bitsandbytes" else by_a_library(order)

    monkeypatch.setattr(child, "run", run)
    monkeypatch.setattr(writers, "reload", reload)
    return seen


def by_a_library(order: Order):
    """AWQ as a library would leave it: norms scaled, codes that no second call gives again."""
    parent = order.clear()
    made = order.scratch / "made"
    made.mkdir()
    random = torch.Generator().manual_seed(len(list(order.out.parent.parent.parent.parent.rglob(MANIFEST))))
    tensors = load_file(parent.path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        outputs, inputs = tensors.pop(name).shape
        packed = PACKERS["awq"][0](random, outputs, inputs)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in packed.items()}
    tensors |= {name: tensor * 0.5 for name, tensor in tensors.items() if name.endswith("layernorm.weight")}
    save_file(tensors, made / "model.safetensors")
    shutil.copyfile(parent.path / "config.json", made / "config.json")
    return write_folder(order, parent, Checkpoint.open(made), quantization=PACKERS["awq"][1], scaled=True)


def planned(source: Path, target: str, rows: Path, store: Path, *overrides: str) -> Plan:
    text = RECIPE.format(source=source, target=target, rows=rows, store=store)
    return make_plan(parse_recipe(text, where="r", overrides=overrides))


def run(plan: Plan) -> Artifact:
    """The quantized artifact that a plan makes, in this process."""
    for step in plan.steps:
        found = run_step(plan, step, isolated=False)
    (artifact,) = found.values()
    return artifact


def altered(source: Path, folder: Path, *names: str) -> Path:
    """A copy of a dense checkpoint in which the tensors `names` are others."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 if name in names else tensor for name, tensor in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    return folder


def altered_tensors(one: Artifact, other: Artifact) -> set[str]:
    """The tensors that differ."""
    return {name for name, digest in one.manifest.tensors.items() if other.manifest.tensors[name] != digest}


def same(one: Artifact, other: Artifact) -> set[str]:
    """The modules whose packed bytes are equal."""
    return {module for module, digest in one.manifest.packed.items() if other.manifest.packed[module] == digest}


@pytest.mark.parametrize("name", TARGETS)
def test_a_packed_source_that_nothing_changed_keeps_every_packed_byte(tmp_path, rows, calls, name):
    write(tmp_path / "source", name, SMALL)
    plan = planned(tmp_path / "source", TARGETS[name], rows, tmp_path / "store")
    assert plan_rows(plan)[-1]["copied_modules"] is None  # the dense weights are not there yet
    run_step(plan, plan.steps[0], isolated=False)
    assert plan_rows(plan)[-1]["copied_modules"] == 14
    made = run(plan)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "source", made.path))
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "source" / "config.json").read_text())["quantization_config"]
    assert json.loads((made.path / "config.json").read_text())["quantization_config"] == config
    assert made.manifest.metrics["copied_modules"] == made.manifest.metrics["packed_modules"] == 14
    assert made.manifest.notes["copied_from"] == {"source": 14}
    assert made.manifest.parents.keys() == {"dense", "source", "upcast"}
    assert not calls


def test_a_packed_source_that_changed_since_its_upcast_is_not_copied(tmp_path, rows, calls):
    write(tmp_path / "source", "gptq", SMALL)
    plan = planned(tmp_path / "source", TARGETS["gptq"], rows, tmp_path / "store")
    run_step(plan, plan.steps[0], isolated=False)
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{Q_PROJ}.qweight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ReloadMismatch, match=rf"{Q_PROJ}: its packed tensors in .*source.* restore that folder"):
        run_step(plan, plan.steps[1], isolated=False)


def test_a_weight_that_was_divided_after_it_was_packed_is_no_longer_what_its_codes_say(tmp_path):
    """AWQ's scaled activations are divided out of the weight behind them, which then belongs to no packed bytes."""
    write(tmp_path / "source", "awq", SMALL)
    tensors = {f"{module}.weight": module for module in (Q_PROJ, DOWN)}
    notes = {"packed": {Q_PROJ: "q", DOWN: "d"}, "dropped": {"act.scales": f"divided out of {DOWN}.weight"}}
    upcast = SimpleNamespace(notes=notes, tensors=tensors)
    found = donors.of_source(parse_target("awq"), "source", Checkpoint.open(tmp_path / "source"), upcast)
    assert found is not None
    assert found.made_from == {f"{Q_PROJ}.weight": Q_PROJ}
    without = SimpleNamespace(notes={}, tensors=tensors)  # an upcast from before packed bytes were noted
    old = donors.of_source(parse_target("awq"), "source", Checkpoint.open(tmp_path / "source"), without)
    assert old is not None
    assert not old.packed


def test_a_bitsandbytes_source_that_was_told_nothing_left_dense_what_any_writer_leaves(tmp_path):
    write(tmp_path / "source", "nf4", SMALL)
    upcast = SimpleNamespace(notes={"packed": {Q_PROJ: "q"}}, tensors={})
    spared = donors.of_source(parse_target("nf4"), "source", Checkpoint.open(tmp_path / "source"), upcast).spared
    assert {"lm_head", "model.embed_tokens", "model.norm"} <= spared
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = [DOWN]
    path.write_text(json.dumps(config))
    assert not donors.of_source(parse_target("nf4"), "source", Checkpoint.open(tmp_path / "source"), upcast).spared


def test_a_new_head_rewrites_no_backbone_tensor_and_a_new_weight_its_own_module(tmp_path, rows, calls):
    dense = tiny_llama(tmp_path / "dense")
    first = run(planned(dense, TARGETS["nf4"], rows, tmp_path / "store"))
    assert len(calls) == 1
    assert first.manifest.notes["made_from"].keys() == {f"{module}.weight" for module in first.manifest.packed}
    head = altered(dense, tmp_path / "head", "lm_head.weight")
    second = run(planned(head, TARGETS["nf4"], rows, tmp_path / "store"))
    assert len(calls) == 1
    assert same(first, second) == first.manifest.packed.keys()
    assert altered_tensors(first, second) == {"lm_head.weight"}
    third = run(
        planned(altered(head, tmp_path / "weight", f"{Q_PROJ}.weight"), TARGETS["nf4"], rows, tmp_path / "store")
    )
    assert same(second, third) == first.manifest.packed.keys() - {Q_PROJ}
    assert third.manifest.metrics["copied_modules"] == 13
    assert third.manifest.notes["copied_from"] == {"bot/nf4@v0002": 13}
    assert calls[1].kept.keys() == same(second, third)


def test_an_awq_layer_is_copied_with_its_folded_norms_or_not_at_all(tmp_path, rows, calls):
    dense = tiny_llama(tmp_path / "dense")
    first = run(planned(dense, TARGETS["awq"], rows, tmp_path / "store"))
    parent = load_file(dense / "model.safetensors")
    assert torch.equal(load_file(first.path / "model.safetensors")[NORM.format(0)], parent[NORM.format(0)] * 0.5)
    head = altered(dense, tmp_path / "head", "lm_head.weight")
    second = run(planned(head, TARGETS["awq"], rows, tmp_path / "store"))
    assert len(calls) == 1
    assert altered_tensors(first, second) == {"lm_head.weight"}
    norm = altered(head, tmp_path / "norm", NORM.format(1))
    plan = planned(norm, TARGETS["awq"], rows, tmp_path / "store")
    run_step(plan, plan.steps[0], isolated=False)
    assert plan_rows(plan)[-1]["copied_modules"] == 7
    third = run(plan)
    # A layer of which anything changed is scaled anew as a whole, the other one is kept as a whole.
    assert third.manifest.metrics["copied_modules"] == 7
    assert set(calls[1].kept) == {name for name in second.manifest.packed if ".layers.0." in name}
    assert {layer_of(name) for name in altered_tensors(second, third)} == {"model.layers.1"}


def test_other_calibration_rows_copy_what_is_there_unless_it_is_to_be_refreshed(tmp_path, rows, calls):
    dense, store = tiny_llama(tmp_path / "dense"), tmp_path / "store"
    first = run(planned(dense, TARGETS["awq"], rows, store))
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace("sum", "product"))
    refreshed = planned(dense, TARGETS["awq"], other, store, "calibration.refresh=true")
    assert plan_rows(refreshed)[-1]["copied_modules"] == 0
    plan = planned(dense, TARGETS["awq"], other, store)
    # Only what is copied differs, and that from where.
    assert plan.steps[-1].outputs[0].origin == refreshed.steps[-1].outputs[0].origin
    assert run(plan).manifest.digest == first.manifest.digest
    assert len(calls) == 1
    shutil.rmtree(store / "bot" / "awq-4bit" / "v0002")
    assert not same(first, run(refreshed))
    assert len(calls) == 2


def test_another_name_and_another_variant_are_donors_too_and_a_damaged_manifest_is_none(tmp_path, rows, calls):
    dense, store = tiny_llama(tmp_path / "dense"), tmp_path / "store"
    first = run(planned(dense, "{format: bitsandbytes, name: small}", rows, store, "name=other"))
    (store / "other" / "small" / "v0009").mkdir()
    (store / "other" / "small" / "v0009" / MANIFEST).write_text("{")
    second = run(planned(dense, TARGETS["nf4"], rows, store))
    assert second.manifest.notes["copied_from"] == {"other/small@v0001": 14}
    assert second.manifest.digest == first.manifest.digest
    plain = planned(dense, "{format: bitsandbytes, double_quant: false}", rows, store)
    assert plan_rows(plain)[-1]["copied_modules"] == 0


@pytest.mark.parametrize(
    ("text", "found"), [("gptq", ["b", "a"]), ("gptq:grid=keep", ["a"]), ("awq:grid=better", ["a"])]
)
def test_bytes_on_a_sources_grid_come_only_from_what_was_made_of_that_source(monkeypatch, text, found):
    target = parse_target(text)
    options = {"target": target.model_dump(exclude={"name"})}
    origin = Origin(
        stage="quantize", stage_version=1, options=options, parents={"dense": "d", "source": "one"}, data={}
    )
    made = [
        SimpleNamespace(
            reference=reference,
            path=Path(reference),
            manifest=SimpleNamespace(
                stage="quantize", stage_version=1, options=options, notes={"made_from": {"x": "y"}}, packed={},
                created="now", parents={"source": {"fingerprint": source}} if source else {},
            ),
        )
        for reference, source in {"a": "one", "b": "another"}.items()
    ]  # fmt: skip
    monkeypatch.setattr(donors, "_readable", lambda _: made)
    assert [donor.reference for donor in donors.earlier(None, target, origin)] == found
