"""The graph of steps: what will run, what is reused and why, and what it will need.

A fingerprint is known before anything runs, so a step whose outputs are in the store is reused, and a step whose
outputs nobody needs any more is not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.artifacts import Artifact, Store
from pipeline.catalog import Format, format_of
from pipeline.checkpoint import Checkpoint
from pipeline.data_sources import localised, located
from pipeline.digests import DigestCache
from pipeline.manifest import Origin
from pipeline.preflight import check, open_model
from pipeline.recipe import Recipe
from pipeline.sections import Data
from pipeline.sizes import Sizes, dense_sizes
from pipeline.targets import Target

# Raised when the same options give other bytes.
STAGE_VERSIONS = {"upcast": 2, "train": 1, "merge": 1, "quantize": 1, "evaluate": 1}
RUNTIME_BYTES = 600 * 10**6  # a process with torch and transformers imported


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One output of a step: the artifact that has its fingerprint, or why there is none."""

    variant: str
    origin: Origin
    artifact: Artifact | None
    needed: bool
    reason: str

    @property
    def pending(self) -> bool:
        """Whether the step must run for it."""
        return self.needed and self.artifact is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a step will need: bytes of disk and of memory (activations aside), and the seconds it took last time."""

    disk: int
    memory: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A stage with its inputs. `inputs` maps a role to `source` or to a variant that an earlier step makes."""

    stage: str
    inputs: Mapping[str, str]
    outputs: tuple[Planned, ...]
    needs: Needs
    data: Mapping[str, Data] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()

    @property
    def pending(self) -> tuple[Planned, ...]:
        """The outputs that are still to be made."""
        return tuple(output for output in self.outputs if output.pending)


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

    def step(self, stage: str) -> Step | None:
        """The step of a stage, where the recipe has one."""
        return next((step for step in self.steps if step.stage == stage), None)

    def artifact(self, output: Planned) -> Artifact | None:
        """What the store holds of an output: known since planning, or made since."""
        return output.artifact or self.store.find(self.recipe.name, output.variant, output.origin.fingerprint)

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
    check(recipe, source, sizes)
    cache = DigestCache()
    digest = cache.files(source.folder, source.files)
    steps = list(_Builder(recipe, store, sizes, digest, cache).steps(until))
    cache.save()
    return Plan(
        recipe=recipe, source=source, source_digest=digest, format=row, sizes=sizes, store=store, steps=_demanded(steps)
    )


