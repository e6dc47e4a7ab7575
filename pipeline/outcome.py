"""What a finished plan shows: a row for each model, and where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.artifacts import Artifact
from pipeline.errors import GateRefused
from pipeline.gates import Scores, Verdict, judge_all, read_report
from pipeline.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A model of the plan: `bits_per_weight` counts every byte of its shards against the dense weights' number."""

    variant: str
    artifact: Artifact
    bits_per_weight: float
    scores: Scores | None
    verdict: Verdict | None

    @property
    def gate(self) -> str:
        """The verdict in a word: passed, refused, or - where no bound was set."""
        if self.verdict is None or (self.verdict.passed and not self.verdict.judged):
            return "-"
        return "passed" if self.verdict.passed else "refused"


def made(plan: Plan) -> dict[str, Artifact]:
    """Every output of the plan that the store holds, by variant."""
    found: dict[str, Artifact] = {}
    for output in (output for step in plan.steps for output in step.outputs):
        artifact = plan.artifact(output)
        if artifact:
            found[output.variant] = artifact
    return found


def rows(plan: Plan) -> list[Row]:
    """The models of a plan that has run, in its order; adapters and reports are no models."""
    artifacts = made(plan)
    report = read_report(artifacts["evaluation"].path) if "evaluation" in artifacts else {}
    verdicts = judge_all(report, plan.recipe.evaluate.gates) if plan.recipe.evaluate else {}
    return [
        Row(
            variant=variant,
            artifact=artifact,
            bits_per_weight=_shard_bytes(artifact) * 8 / plan.sizes.parameters,
            scores=report.get(variant),
            verdict=verdicts.get(variant),
        )
        for variant, artifact in artifacts.items()
        if "config.json" in artifact.manifest.files
    ]


def promotable(plan: Plan, found: list[Row]) -> list[Row]:
    """The rows that promotion is about: the quantized variants, or where there are none the tuned or dense model."""
    quantized = {target.variant for target in plan.recipe.quantize}
    return [row for row in found if row.variant in quantized] or found[-1:]


def unmoved(plan: Plan, found: list[Row]) -> list[Row]:
    """The passing rows whose alias points elsewhere yet."""
    if plan.recipe.promote is None:
        return []
    alias = plan.recipe.promote.alias
    candidates = [row for row in promotable(plan, found) if row.verdict and row.verdict.passed]
    return [
        row
        for row in candidates
        if plan.store.aliases(plan.recipe.name, row.variant).get(alias) != row.artifact.version
    ]


def promote(plan: Plan, found: list[Row]) -> Mapping[str, str]:
    """Move the alias of each passing variant; raise GateRefused, after that, where one was refused.

    Returns alias references → versions that moved now. A refused variant's artifact and alias stay as they are.
    """
    moved: dict[str, str] = {}
    for row in unmoved(plan, found):
        assert plan.recipe.promote is not None
        plan.store.set_alias(row.artifact, plan.recipe.promote.alias)
        moved[f"{plan.recipe.name}/{row.variant}@{plan.recipe.promote.alias}"] = row.artifact.version
    refused = [row for row in found if row.verdict and not row.verdict.passed]
    if refused:
        said = "; ".join(
            f"{row.artifact.reference}: {', '.join(row.verdict.misses)}" for row in refused if row.verdict is not None
        )
        raise GateRefused(f"refused by its gate: {said}; the artifacts stay, their aliases stay where they were")
    return moved


def _shard_bytes(artifact: Artifact) -> int:
    files = artifact.manifest.files
    return sum(int(file["bytes"]) for name, file in files.items() if name.endswith(".safetensors"))
