"""Figures of a model beside its reference, and the bounds they must keep. Pure; no model is touched here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import StoreCorrupt
from pipeline.sections import Bounds, Gates

REPORT = "report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What was measured of `variant` beside `reference` on `tokens` predicted tokens.

    `kl_divergence` is the mean KL(reference || variant) in nats per token; `top1_agreement` a share of 1.
    """

    variant: str
    reference: str | None
    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None

    @property
    def perplexity_increase(self) -> float | None:
        """Perplexity / reference perplexity - 1."""
        return self.perplexity / self.reference_perplexity - 1 if self.reference_perplexity else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a model keeps its bounds; `misses` says which figure missed which bound."""

    variant: str
    misses: tuple[str, ...]
    judged: bool

    @property
    def passed(self) -> bool:
        """True unless a bound was missed."""
        return not self.misses


def judge(scores: Scores, bounds: Bounds) -> Verdict:
    """Hold figures against bounds. A figure that is not finite misses, bound or no bound."""
    figures = {
        "perplexity_increase": (scores.perplexity_increase, bounds.perplexity_increase, "at most"),
        "kl_divergence": (scores.kl_divergence, bounds.kl_divergence, "at most"),
        "top1_agreement": (scores.top1_agreement, bounds.top1_agreement, "at least"),
    }
    misses = [] if math.isfinite(scores.perplexity) else [f"perplexity {scores.perplexity} is not finite"]
    for name, (value, bound, sense) in figures.items():
        if value is not None and not math.isfinite(value):
            misses.append(f"{name} {value} is not finite")
        elif bound is not None and value is None:
            misses.append(f"{name} was not measured, bound {sense} {bound:g}")
        elif bound is not None and value is not None and not (value <= bound if sense == "at most" else value >= bound):
            misses.append(f"{name} {value:.4g}, bound {sense} {bound:g}")
    judged = any(bound is not None for _, bound, _ in figures.values())
    return Verdict(variant=scores.variant, misses=tuple(misses), judged=judged)


def judge_all(report: Mapping[str, Scores], gates: Gates) -> dict[str, Verdict]:
    """Every model's verdict. A tuned model that misses its bounds takes its variants with it."""
    verdicts = {"dense": judge(report["dense"], Bounds())} if "dense" in report else {}
    tuned = judge(report["tuned"], gates.tuned) if "tuned" in report else None
    if tuned:
        verdicts["tuned"] = tuned
    for variant, scores in report.items():
        if variant not in verdicts:
            verdict = judge(scores, gates)
            inherited = tuple(f"tuned: {miss}" for miss in tuned.misses) if tuned else ()
            verdicts[variant] = Verdict(
                variant=variant,
                misses=(*verdict.misses, *inherited),
                judged=verdict.judged or bool(tuned and tuned.judged),
            )
    return verdicts


def write_report(folder: Path, scores: list[Scores]) -> None:
    """Write the figures of an evaluation."""
    text = json.dumps({"scores": [asdict(score) for score in scores]}, indent=1)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")


def read_report(folder: Path) -> dict[str, Scores]:
    """The figures of a committed evaluation, by variant."""
    try:
        rows = json.loads((folder / REPORT).read_text(encoding="utf-8"))["scores"]
        return {row["variant"]: Scores(**row) for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StoreCorrupt(
            f"{folder / REPORT}: cannot be read ({error!r}); remove the version and run again"
        ) from error
