"""The plan knows, before anything runs, what will run and why, and refuses what cannot work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flows.tables import plan_rows
from pipeline import graph
from pipeline.errors import (
    CheckpointError,
    DataError,
    MissingLibrary,
    NotInStore,
    RecipeError,
    RequantError,
    UnsupportedFormat,
)
from pipeline.plan import Plan, make_plan
from pipeline.recipe import parse_recipe
from pipeline.steps import Step
from tests.checkpoints import tiny_llama
from tests.every_format import good

RECIPE = """
schema: 1
name: bot
source: {root}/model
train:
  method: lora
  data: {root}/train.jsonl
  arguments: {{learning_rate: 2e-4, max_steps: 2}}
quantize:
  - {{format: bitsandbytes, type: nf4}}
  - {{format: gptq, bits: 4, group_size: 64}}
calibration: {{samples: 4, sequence_length: 32}}
evaluate:
  data: {root}/eval.jsonl
promote: {{alias: production}}
store: {root}/store
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    tiny_llama(folder / "model")
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(20)))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REQUANT_CACHE", str(tmp_path / "cache"))


def planned(root: Path, *overrides: str) -> Plan:
    return make_plan(parse_recipe(RECIPE.format(root=root), where="r.yaml", overrides=overrides))


def fingerprints(plan: Plan) -> dict[str, str]:
    return {output.variant: output.origin.fingerprint for step in plan.steps for output in step.outputs}


def changed(root: Path, *overrides: str) -> set[str]:
    before, after = fingerprints(planned(root)), fingerprints(planned(root, *overrides))
    return {variant for variant in after if before.get(variant) != after[variant]}


def commit_all(plan: Plan, *, without: set[str] = frozenset()) -> None:
    """Commit an empty stand-in for each output: the plan looks at fingerprints, not at content."""
    for step in plan.steps:
        for output in step.outputs:
            if output.variant in without:
                continue
            with plan.store.workspace(output.origin.fingerprint) as workspace:
                (workspace / "out").mkdir()
                (workspace / "out" / "report.json").write_text('{"scores": []}')
                told = {
                    role: {"reference": "", "fingerprint": f, "digest": ""} for role, f in output.origin.parents.items()
                }
                plan.store.commit(
                    workspace / "out", name="bot", variant=output.variant, origin=output.origin, parents=told,
                    metrics={"seconds": 2.0}, notes={},
                )  # fmt: skip


def statuses(plan: Plan) -> dict[str, str]:
    return {
        output.variant: "reused" if output.artifact else "run" if output.pending else "not needed"
        for step in plan.steps
        for output in step.outputs
    }


def test_the_steps_follow_the_recipe(root):
    plan = planned(root)
    assert [step.stage for step in plan.steps] == ["upcast", "train", "merge", "quantize", "evaluate"]
    assert set(statuses(plan).values()) == {"run"}
    assert plan.steps[0].outputs[0].reason == "never made"


def test_a_recipe_without_training_quantizes_the_dense_model(root):
    plan = planned(root, "train.method=none")
    assert [step.stage for step in plan.steps] == ["upcast", "quantize", "evaluate"]
    quantize = plan.step("quantize")
    assert isinstance(quantize, Step)
    assert quantize.inputs == {"dense": "dense"}


def test_full_training_makes_the_tuned_model_without_a_merge(root):
    plan = planned(root, "train.method=full")
    assert [step.stage for step in plan.steps] == ["upcast", "train", "quantize", "evaluate"]
    assert plan.steps[1].outputs[0].variant == "tuned"


@pytest.mark.parametrize(
    ("override", "depending"),
    [
        ("upcast.dtype=float16", {"dense", "adapter", "tuned", "nf4", "gptq-4bit", "evaluation"}),
        ("train.arguments.learning_rate=1e-4", {"adapter", "tuned", "nf4", "gptq-4bit", "evaluation"}),
        ("quantize.1.group_size=32", {"gptq-4bit", "evaluation"}),
        ("calibration.samples=8", {"gptq-4bit", "evaluation"}),
        ("calibration.data=[train]", set()),
        ("calibration.data=[train, {root}/eval.jsonl]", {"gptq-4bit", "evaluation"}),
        ("evaluate.sequence_length=64", {"evaluation"}),
        ("evaluate.gates.kl_divergence=0.1", set()),
        ("promote.alias=staging", set()),
        ("train.lora.r=4", {"adapter", "tuned", "nf4", "gptq-4bit", "evaluation"}),
    ],
)
def test_a_changed_line_changes_exactly_what_depends_on_it(root, override, depending):
    assert changed(root, override.format(root=root)) == depending


