"""Plans and results as rows of plain values: what --json prints, Prefect shows as a table, and the terminal draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipeline.gates import FIGURES, Scores
from pipeline.outcome import Row
from pipeline.plan import Plan


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """A row for each output of the plan."""
    rows: list[dict[str, Any]] = []
    for step in plan.steps:
        for output in step.outputs:
            status = "reused" if output.artifact else "run" if output.pending else "not needed"
            rows.append(
                {
                    "stage": step.stage,
                    "makes": output.variant,
                    "status": status,
                    "why": output.reason,
                    "copied_modules": plan.copies(step, output),
                    "disk_bytes": step.needs.disk if output.pending else 0,
                    "memory_bytes": step.needs.memory if output.pending else 0,
                    "seconds_last_time": step.needs.seconds,
                    "fingerprint": output.origin.fingerprint,
                }
            )
    return rows


def result_rows(plan: Plan, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each model: what it is, what was measured, how it was judged, where it lies.

    Each row has the figures that any of them has.
    """
    shown = []
    measured = figure_columns([row.scores for row in rows if row.scores])
    for row in rows:
        manifest, scores = row.artifact.manifest, row.scores
        shown.append(
            {
                "variant": row.variant,
                "version": row.artifact.version,
                "bytes": manifest.nbytes,
                "bits_per_weight": round(row.bits_per_weight, 2),
                "reference": scores.reference if scores else None,
                **figures(scores, measured),
                "gate": row.gate,
                "misses": list(row.verdict.misses) if row.verdict else [],
                "aliases": [
                    alias
                    for alias, version in plan.store.aliases(manifest.name, row.variant).items()
                    if version == row.artifact.version
                ],
                "path": str(row.artifact.path),
            }
        )
    return shown


def figure_columns(scores: Sequence[Scores]) -> tuple[str, ...]:
    """The figures that were measured of one of the models at least, in the order in which they are shown."""
    measured = {name for score in scores for name in score.figures}
    return tuple(name for name in FIGURES if name in measured)


def figures(scores: Scores | None, names: Sequence[str]) -> dict[str, float | str | None]:
    """Those figures of a model, as JSON has them; None where one was not measured."""
    found = scores.figures if scores else {}
    return {name: _finite(found.get(name)) for name in names}


def _finite(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else str(value)
