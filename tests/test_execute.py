"""A step runs its stage in a child process or in this one, commits each output, and leaves nothing half-done."""

from __future__ import annotations

import contextlib
import json
import shutil
import types

import pytest

from pipeline import outcome, progress
from pipeline.artifacts import Store
from pipeline.errors import GateRefused, NoSpace
from pipeline.execute import run_step
from pipeline.plan import Plan, make_plan
from pipeline.recipe import parse_recipe
from tests.checkpoints import tiny_llama

RECIPE = """
name: bot
source: {root}/model
quantize: [{{format: bitsandbytes, type: nf4, double_quant: false}}]
evaluate: {{data: {root}/eval.jsonl, sequence_length: 32}}
promote: {{alias: production}}
store: {root}/store
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("execute")
    tiny_llama(folder / "model")
    (folder / "eval.jsonl").write_text("".join(json.dumps({"text": f"row number {i}"}) + "\n" for i in range(20)))
    return folder


def planned(root, *overrides: str) -> Plan:
    return make_plan(parse_recipe(RECIPE.format(root=root), where="r", overrides=overrides))


@pytest.fixture(scope="module")
def finished(root) -> Plan:
    plan = planned(root)
    for step in plan.steps:
        run_step(plan, step)
    return plan


def test_every_output_is_committed_with_its_parents_and_its_time(finished):
    artifacts = outcome.made(finished)
    assert artifacts.keys() == {"dense", "nf4", "evaluation"}
    nf4 = artifacts["nf4"].manifest
    assert nf4.parents["dense"]["reference"] == artifacts["dense"].reference
    assert nf4.metrics["seconds"] > 0
    assert nf4.packed
    assert artifacts["dense"].manifest.parents["source"]["digest"] == finished.source_digest


def test_a_finished_step_leaves_no_work_behind(finished):
    assert list((finished.store.private / "work").iterdir()) == []


def test_a_second_plan_reuses_everything(root, finished):
    assert not planned(root).runs
    for step in planned(root).steps:
        assert run_step(planned(root), step).keys() == {output.variant for output in step.outputs}


def test_the_rows_show_figures_size_and_verdict(finished):
    rows = {row.variant: row for row in outcome.rows(finished)}
    assert rows.keys() == {"dense", "nf4"}
    assert rows["dense"].bits_per_weight == pytest.approx(16, rel=0.02)
    assert rows["nf4"].bits_per_weight < rows["dense"].bits_per_weight
    scores = rows["nf4"].scores
    assert scores is not None
    assert scores.kl_divergence is not None
    assert 0 < scores.kl_divergence < 1
    assert rows["nf4"].gate == "-"


def test_a_passing_variant_moves_its_alias_and_a_refused_one_does_not(root, finished):
    assert outcome.promote(finished, outcome.rows(finished)) == {"bot/nf4@production": "v0001"}
    assert outcome.promote(finished, outcome.rows(finished)) == {}
    strict = planned(root, "evaluate.gates.kl_divergence=0.0000001", "promote.alias=strict")
    with pytest.raises(GateRefused, match=r"bot/nf4@v0001: kl_divergence .*, bound at most 1e-07") as error:
        outcome.promote(strict, outcome.rows(strict))
    assert error.value.exit_code == 3
    assert "strict" not in strict.store.aliases("bot", "nf4")
    assert strict.store.resolve("bot/nf4").version == "v0001"


def test_a_step_in_this_process_gives_the_same_bytes_as_in_a_child(root, finished, tmp_path):
    plan = planned(root, f"store={tmp_path / 'here'}")
    for step in plan.steps[:2]:
        run_step(plan, step, isolated=False)
    here, there = outcome.made(plan), outcome.made(finished)
    assert {variant: artifact.manifest.digest for variant, artifact in here.items()} == {
        variant: there[variant].manifest.digest for variant in here
    }


def test_events_of_the_child_reach_the_parent(root, tmp_path):
    plan = planned(root, f"store={tmp_path / 's'}")
    events: list[progress.Event] = []
    with progress.shown_by(events.append):
        run_step(plan, plan.steps[0])
    steps = [event for event in events if isinstance(event, progress.Step)]
    assert steps[-1].done == steps[-1].total > 0
    assert any(isinstance(event, progress.Message) and "committed bot/dense@v0001" in event.text for event in events)


def test_a_full_disk_is_said_before_the_stage_starts(root, tmp_path, monkeypatch):
    plan = planned(root, f"store={tmp_path / 's'}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(total=10**9, used=10**9, free=1000))
    with pytest.raises(NoSpace, match="upcast: needs"):
        run_step(plan, plan.steps[0])
    assert not (tmp_path / "s").exists()


def test_a_kill_between_two_targets_leaves_a_workspace_that_the_next_run_takes_up(root, tmp_path, monkeypatch):
    overrides = [f"store={tmp_path / 's'}", "quantize=[{format: bitsandbytes}, {format: bitsandbytes, bits: 8}]"]
    plan = planned(root, *overrides)
    run_step(plan, plan.steps[0])
    commit = Store.commit

    def once(self, folder, **told):
        if told["variant"] == "int8":
            raise KeyboardInterrupt
        return commit(self, folder, **told)

    monkeypatch.setattr(Store, "commit", once)
    with contextlib.suppress(KeyboardInterrupt):
        run_step(plan, plan.steps[1], isolated=False)
    monkeypatch.setattr(Store, "commit", commit)
    again = planned(root, *overrides)
    assert [output.variant for output in again.steps[1].pending] == ["int8"]
    run_step(again, again.steps[1], isolated=False)
    assert list((again.store.private / "work").iterdir()) == []