def test_each_source_of_a_mixture_has_a_digest_and_a_share_of_the_samples_in_the_fingerprint(root):
    mixed = f"calibration.data=[train, {root}/eval.jsonl]"
    one = planned(root, mixed).step("quantize").outputs[1].origin
    other = planned(root, mixed, "calibration.shares=[3, 1]").step("quantize").outputs[1].origin
    assert one.data.keys() == {"calibration_1", "calibration_2"}
    assert one.data["calibration_1"] != one.data["calibration_2"]
    assert (one.options["calibration"]["samples"], other.options["calibration"]["samples"]) == ([2, 2], [3, 1])
    assert one.fingerprint != other.fingerprint
    assert planned(root, mixed, "calibration.shares=[6, 2]").step("quantize").outputs[1].origin == other


def test_every_source_of_a_mixture_is_looked_at_before_anything_runs(root, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"nothing": 1}\n')
    with pytest.raises(DataError, match=r"rows.jsonl line 1: has the fields nothing"):
        planned(root, f"calibration.data=[train, {tmp_path}/rows.jsonl]")
    with pytest.raises(DataError, match=r"none.jsonl: no such file"):
        planned(root, f"calibration.data=[train, {tmp_path}/none.jsonl]")


def test_nothing_runs_once_everything_is_in_the_store(root, tmp_path):
    commit_all(planned(root, f"store={tmp_path / 's'}"))
    plan = planned(root, f"store={tmp_path / 's'}")
    assert set(statuses(plan).values()) == {"reused"}
    assert not plan.runs


def test_a_changed_line_runs_what_depends_on_it_and_says_why(root, tmp_path):
    commit_all(planned(root, f"store={tmp_path / 's'}"))
    plan = planned(root, f"store={tmp_path / 's'}", "quantize.1.group_size=32")
    found = statuses(plan)
    assert {variant for variant in found if found[variant] == "run"} == {"gptq-4bit", "evaluation"}
    assert {found[variant] for variant in ("dense", "adapter", "tuned", "nf4")} == {"reused"}
    reasons = {output.variant: output.reason for step in plan.steps for output in step.outputs}
    assert reasons["gptq-4bit"] == "target.group_size: 64 → 32"
    assert reasons["evaluation"] == "gptq-4bit changed"
    quantize = plan.step("quantize")
    assert quantize is not None
    assert quantize.needs.seconds == 4.0


def test_changed_data_is_named_as_the_reason(root, tmp_path):
    commit_all(planned(root, f"store={tmp_path / 's'}"))
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "other"}\n')
    plan = planned(root, f"store={tmp_path / 's'}", f"evaluate.data={other}")
    assert plan.steps[-1].outputs[0].reason == "evaluation data changed"


