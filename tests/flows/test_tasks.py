"""What a stage's task run shows of the stage's events."""

from __future__ import annotations

import logging

from flows import tasks
from pipeline import progress
from pipeline.recipe import parse_recipe
from tests.flows.test_remaining import Clock

RECIPE = parse_recipe("name: bot\nsource: model\n", where="r")


def test_figures_that_come_one_by_one_are_one_line_of_the_log_and_stand_beside_the_bar(caplog, monkeypatch):
    bars = []
    monkeypatch.setattr(tasks, "UPDATE_SECONDS", 0.0)
    monkeypatch.setattr(tasks, "create_progress_artifact", lambda **given: bars.append(given) or "bar")
    monkeypatch.setattr(tasks, "update_progress_artifact", lambda **given: bars.append(given))
    caplog.set_level(logging.INFO)
    sink = tasks.PrefectSink(RECIPE, logging.getLogger("task"), Clock())
    with progress.shown_by(sink):
        progress.step("train", done=1, total=4, unit="steps")
        progress.metric("train", "loss", 2.5)
        progress.metric("train", "learning_rate", 1e-4)
        progress.step("train", done=2, total=4, unit="steps")
        progress.metric("train", "loss", 2.25)
        progress.metric("train", "loss", 2.0)
        progress.message("train", "trained 4 steps")
        progress.metric("train", "loss", 1.75)
    sink.flush()
    assert [record.getMessage() for record in caplog.records] == [
        "train: loss 2.5, lr 1.00e-04", "train: loss 2.25", "train: loss 2", "train: trained 4 steps",
        "train: loss 1.75",
    ]  # fmt: skip
    assert [bar["progress"] for bar in bars] == [25.0, 50.0]
    assert bars[1]["description"] == "train in steps: 2 of 4; loss 2.5, lr 1.00e-04"


def test_the_bar_says_what_is_left_though_not_every_step_is_sent(monkeypatch):
    bars, clock = [], Clock()
    monkeypatch.setattr(tasks, "create_progress_artifact", lambda **_: "bar")
    monkeypatch.setattr(tasks, "update_progress_artifact", lambda **given: bars.append(given["description"]))
    with progress.shown_by(tasks.PrefectSink(RECIPE, logging.getLogger("task"), clock)):
        for done in range(1, 7):
            progress.step("train", done=done, total=10, unit="steps")
            clock.now += 1.5
    assert bars == ["train in steps: 3 of 10; 10 s left", "train in steps: 5 of 10; 8 s left"]
