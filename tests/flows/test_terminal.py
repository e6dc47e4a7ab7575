"""What a person sees: a bar for each thing that is counted, a line now and then where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flows import figures, terminal
from pipeline import progress
from tests.flows.test_remaining import Clock


@pytest.fixture
def shown(monkeypatch):
    def run(*, is_terminal: bool) -> str:
        out = io.StringIO()
        console = Console(file=out, force_terminal=is_terminal, color_system=None, width=140)
        monkeypatch.setattr(terminal, "ERR", console)
        with terminal.showing_progress():
            progress.step("quantize", done=6, total=6, unit="gptq-4bit layers")
            progress.metric("quantize", "loss", 0.5)
            progress.step("quantize", done=1, total=6, unit="awq-4bit layers")
            progress.message("quantize", "committed bot/gptq-4bit@v0001")
        return out.getvalue()

    return run


def test_each_target_of_a_stage_has_a_bar_of_its_own_with_its_unit_and_figure(shown):
    text = shown(is_terminal=True)
    assert "6/6 gptq-4bit layers" in text
    assert "1/6 awq-4bit layers" in text
    assert "loss 0.5" in text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_and_a_line_say_what_is_left_once_two_layers_are_done(monkeypatch, is_terminal):
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=is_terminal, color_system=None, width=140)
    monkeypatch.setattr(terminal, "ERR", console)
    with terminal.showing_progress(clock):
        progress.step("quantize", done=7, total=12, unit="awq-4bit layers")  # a run that goes on at its seventh layer
        first = out.getvalue()
        clock.now += 60
        progress.step("quantize", done=8, total=12, unit="awq-4bit layers")
    assert " left" not in first
    assert "8/12 awq-4bit layers" in out.getvalue()
    assert "4 min left" in out.getvalue()


def test_without_a_terminal_there_are_plain_lines(shown):
    assert shown(is_terminal=False).splitlines() == [
        "quantize: 6/6 gptq-4bit layers",
        "quantize: 1/6 awq-4bit layers, loss 0.5",
        "quantize: committed bot/gptq-4bit@v0001",
    ]


@pytest.mark.parametrize(
    ("nbytes", "text"), [(999, "999 B"), (1500, "2 kB"), (13_600_000, "13.6 MB"), (2.5e12, "2500.0 GB")]
)
def test_bytes_are_shown_in_the_unit_that_keeps_them_short(nbytes, text):
    assert figures.size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "not measured yet"), (58.2, "58 s"), (600.0, "10 min"), (16_200.0, "4.5 h")]
)
def test_seconds_are_shown_as_a_person_says_them(seconds, text):
    assert figures.duration(seconds) == text


FIGURES = {
    "peak_bytes": 3e9, "resident_bytes": 2e9, "tokens_per_second": 12345.6, "gradient_norm": 1.5, "oddness": 0.25,
    "learning_rate": 2e-4, "loss": 2.345678,
}  # fmt: skip


def test_a_trainings_figures_stand_in_one_order_with_their_units_however_they_come():
    assert figures.line(FIGURES, short=True) == (
        "loss 2.346, lr 2.00e-04, 12,346 tokens/s, memory 2.0 GB, oddness 0.25"
    )
    assert figures.line(FIGURES, short=False) == (
        "loss 2.346, lr 2.00e-04, gradient 1.5, 12,346 tokens/s, memory 2.0 GB, peak 3.0 GB, oddness 0.25"
    )


def test_the_bar_keeps_every_figure_beside_it(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(terminal, "ERR", Console(file=out, force_terminal=True, color_system=None, width=200))
    with terminal.showing_progress():
        progress.step("train", done=10, total=100, unit="steps")
        for name, value in FIGURES.items():
            progress.metric("train", name, value)
    assert "loss 2.346, lr 2.00e-04, 12,346 tokens/s, memory 2.0 GB" in out.getvalue()