def test_a_folder_of_data_is_the_content_of_its_files_in_order_whatever_their_names(root, tmp_path, monkeypatch):
    lines = (root / "train.jsonl").read_text().splitlines(keepends=True)
    monkeypatch.chdir(tmp_path)
    for folder, names in (("one", "ab"), ("two", "yz"), ("turned", "ba")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{names[0]}.jsonl").write_text("".join(lines[:5]))
        (tmp_path / folder / f"{names[1]}.jsonl").write_text("".join(lines[5:]))
    one, two, globbed, turned = (
        planned(root, f"train.data={path}").step("train") for path in ("one", "two", "one/*.jsonl", "turned")
    )
    assert one.outputs[0].origin == two.outputs[0].origin == globbed.outputs[0].origin
    assert one.outputs[0].origin.data != turned.outputs[0].origin.data
    assert one.data["train"].path == str(tmp_path / "one")
    assert globbed.data["train"].path == str(tmp_path / "one" / "*.jsonl")


def test_what_a_plan_digested_is_what_its_steps_read_even_if_it_changes_elsewhere(root, tmp_path):
    url = f"file://{tmp_path}/train.jsonl"
    (tmp_path / "train.jsonl").write_bytes((root / "train.jsonl").read_bytes())
    plan = planned(root, f"train.data={url}")
    (tmp_path / "train.jsonl").write_text('{"text": "other"}\n')
    taken = plan.step("train").data["train"].path
    assert Path(taken).read_bytes() == (root / "train.jsonl").read_bytes()
    assert fingerprints(plan) == fingerprints(planned(root))


def test_the_parts_of_the_data_are_checked_before_anything_runs(root):
    rows = f"{{path: {root}/train.jsonl, held_out: 0.5, validation: 0.25}}"
    plan = planned(root, f"train.data={rows}", "evaluate.data=held_out")
    assert plan.step("train").data["train"].part == "train"
    assert plan.step("evaluate").data["evaluation"].part == "held_out"
    for share, part in (("held_out: 0.0001", "held_out"), ("held_out: 0.5, validation: 0.0001", "validation")):
        rows = f"{{path: {root}/train.jsonl, {share}}}"
        with pytest.raises(DataError, match=f"none of its 20 rows belongs to the part {part}, whose share is 0.0001"):
            planned(root, f"train.data={rows}", "evaluate.data=held_out")


def test_a_lost_ingredient_is_not_made_again_for_results_that_are_there(root, tmp_path):
    commit_all(planned(root, f"store={tmp_path / 's'}"), without={"dense", "adapter"})
    plan = planned(root, f"store={tmp_path / 's'}")
    assert statuses(plan)["dense"] == statuses(plan)["adapter"] == "not needed"
    assert not plan.runs


def test_a_lost_ingredient_is_made_again_for_what_needs_it(root, tmp_path):
    commit_all(planned(root, f"store={tmp_path / 's'}"), without={"dense", "tuned", "nf4"})
    found = statuses(planned(root, f"store={tmp_path / 's'}"))
    assert {variant for variant in found if found[variant] == "run"} == {"dense", "tuned", "nf4"}
    assert {found[variant] for variant in ("adapter", "gptq-4bit", "evaluation")} == {"reused"}


def test_paths_and_the_machine_are_no_part_of_the_identity(root, tmp_path):
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes((root / "train.jsonl").read_bytes())
    assert changed(root, f"train.data={moved}", f"store={tmp_path / 's'}") == set()


@pytest.mark.parametrize(
    ("override", "error", "said"),
    [
        ("source=/nowhere/at/all", CheckpointError, "no such folder"),
        ("quantize.1.group_size=512", UnsupportedFormat, "group_size 512 does not divide the"),
        ("quantize.1.grid=keep", UnsupportedFormat, "grid keep needs a source that is packed as gptq"),
        ("train.data=/nowhere.jsonl", DataError, "/nowhere.jsonl"),
        ("train.arguments.lerning_rate=1", RecipeError, "learning_rate"),
        ("train.arguments.output_dir=x", RecipeError, "output_dir"),
        ("train.lora.rank=1", RecipeError, "rank"),
        ("evaluate.data.field=body", DataError, "body"),
        ("source=bot/dense@v0009", NotInStore, "bot/dense"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence_and_nothing_is_written(root, tmp_path, override, error, said):
    overrides = [f"store={tmp_path / 's'}", override]
    if "field" in override:
        overrides = [f"store={tmp_path / 's'}", f"evaluate.data={{path: {root}/eval.jsonl, field: body}}"]
    with pytest.raises(error) as raised:
        planned(root, *overrides)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "s").exists()


def test_messages_need_a_chat_template(root, tmp_path):
    rows = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match="no chat template"):
        planned(root, f"train.data={rows}")


def test_an_unreadable_format_is_refused_with_the_tool_that_can(root, tmp_path):
    config = json.loads((root / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedFormat, match="transformers and aqlm"):
        planned(root, f"source={tmp_path}")


def test_a_missing_library_is_named_with_the_command_that_installs_it(root, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gptqmodel" else object())
    with pytest.raises(MissingLibrary, match=r"pip install 'requant\[gptqmodel\]'"):
        planned(root)


def test_every_step_has_a_version(root):
    assert {step.stage for step in planned(root).steps} <= graph.STAGE_VERSIONS.keys()


def test_what_would_be_copied_is_known_once_the_parent_is_made(root, tmp_path):
    plan = planned(root, f"store={tmp_path / 's'}", "train.method=none")
    assert {row["makes"]: row["copied_modules"] for row in plan_rows(plan)} == {
        "dense": None, "nf4": None, "gptq-4bit": None, "evaluation": None
    }  # fmt: skip
    commit_all(plan, without={"nf4", "gptq-4bit", "evaluation"})
    plan = planned(root, f"store={tmp_path / 's'}", "train.method=none")
    assert {row["makes"]: row["copied_modules"] for row in plan_rows(plan)} == {
        "dense": None, "nf4": 0, "gptq-4bit": 0, "evaluation": None
    }  # fmt: skip


def test_an_input_is_made_again_for_those_outputs_that_stand_on_it_and_no_others(root, tmp_path):
    source = good(tmp_path / "gptq", "gptq")
    given = (f"store={tmp_path / 's'}", f"source={source}", "train.method=full", "calibration.sequence_length=16")
    targets = "quantize=[{format: gptq}, {format: bitsandbytes}]"
    commit_all(planned(root, *given, targets), without={"dense", "nf4"})
    assert statuses(planned(root, *given, targets)) == {
        "dense": "not needed", "tuned": "reused", "gptq-4bit": "reused", "nf4": "run", "evaluation": "reused"
    }  # fmt: skip
    shutil.rmtree(tmp_path / "s" / "bot" / "gptq-4bit")
    assert statuses(planned(root, *given, targets))["dense"] == "run"


def test_errors_of_the_plan_are_the_users(root):
    with pytest.raises(RequantError) as error:
        planned(root, "source=/nowhere/at/all")
    assert error.value.exit_code == 2
