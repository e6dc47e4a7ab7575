"""Plans and results as rows of plain values: what --json prints, Prefect shows as a table, and the terminal draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
                    "disk_bytes": step.needs.disk if output.pending else 0,
                    "memory_bytes": step.needs.memory if output.pending else 0,
                    "seconds_last_time": step.needs.seconds,
                    "fingerprint": output.origin.fingerprint,
                }
            )
    return rows


def result_rows(plan: Plan, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for each model: what it is, what was measured, how it was judged, where it lies."""
    shown = []
    for row in rows:
        manifest, scores = row.artifact.manifest, row.scores
        shown.append(
            {
                "variant": row.variant,
                "version": row.artifact.version,
                "bytes": manifest.nbytes,
                "bits_per_weight": round(row.bits_per_weight, 2),
                "perplexity": _finite(scores.perplexity if scores else None),
                "perplexity_increase": _finite(scores.perplexity_increase if scores else None),
                "reference": scores.reference if scores else None,
                "kl_divergence": _finite(scores.kl_divergence if scores else None),
                "top1_agreement": _finite(scores.top1_agreement if scores else None),
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


def _finite(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else str(value)
