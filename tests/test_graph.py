"""Which steps a recipe takes: what training stands on, what its result joins, and that nothing is planned in vain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import preflight_training
from pipeline.errors import RecipeError
from pipeline.plan import Plan, make_plan
from pipeline.recipe import parse_recipe
from pipeline.trainability import ask
from tests.checkpoints import tiny_llama
from tests.every_format import good

RECIPE = """
schema: 1
name: bot
source: {source}
train: {{method: lora, data: {{path: {root}/text.jsonl, validation: 0.2}}}}
evaluate: {{data: {root}/text.jsonl}}
store: {root}/store
"""
LABELS = ("train.data.path={root}/labels.jsonl", "evaluate.data={root}/labels.jsonl")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    tiny_llama(folder / "dense")
    good(folder / "gptq", "gptq")
    rows = {"text": [{"text": f"row {i}"} for i in range(40)]}
    rows["labels"] = [{"text": f"row {i}", "label": "odd" if i % 2 else "even"} for i in range(40)]
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.fixture(autouse=True)
def _asked_here(monkeypatch):
    """The answers come from this process: a child for each plan would pay the imports again."""
    monkeypatch.setattr(preflight_training.child, "run", lambda _, *given, **__: ask(*given))


def planned(root: Path, source: str, *overrides: str) -> Plan:
    text = RECIPE.format(root=root, source=root / source)
    return make_plan(parse_recipe(text, where="r.yaml", overrides=[each.format(root=root) for each in overrides]))


def shape(plan: Plan) -> list[str]:
    """Each step as `name: inputs → outputs`."""
    return [
        f"{step.name}: {', '.join(step.inputs.values())} → {', '.join(output.variant for output in step.outputs)}"
        for step in plan.steps
    ]


def test_lora_on_the_source_is_merged_into_the_upcast_weights(root):
    assert shape(planned(root, "gptq", "train.base=source")) == [
        "upcast: source → dense",
        "train: source → adapter",
        "merge: dense, adapter → tuned",
        "evaluate: dense, tuned → evaluation",
    ]


def test_a_dense_source_is_its_own_base(root):
    assert shape(planned(root, "dense", "train.base=source")) == shape(planned(root, "dense"))


def test_qlora_is_merged_into_the_dequantized_base_that_it_was_trained_on(root):
    assert shape(planned(root, "dense", "train.base=nf4")) == [
        "upcast: source → dense",
        "base: dense → base-nf4",
        "train: base-nf4 → adapter",
        "dequantize: base-nf4 → dequantized",
        "merge: adapter, dequantized → tuned",
        "evaluate: dense, tuned → evaluation",
    ]


def test_qlora_merged_into_the_original_weights_dequantizes_nothing(root):
    plan = planned(root, "dense", "train.base=int8", "train.merge_base=original")
    assert shape(plan)[1:4] == [
        "base: dense → base-int8",
        "train: base-int8 → adapter",
        "merge: adapter, dense → tuned",
    ]


def test_the_better_merge_looks_at_both_and_at_the_validation_rows(root):
    merge = planned(root, "dense", "train.base=nf4", "train.merge_base=better").step("merge")
    assert merge is not None
    assert merge.inputs == {"adapter": "adapter", "base": "dequantized", "original": "dense"}
    assert merge.data["validation"].part == "validation"


@pytest.mark.parametrize("method", ["head", "projector"])
def test_what_is_trained_on_the_source_alone_upcasts_nothing(root, method):
    plan = planned(root, "gptq", f"train.method={method}", "train.base=source", *LABELS)
    assert shape(plan) == [
        f"train: source → {method}",
        f"merge: source, {method} → tuned",
        "evaluate: tuned → evaluation",
    ]


def test_a_head_is_joined_to_dense_weights_where_they_are_quantized_afterwards(root):
    plan = planned(
        root, "gptq", "train.method=head", "train.base=source", "quantize=[{{format: bitsandbytes}}]", *LABELS
    )
    assert shape(plan) == [
        "upcast: source → dense",
        "train: source → head",
        "merge: dense, head → tuned",
        "quantize: tuned → nf4",
        "evaluate: tuned, nf4 → evaluation",
    ]


def test_a_target_on_the_sources_own_grid_stands_on_the_source_and_its_upcast_too(root):
    targets = "quantize=[{{format: gptq}}, {{format: gptq, group_size: 64, name: other}}, {{format: bitsandbytes}}]"
    given = ("train.base=source", targets, "calibration.sequence_length=16")
    plan = planned(root, "gptq", *given)
    assert "quantize: tuned, source, dense → gptq-4bit, other, nf4" in shape(plan)
    step = plan.step("quantize")
    assert step is not None
    assert [set(output.origin.parents) for output in step.outputs] == [
        {"dense", "source", "upcast"}, {"dense"}, {"dense"}
    ]  # fmt: skip
    refreshed = planned(root, "gptq", *given, "calibration.refresh=true").step("quantize")
    assert refreshed is not None
    assert refreshed.outputs == step.outputs


def test_weights_merged_into_a_dequantized_base_may_keep_its_packed_bytes(root):
    targets = "quantize=[{{format: bitsandbytes, type: nf4}}, {{format: bitsandbytes, bits: 8}}]"
    step = planned(root, "dense", "train.base=nf4", targets).step("quantize")
    assert step is not None
    assert step.inputs == {"dense": "tuned", "base": "base-nf4", "dequantized": "dequantized"}
    assert [set(output.origin.parents) for output in step.outputs] == [{"dense", "base", "dequantized"}, {"dense"}]
    original = planned(root, "dense", "train.base=nf4", "train.merge_base=original", targets).step("quantize")
    assert original is not None
    assert original.inputs == {"dense": "tuned"}


def test_the_parts_of_the_data_are_parts_of_the_identity(root):
    plan = planned(root, "dense", "train.data.held_out=0.3", "evaluate.data=held_out")
    train, evaluate = plan.step("train"), plan.step("evaluate")
    assert train is not None
    assert evaluate is not None
    assert [rows.part for rows in train.data.values()] == ["train", "validation"]
    assert evaluate.data["evaluation"].part == "held_out"
    other = planned(root, "dense", "train.data.held_out=0.2", "evaluate.data=held_out").step("train")
    assert other is not None
    assert other.outputs[0].origin.fingerprint != train.outputs[0].origin.fingerprint


def test_a_launcher_of_one_process_is_no_part_of_the_identity(root):
    def identity(*overrides: str) -> str:
        step = planned(root, "dense", *overrides).step("train")
        assert step is not None
        return step.outputs[0].origin.fingerprint

    assert identity("train.launcher.processes=1") == identity()
    assert identity("train.launcher.processes=2") != identity()


def test_the_original_weights_of_a_source_are_nobodys(root):
    with pytest.raises(RecipeError, match="no weights but those trained on"):
        planned(root, "gptq", "train.base=source", "train.merge_base=original")
