"""The table of models has a column for each figure that one of them has, and no other."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace

import pytest
from rich.console import Console

from flows import tables, terminal
from pipeline.gates import Scores, Verdict

HEAD = Scores(
    variant="nf4", reference="tuned", rows=200, accuracy=0.85, reference_accuracy=0.9, f1=0.8, kl_divergence=0.02,
    top1_agreement=0.9,
)  # fmt: skip


def row(scores):
    manifest = SimpleNamespace(name="bot", nbytes=1000)
    artifact = SimpleNamespace(version="v0001", path="/store/bot", manifest=manifest)
    verdict = Verdict(variant="nf4", misses=(), judged=True)
    return SimpleNamespace(
        variant="nf4", artifact=artifact, bits_per_weight=4.5, scores=scores, verdict=verdict, gate="passed"
    )


@pytest.fixture
def printed(monkeypatch):
    def show(*scores):
        plan = SimpleNamespace(store=SimpleNamespace(aliases=lambda *_: {"production": "v0001"}))
        out = io.StringIO()
        monkeypatch.setattr(terminal, "OUT", Console(file=out, force_terminal=True, color_system=None, width=160))
        rows = tables.result_rows(plan, [row(score) for score in scores])
        terminal.show_results(rows)
        return rows, out.getvalue()

    return show


def test_a_plan_says_how_many_modules_a_target_copies_where_it_copies_any(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(terminal, "OUT", Console(file=out, force_terminal=True, color_system=None, width=160))
    step = {"stage": "quantize", "status": "run", "disk_bytes": 0, "memory_bytes": 0, "seconds_last_time": None}
    counts = {"never made": 14, "dense changed": 0, "tuned changed": None}
    terminal.show_plan([{**step, "makes": "x", "why": why, "copied_modules": n} for why, n in counts.items()])
    assert "never made; copies 14 modules" in out.getvalue()
    assert out.getvalue().count("copies") == 1


def test_a_head_is_shown_with_its_own_figures(printed):
    rows, text = printed(HEAD)
    assert rows[0]["accuracy_drop"] == pytest.approx(0.05)
    assert not {"perplexity", "perplexity_increase", "root_mean_squared_error"} & rows[0].keys()
    assert all(said in text for said in ("accuracy", "85.0%", "5.0%", "F1", "0.800", "KL", "0.0200", "top-1", "90.0%"))
    assert "perplexity" not in text


def test_a_language_model_is_shown_with_its_perplexity(printed):
    _, text = printed(Scores(variant="nf4", reference="dense", tokens=9, perplexity=10.3, reference_perplexity=10.0))
    assert "10.30" in text
    assert "+3.0%" in text
    assert "accuracy" not in text


def test_a_model_that_was_not_judged_leaves_its_places_empty(printed):
    rows, _ = printed(None, HEAD)
    assert rows[0]["accuracy"] is None
    assert rows[1]["accuracy"] == 0.85
    assert rows[0].keys() == rows[1].keys()
    rows, text = printed(None)
    assert not set(terminal.FIGURE_COLUMNS) & rows[0].keys()
    assert "accuracy" not in text


def test_a_figure_that_is_not_finite_is_a_word_since_json_has_no_infinity(printed):
    rows, text = printed(Scores(variant="nf4", rows=9, root_mean_squared_error=math.inf))
    assert rows[0]["root_mean_squared_error"] == "inf"
    assert "inf" in text


def test_every_figure_has_a_column():
    assert tuple(terminal.FIGURE_COLUMNS) == tables.FIGURES
