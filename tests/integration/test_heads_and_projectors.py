"""A head or a projector from recipe to judged variants: trained by either engine, joined, quantized, reloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline import outcome
from pipeline.checkpoint import Checkpoint
from pipeline.execute import run_step
from pipeline.gates import read_report
from pipeline.plan import Plan, make_plan
from pipeline.recipe import parse_recipe
from pipeline.training import load_projected
from tests.checkpoints import tiny_llama

RECIPE = """
schema: 1
name: {name}
source: {source}
train:
  method: {method}
  engine: {engine}
  data: {{path: {root}/{rows}.jsonl, held_out: 0.2, validation: 0.1}}
  sequence_length: 32
  arguments: {{learning_rate: 1.0e-2, num_train_epochs: 8, per_device_train_batch_size: 16}}
evaluate: {{data: held_out}}
store: {root}/store
"""
WORDS = ("apple", "pear", "plum", "fig", "iron", "zinc", "lead", "tin")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    tiny_llama(folder / "dense", hidden=64, intermediate=96)
    said = [(f"number {i} is some {WORDS[i % 8]}", i % 8) for i in range(240)]
    rows = {
        "classes": [{"text": text, "label": "fruit" if kind < 4 else "metal"} for text, kind in said],
        "figures": [{"text": text, "label": kind / 8} for text, kind in said],
        "tags": [
            {"tokens": text.split(), "tags": ["O", "NUM", "O", "O", "FRUIT" if kind < 4 else "METAL"]}
            for text, kind in said
        ],
        "pairs": [
            {"anchor": f"some {WORDS[kind]} {i}", "positive": f"{WORDS[kind]} {i}"} for i, (_, kind) in enumerate(said)
        ],
    }  # fmt: skip
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def ran(root: Path, name: str, method: str, engine: str, rows: str, *overrides: str, source: str = "dense") -> Plan:
    text = RECIPE.format(root=root, name=name, source=root / source, method=method, engine=engine, rows=rows)
    plan = make_plan(parse_recipe(text, where="r.yaml", overrides=overrides))
    for step in plan.steps:
        run_step(plan, step, isolated=False)
    return plan


def scores(plan: Plan):
    return read_report(outcome.made(plan)["evaluation"].path)


@pytest.mark.parametrize(
    ("method", "engine", "rows"),
    [
        ("head", "features", "classes"), ("head", "trainer", "classes"), ("head", "features", "tags"),
        ("head", "features", "figures"), ("projector", "features", "classes"), ("projector", "trainer", "classes"),
        ("projector", "features", "figures"), ("projector", "features", "pairs"), ("projector", "trainer", "pairs"),
    ],
)  # fmt: skip
def test_each_method_learns_each_task_with_either_engine(root, method, engine, rows):
    plan = ran(root, f"{method}-{engine}-{rows}", method, engine, rows)
    assert [step.name for step in plan.steps] == ["upcast", "train", "merge", "evaluate"]
    found = scores(plan)["tuned"]
    if rows == "figures":
        assert found.root_mean_squared_error < 0.25  # the labels' own deviation is 0.29
    else:
        assert found.accuracy > {"classes": 0.9, "tags": 0.9, "pairs": 0.2}[rows]
    trained = outcome.made(plan)[method].manifest
    assert trained.metrics["sample_loss_after"] < trained.metrics["sample_loss_before"]


def test_a_projector_and_its_quantized_backbone_are_one_model_that_agrees_with_the_dense_one(root):
    plan = ran(root, "pair", "projector", "features", "classes", "quantize=[{format: bitsandbytes}]",
               "evaluate.gates={top1_agreement: 0.9, accuracy_drop: 0.05, tuned: {accuracy: 0.9}}")  # fmt: skip
    rows = {row.variant: row for row in outcome.rows(plan)}
    assert (rows["tuned"].gate, rows["nf4"].gate) == ("passed", "passed")
    models = [load_projected(rows[variant].artifact.path) for variant in ("tuned", "nf4")]
    ids = torch.randint(3, 250, (4, 12))
    dense, packed = (model(ids, torch.ones_like(ids)).logits for model in models)
    assert torch.equal(models[0].projector.layer.output.weight, models[1].projector.layer.output.weight)
    assert (dense - packed).abs().max() < 0.5 * dense.abs().max()


def test_a_projector_on_a_quantized_source_rewrites_no_tensor_of_it(root):
    source = outcome.made(ran(root, "made", "projector", "features", "classes", "quantize=[{format: bitsandbytes}]"))[
        "nf4"
    ]
    plan = ran(root, "on-source", "projector", "features", "classes", "train.base=source",
               source=str(source.path.relative_to(root)))  # fmt: skip
    assert [step.name for step in plan.steps] == ["train", "merge", "evaluate"]
    tuned = outcome.made(plan)["tuned"]
    assert tuned.manifest.packed == source.manifest.packed
    assert tuned.manifest.packed
    assert Checkpoint.open(tuned.path).quantization.method == "bitsandbytes"
    assert scores(plan)["tuned"].accuracy > 0.9


@pytest.mark.parametrize(("method", "prefix"), [("head", "model"), ("projector", "backbone")])
def test_some_of_the_backbone_trains_beside_a_head_where_the_recipe_names_it(root, method, prefix):
    plan = ran(root, f"beside-{method}", method, "auto", "classes", f"train.trainable=[{prefix}.layers.1.mlp.*]",
               "train.arguments.num_train_epochs=2")  # fmt: skip
    assert plan.step("train").options["engine"] == "trainer"
    made = outcome.made(plan)
    before, after = made["dense"].manifest.tensors, made["tuned"].manifest.tensors
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert scores(plan)["tuned"].accuracy > 0.9


def test_the_features_are_computed_once_for_two_learning_rates(root):
    first = ran(root, "rates", "projector", "features", "classes")
    features = root / "store" / ".store" / "features"
    before = {path: path.stat().st_mtime_ns for path in features.rglob("*.f32")}
    again = ran(root, "rates", "projector", "features", "classes", "train.arguments.learning_rate=5e-3")
    assert outcome.made(first)["projector"].reference != outcome.made(again)["projector"].reference
    assert {path: path.stat().st_mtime_ns for path in features.rglob("*.f32")} == before
