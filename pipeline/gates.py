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
# What is shown of a model, in this order; each that Bounds has is judged.
FIGURES = (
    "perplexity", "perplexity_increase", "accuracy", "accuracy_drop", "f1", "root_mean_squared_error",
    "error_increase", "kl_divergence", "top1_agreement",
)  # fmt: skip
AT_LEAST = frozenset({"accuracy", "f1", "top1_agreement"})  # of the others, a bound is the most
_ROUNDING = 1e-9  # 0.9 - 0.85 is more than 0.05 in float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What was measured of `variant` beside `reference`: what says nothing of a model of its kind is None.

    A language model is judged on `tokens` predicted tokens, a tagger on as many tagged ones, any other head or
    projector on `rows`. `kl_divergence` is the mean KL(reference || variant) in nats per token or row;
    `top1_agreement` and accuracies are shares of 1; errors are in the labels' own unit.
    """

    variant: str
    reference: str | None = None
    tokens: int | None = None
    rows: int | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    accuracy: float | None = None
    reference_accuracy: float | None = None
    f1: float | None = None
    reference_f1: float | None = None
    root_mean_squared_error: float | None = None
    reference_error: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None

    @property
    def perplexity_increase(self) -> float | None:
        """Perplexity / reference perplexity - 1."""
        return _increase(self.perplexity, self.reference_perplexity)

    @property
    def accuracy_drop(self) -> float | None:
        """Reference accuracy - accuracy."""
        if self.accuracy is None or self.reference_accuracy is None:
            return None
        return self.reference_accuracy - self.accuracy

    @property
    def error_increase(self) -> float | None:
        """Root mean squared error / the reference's - 1."""
        return _increase(self.root_mean_squared_error, self.reference_error)

    @property
    def figures(self) -> dict[str, float]:
        """The figures of FIGURES that were measured, in that order."""
        found = {name: getattr(self, name) for name in FIGURES}
        return {name: value for name, value in found.items() if value is not None}


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
    misses, judged = [], False
    for name in FIGURES:
        value, bound = getattr(scores, name), getattr(bounds, name, None)
        said = "at least" if name in AT_LEAST else "at most"
        judged = judged or bound is not None
        if value is not None and not math.isfinite(value):
            misses.append(f"{name} {value} is not finite")
        elif bound is not None and value is None:
            misses.append(f"{name} was not measured, bound {said} {bound:g}")
        elif bound is not None and not _keeps(value, bound, least=name in AT_LEAST):
            misses.append(f"{name} {value:.4g}, bound {said} {bound:g}")
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
    found = [{key: value for key, value in asdict(score).items() if value is not None} for score in scores]
    text = json.dumps({"scores": found}, indent=1)
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


def _increase(value: float | None, reference: float | None) -> float | None:
    """Value / reference - 1; of no error at all, any other is infinitely more."""
    if value is None or reference is None:
        return None
    if not reference:
        return math.inf if value else 0.0
    return value / reference - 1


def _keeps(value: float, bound: float, *, least: bool) -> bool:
    """Whether a finite figure keeps its bound, the bound itself included."""
    return value >= bound - _ROUNDING if least else value <= bound + _ROUNDING
