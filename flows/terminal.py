"""What a person sees: bars while a stage works, tables at the end. Progress goes to standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from flows.figures import duration, line, size
from flows.remaining import Clock, Remaining
from pipeline import progress

ERR = Console(stderr=True, highlight=False)
OUT = Console(highlight=False)
LINE_SECONDS = 10.0  # without a terminal a bar becomes a line now and then


@contextmanager
def showing_progress(clock: Clock = time.monotonic) -> Iterator[None]:
    """Show the engine's events on standard error: bars on a terminal, lines elsewhere."""
    remaining = Remaining(clock)
    if ERR.is_terminal:
        columns = (
            TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(), _Left(remaining), TextColumn("{task.fields[figure]}"),
        )  # fmt: skip
        with Progress(*columns, console=ERR) as bars, progress.shown_by(_Bars(bars, remaining)):
            yield
    else:
        with progress.shown_by(_Lines(remaining, clock)):
            yield


class _Left(ProgressColumn):
    """The time that is left; rich's own forgets what is older than thirty seconds, which many a layer takes."""

    max_refresh = 0.5  # seconds

    def __init__(self, remaining: Remaining) -> None:
        super().__init__()
        self._remaining = remaining

    def render(self, task: Task) -> Text:
        """For a bar."""
        return Text(self._remaining.said(task.description, task.fields["unit"]))


class _Bars:
    def __init__(self, bars: Progress, remaining: Remaining) -> None:
        self._bars, self._remaining = bars, remaining
        self._ids: dict[tuple[str, str], TaskID] = {}  # by stage and unit: a quantize stage counts each target's layers
        self._latest: dict[str, TaskID] = {}
        self._figures: dict[TaskID, dict[str, float]] = {}

    def __call__(self, event: progress.Event) -> None:
        match event:
            case progress.Message(stage=stage, text=text):
                self._bars.console.print(f"{stage}: {text}", markup=False)
            case progress.Step(stage=stage, done=done, total=total, unit=unit):
                self._remaining.saw(event)
                if (stage, unit) not in self._ids:
                    self._ids[stage, unit] = self._bars.add_task(stage, total=total, unit=unit, figure="")
                self._latest[stage] = self._ids[stage, unit]
                self._bars.update(self._latest[stage], completed=done, total=total)
            case progress.Metric(stage=stage, name=name, value=value):
                if stage in self._latest:
                    bar = self._latest[stage]
                    figures = self._figures.setdefault(bar, {})
                    figures[name] = value
                    self._bars.update(bar, figure=line(figures, short=True))


class _Lines:
    def __init__(self, remaining: Remaining, clock: Clock) -> None:
        self._remaining, self._clock = remaining, clock
        self._said: dict[tuple[str, str], float] = {}
        self._figures: dict[str, dict[str, float]] = {}

    def __call__(self, event: progress.Event) -> None:
        match event:
            case progress.Message(stage=stage, text=text):
                ERR.print(f"{stage}: {text}", markup=False)
            case progress.Step(stage=stage, done=done, total=total, unit=unit):
                self._remaining.saw(event)
                now = self._clock()
                if done >= total or now - self._said.get((stage, unit), now - LINE_SECONDS) >= LINE_SECONDS:
                    self._said[stage, unit] = now
                    figures = line(self._figures.pop(stage, {}), short=True)
                    said = (f"{stage}: {done}/{total} {unit}", self._remaining.said(stage, unit), figures)
                    ERR.print(", ".join(filter(None, said)), markup=False)
            case progress.Metric(stage=stage, name=name, value=value):
                self._figures.setdefault(stage, {})[name] = value


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """A table on standard output; its columns are the first row's keys."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for key in rows[0] if rows else ():
        numeric = all(row[key][:1].isdigit() or row[key][:1] in "-+" for row in rows if row[key])
        table.add_column(key, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console = OUT if OUT.is_terminal else Console(width=140, highlight=False)
    console.print(table)


def show_plan(rows: Sequence[Mapping[str, Any]]) -> None:
    """The plan as a table."""
    shown = [
        {
            "stage": row["stage"],
            "makes": row["makes"],
            "status": row["status"],
            "why": f"{row['why']}; copies {row['copied_modules']} modules" if row["copied_modules"] else row["why"],
            "disk": size(row["disk_bytes"]) if row["status"] == "run" else "",
            "memory": size(row["memory_bytes"]) if row["status"] == "run" else "",
            "last time": duration(row["seconds_last_time"]) if row["status"] == "run" else "",
        }
        for row in rows
    ]
    print_table("plan", shown)


# Figure → the head of its column and how it is written.
FIGURE_COLUMNS = {
    "perplexity": ("perplexity", ".2f"), "perplexity_increase": ("change", "+.1%"), "accuracy": ("accuracy", ".1%"),
    "accuracy_drop": ("drop", ".1%"), "f1": ("F1", ".3f"), "root_mean_squared_error": ("error", ".4g"),
    "error_increase": ("error change", "+.1%"), "kl_divergence": ("KL", ".4f"), "top1_agreement": ("top-1", ".1%"),
}  # fmt: skip


def figure(name: str, value: float | str | None) -> str:
    """A figure as a person reads it: nothing where there is none, a word where it is not finite."""
    return "" if value is None else value if isinstance(value, str) else format(value, FIGURE_COLUMNS[name][1])


def show_results(rows: Sequence[Mapping[str, Any]]) -> None:
    """The models as a table, with the figures that were measured, and where they lie."""
    shown = [
        {
            "variant": row["variant"],
            "version": row["version"],
            "size": size(row["bytes"]),
            "bits/weight": f"{row['bits_per_weight']:.2f}",
            "against": row["reference"] or "",
            **{head: figure(name, row[name]) for name, (head, _) in FIGURE_COLUMNS.items() if name in row},
            "gate": row["gate"],
            "alias": ", ".join(row["aliases"]),
        }
        for row in rows
    ]
    print_table("models", shown)
    for row in rows:
        OUT.print(f"{row['variant']:<12} {row['path']}", markup=False, soft_wrap=True)