class _Builder:
    """Lays out steps; each knows the origins of those before it."""

    def __init__(self, recipe: Recipe, store: Store, sizes: Sizes, source_digest: str, cache: DigestCache) -> None:
        self._recipe, self._store, self._sizes, self._cache = recipe, store, sizes, cache
        self._fingerprints = {"source": source_digest}
        self._places: dict[tuple[str, str], str] = {}

    def steps(self, until: str) -> Iterator[Step]:
        recipe = self._recipe
        yield self._upcast()
        dense = "dense"
        if recipe.train.method != "none":
            yield self._train()
            if recipe.train.method == "lora" and until != "train":
                yield self._merge()
            dense = "tuned"
        if until == "train":
            return
        if recipe.quantize:
            yield self._quantize(dense)
        if recipe.evaluate:
            yield self._evaluate(dense)

    def _upcast(self) -> Step:
        dtype = self._recipe.upcast.dtype
        disk = self._sizes.dense_bytes(dtype)
        memory = RUNTIME_BYTES + 4 * 2 * self._sizes.largest + 300 * 10**6
        options = {"dtype": dtype, "max_shard_bytes": self._recipe.upcast.max_shard_bytes}
        return self._step("upcast", {"source": "source"}, ["dense"], options, Needs(disk=disk, memory=memory))

    def _train(self) -> Step:
        train = self._recipe.train
        assert train.data is not None
        options = {
            "method": train.method, "sequence_length": train.sequence_length, "arguments": train.arguments,
            "seed": self._recipe.seed, **({"lora": train.lora} if train.method == "lora" else {}),
        }  # fmt: skip
        weights = 4 * self._sizes.parameters  # float32 on a CPU; half of it on a GPU
        if train.method == "lora":
            adapter = self._sizes.adapter_bytes(int(train.lora.get("r", 8)))
            # Two checkpoints (weights and two moments) and the result; weights, gradients and two moments in memory.
            needs = Needs(disk=7 * adapter, memory=RUNTIME_BYTES + weights + 4 * adapter)
        else:
            dense = self._sizes.dense_bytes(self._recipe.upcast.dtype)
            needs = Needs(disk=6 * weights + dense, memory=RUNTIME_BYTES + 4 * weights)
        variant = "adapter" if train.method == "lora" else "tuned"
        return self._step("train", {"base": "dense"}, [variant], options, needs, {"train": train.data})

    def _merge(self) -> Step:
        disk = self._sizes.dense_bytes(self._recipe.upcast.dtype)
        needs = Needs(disk=disk, memory=RUNTIME_BYTES + 4 * self._sizes.parameters)
        return self._step("merge", {"base": "dense", "adapter": "adapter"}, ["tuned"], {}, needs)

    def _quantize(self, dense: str) -> Step:
        recipe, dtype = self._recipe, self._recipe.upcast.dtype
        shared = {
            "seed": recipe.seed,
            "calibration": recipe.calibration.model_dump(include={"samples", "sequence_length"}),
        }
        data = {"calibration": self._here(recipe.calibration_data)} if recipe.calibrated else {}
        outputs = []
        for target in recipe.quantize:
            calibrated = target.format in recipe.CALIBRATED
            options = {"target": target.model_dump(exclude={"name"}), **(shared if calibrated else {})}
            outputs.append(
                self._planned("quantize", {"dense": dense}, target.variant, options, data if calibrated else {})
            )
        # The tool writes its own folder first, from which the artifact is made.
        disk = 2 * sum(self._sizes.quantized_bytes(target, dtype) for target in recipe.quantize)
        memory = RUNTIME_BYTES + 2 * self._sizes.dense_bytes(dtype)
        return Step(
            stage="quantize", inputs={"dense": dense}, outputs=tuple(outputs), data=data, options=shared,
            targets=recipe.quantize, needs=Needs(disk=disk, memory=memory, seconds=self._seconds(outputs)),
        )  # fmt: skip

    def _evaluate(self, dense: str) -> Step:
        evaluate, data = self._recipe.evaluate, self._recipe.evaluation_data
        assert evaluate is not None
        assert data is not None
        references = {dense: "dense"} if dense == "tuned" else {}
        references |= {target.variant: dense for target in self._recipe.quantize}
        inputs = {variant: variant for variant in ("dense", *references)}
        options = {"sequence_length": evaluate.sequence_length, "references": references}
        needs = Needs(disk=10**5, memory=RUNTIME_BYTES + 2 * 4 * self._sizes.parameters)
        return self._step("evaluate", inputs, ["evaluation"], options, needs, {"evaluation": data})

    def _step(
        self,
        stage: str,
        inputs: Mapping[str, str],
        variants: list[str],
        options: Mapping[str, Any],
        needs: Needs,
        data: Mapping[str, Data] | None = None,
    ) -> Step:
        here = {role: self._here(rows) for role, rows in (data or {}).items()}
        outputs = [self._planned(stage, inputs, variant, options, here) for variant in variants]
        timed = Needs(disk=needs.disk, memory=needs.memory, seconds=self._seconds(outputs))
        return Step(stage=stage, inputs=inputs, outputs=tuple(outputs), data=here, options=options, needs=timed)

    def _here(self, data: Data) -> Data:
        """The rows by a path on this machine, asked for once: what is digested now is what the stages will read."""
        key = (data.path, data.split)
        if key not in self._places:
            self._places[key] = localised(data).path
        return data.model_copy(update={"path": self._places[key]})

    def _planned(
        self, stage: str, inputs: Mapping[str, str], variant: str, options: Mapping[str, Any], data: Mapping[str, Data]
    ) -> Planned:
        kinds = {f"{role}_rows": rows.identity for role, rows in data.items()}
        origin = Origin(
            stage=stage,
            stage_version=STAGE_VERSIONS[stage],
            options={**options, **kinds},
            parents={role: self._fingerprints[name] for role, name in inputs.items()},
            data={role: self._cache.sequence(located(rows)) for role, rows in data.items()},
        )
        self._fingerprints[variant] = origin.fingerprint
        artifact = self._store.find(self._recipe.name, variant, origin.fingerprint)
        reason = f"in the store as {artifact.version}" if artifact else self._why(variant, origin)
        return Planned(variant=variant, origin=origin, artifact=artifact, needed=True, reason=reason)

    def _why(self, variant: str, origin: Origin) -> str:
        """What differs from the newest version of the variant."""
        versions = self._store.versions(self._recipe.name, variant)
        if not versions:
            return "never made"
        last = self._store.resolve(f"{self._recipe.name}/{variant}").manifest
        if last.stage_version != origin.stage_version or last.stage != origin.stage:
            made_by = f"{last.stage} {last.stage_version}"
            return f"{origin.stage} is at version {origin.stage_version}, {versions[-1].name} was made by {made_by}"
        changed = list(_differences(last.options, origin.options, ""))
        changed += [f"{role} data changed" for role, digest in origin.data.items() if last.data.get(role) != digest]
        changed += [
            f"{role} changed"
            for role, fingerprint in origin.parents.items()
            if last.parents.get(role, {}).get("fingerprint") != fingerprint
        ]
        return "; ".join(changed) or "other than the newest version"

    def _seconds(self, outputs: list[Planned]) -> float | None:
        """What the outputs took when they were last made, where every one of them was."""
        taken = []
        for output in outputs:
            if not self._store.versions(self._recipe.name, output.variant):
                return None
            last = self._store.resolve(f"{self._recipe.name}/{output.variant}").manifest
            taken.append(float(last.metrics.get("seconds", 0.0)))
        return sum(taken)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {before} → {after}"


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
        if any(output.pending for output in outputs):
            wanted |= set(step.inputs.values())
        marked.append(replace(step, outputs=outputs))
    return tuple(reversed(marked))
