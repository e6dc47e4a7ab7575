"""The graph of steps: what will run, what is reused and why, and what it will need.

A fingerprint is known before anything runs, so a step whose outputs are in the store is reused, and a step whose
outputs nobody needs any more is not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline import donors
from pipeline.artifacts import Artifact, Store
from pipeline.bit_budget import affordable
from pipeline.catalog import Format, format_of
from pipeline.checkpoint import Checkpoint
from pipeline.digests import DigestCache
from pipeline.graph import Graph
from pipeline.kept import Donor, keep, writable
from pipeline.manifest import Manifest
from pipeline.model_task import own_labels
from pipeline.preflight import check, open_model
from pipeline.recipe import Recipe
from pipeline.sizes import Sizes, dense_sizes
from pipeline.steps import Planned, Step

# A packed input of a quantize step → what it was dequantized to, by which its modules are known again.
DEQUANTIZED = {"source": "upcast", "base": "dequantized"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A recipe, checked, as steps in order."""

    recipe: Recipe
    source: Checkpoint
    source_digest: str
    format: Format
    sizes: Sizes
    store: Store
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step | None:
        """The step of that name, where the recipe has one."""
        return next((step for step in self.steps if step.name == name), None)

    def artifact(self, output: Planned) -> Artifact | None:
        """What the store holds of an output: known since planning, or made since."""
        return output.artifact or self.store.find(self.recipe.name, output.variant, output.origin.fingerprint)

    def made(self, variant: str) -> Artifact | None:
        """What the store holds of a variant that one of the steps makes."""
        outputs = [output for step in self.steps for output in step.outputs if output.variant == variant]
        return self.artifact(outputs[0]) if outputs else None

    def donors(self, step: Step, output: Planned) -> tuple[Donor, ...]:
        """Where the packed bytes of a quantize step's output may come from."""
        target = next(target for target in step.targets if target.variant == output.variant)
        own = [
            donors.of_source(target, name, source, upcast)
            for name, source, upcast in self._dequantized(step)
            if name in {step.inputs[role] for role in output.origin.parents}
        ]
        others = () if self.recipe.calibration.refresh else donors.earlier(self.store, target, output.origin)
        return (*(donor for donor in own if donor), *others)

    def _dequantized(self, step: Step) -> Iterator[tuple[str, Checkpoint, Manifest]]:
        """The packed checkpoints that a step stands on: name, checkpoint, the manifest of what it was upcast to."""
        for role, dense in DEQUANTIZED.items():
            upcast = self.made(step.inputs[dense]) if role in step.inputs else None
            if upcast is None:
                continue
            base = self.made(step.inputs[role])
            if role == "source" or base:
                yield step.inputs[role], Checkpoint.open(base.path) if base else self.source, upcast.manifest

    def copies(self, step: Step, output: Planned) -> int | None:
        """How many modules a quantize step's output would copy; None where that is not known before its parent is."""
        parent = self.made(step.inputs["dense"]) if step.targets and output.pending else None
        if parent is None:
            return None
        found = self.donors(step, output)
        if not found:
            return 0
        target = next(target for target in step.targets if target.variant == output.variant)
        shapes = {name: info.shape for name, info in Checkpoint.open(parent.path).tensors.items()}
        kept = writable(target, keep(target, shapes, parent.manifest.tensors, found))
        return len(affordable(target, kept, shapes).modules)

    @property
    def runs(self) -> bool:
        """Whether any step must run."""
        return any(step.pending for step in self.steps)


def make_plan(recipe: Recipe, *, until: str = "evaluate") -> Plan:
    """Check a recipe against its source, its data, the store and the installed libraries, and lay out its steps.

    `until` is the last stage to plan. Raises an InputError for the first thing that cannot work.
    """
    store = Store.open(recipe.store)
    source = open_model(recipe.source, store)
    row = format_of(source.quantization)
    sizes = dense_sizes(source, row)
    kind = check(recipe, source, sizes)
    cache = DigestCache()
    digest = cache.files(source.folder, source.files)
    graph = Graph(
        recipe, store, sizes, source, digest, cache,
        kind=kind, classifier=bool(kind and own_labels(source.config, kind)),
    )  # fmt: skip
    steps = list(graph.steps(until))
    cache.save()
    return Plan(
        recipe=recipe, source=source, source_digest=digest, format=row, sizes=sizes, store=store, steps=_demanded(steps)
    )


def _demanded(steps: list[Step]) -> tuple[Step, ...]:
    """Mark as not needed what only finished steps stand on: the results are there, their ingredients may be gone."""
    made_from = {output.variant for step in steps for output in step.outputs}
    consumed = {name for step in steps if step.stage != "evaluate" for name in step.inputs.values()}
    wanted = made_from - consumed
    marked: list[Step] = []
    for step in reversed(steps):
        outputs = tuple(
            output
            if output.artifact or output.variant in wanted
            else replace(output, needed=False, reason="not needed: what follows is in the store")
            for output in step.outputs
        )
        # Of a step's inputs, those that the outputs to be made stand on.
        wanted |= {step.inputs[role] for output in outputs if output.pending for role in output.origin.parents}
        marked.append(replace(step, outputs=outputs))
    return tuple(reversed(marked))
