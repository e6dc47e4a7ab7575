"""A recipe's steps: which stages it takes, what each stands on, and why one runs or does not.

What training stands on is the recipe's `train.base`; what it makes is then folded into, or put beside, the weights that
the rest of the recipe goes on from. Nothing is planned that no result needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artifacts import Store
from pipeline.checkpoint import Checkpoint
from pipeline.data_sources import localised, located
from pipeline.digests import DigestCache
from pipeline.manifest import Origin
from pipeline.needs import RUNTIME_BYTES, quantizing_disk, quantizing_memory, training_needs
from pipeline.recipe import Recipe
from pipeline.sections import LABELLED, Data, Kind
from pipeline.sizes import Sizes
from pipeline.steps import Needs, Planned, Step
from pipeline.target_layout import matches, same_options
from pipeline.targets import BASE_TARGETS, Target

# Raised when the same options give other bytes.
STAGE_VERSIONS = {"upcast": 2, "train": 2, "merge": 2, "quantize": 2, "evaluate": 2}
# What an adapter that was trained on NF4 or int8 is merged into, by `merge_base`.
MERGED_INTO: Mapping[str, Mapping[str, str]] = {
    "dequantized": {"base": "dequantized"},
    "original": {"base": "dense"},
    "better": {"base": "dequantized", "original": "dense"},
}
GRID = {"format", "bits", "group_size", "symmetric"}  # what of a target quantization-aware training aims at
TRAINED = {"lora": "adapter", "head": "head", "projector": "projector", "full": "tuned", "qat": "tuned"}


class Graph:
    """Lays out steps; each knows the origins of those before it.

    `kind` is what the training rows are. `classifier` says whether the source has a trained head for such rows, so that
    it can be judged beside what becomes of it.
    """

    def __init__(
        self, recipe: Recipe, store: Store, sizes: Sizes, source: Checkpoint, source_digest: str, cache: DigestCache,
        *, kind: Kind | None, classifier: bool,
    ) -> None:  # fmt: skip
        self._recipe, self._store, self._sizes, self._cache = recipe, store, sizes, cache
        self._source, self._kind, self._classifier = source, kind, classifier
        self._places: dict[tuple[str, str], str] = {}
        self._fingerprints = {"source": source_digest}
        given = recipe.train.base
        self._base = "dense" if given == "source" and source.quantization is None else given

    def steps(self, until: str) -> Iterator[Step]:
        """Every step in order; `until` is the last stage."""
        recipe, method = self._recipe, self._recipe.train.method
        attached = method in {"head", "projector"}
        # What a head or projector is put beside: what the targets are made from, or else what it was trained on.
        carrier = "dense" if recipe.quantize or not attached else self._stand
        merges_into_dense = until != "train" and (not attached or carrier == "dense")
        if method == "none" or self._base != "source" or merges_into_dense:
            yield self._upcast()
        if method != "none":
            if self._base in BASE_TARGETS:
                yield self._quantized_base()
            yield self._train()
        if until == "train":
            return
        if attached:
            yield self._merge({"base": carrier, method: method})
        elif method == "lora":
            yield from self._merge_adapter()
        result = "dense" if method == "none" else "tuned"
        if recipe.quantize:
            yield self._quantize(result, recipe.quantize)
        if recipe.evaluate and until == "evaluate":
            yield self._evaluate(result)

    @property
    def _stand(self) -> str:
        """The variant that training stands on, or `source`."""
        return BASE_TARGETS[self._base].variant if self._base in BASE_TARGETS else self._base

    def _upcast(self) -> Step:
        return self._step("upcast", {"source": "source"}, "dense", self._upcast_options, self._upcast_needs)

    @property
    def _upcast_options(self) -> dict[str, Any]:
        upcast = self._recipe.upcast
        return {"dtype": upcast.dtype, "max_shard_bytes": upcast.max_shard_bytes}

    @property
    def _upcast_needs(self) -> Needs:
        disk = self._sizes.dense_bytes(self._recipe.upcast.dtype)
        return Needs(disk=disk, memory=RUNTIME_BYTES + 4 * 2 * self._sizes.largest + 300 * 10**6)

    def _quantized_base(self) -> Step:
        return self._quantize("dense", (BASE_TARGETS[self._base],), name="base")

    def _train(self) -> Step:
        train = self._recipe.train
        assert train.data is not None
        options: dict[str, Any] = {
            "method": train.method, "engine": train.resolved_engine, "sequence_length": train.sequence_length,
            "too_long": train.too_long, "arguments": train.arguments, "seed": self._recipe.seed,
        }  # fmt: skip
        options |= {"packing": True} if train.packing else {}
        options |= {"trainable": list(train.trainable)} if train.trainable else {}
        options |= {"lora": train.lora} if train.method == "lora" else {}
        options |= {"projector": train.projector.model_dump()} if train.method == "projector" else {}
        options |= {"grid": self._recipe.quantize[0].model_dump(include=GRID)} if train.method == "qat" else {}
        options |= {"launcher": self._launcher} if train.launcher.several else {}
        data = {"train": train.data.model_copy(update={"part": "train"})}
        if train.data.validation:
            data["validation"] = train.data.model_copy(update={"part": "validation"})
        needs = training_needs(self._recipe, self._sizes)
        return self._step("train", {"base": self._stand}, TRAINED[train.method], options, needs, data=data)

    @property
    def _launcher(self) -> dict[str, Any]:
        """What of the launcher changes the result: how many processes share a batch, and what its config says."""
        launcher = self._recipe.train.launcher
        config = self._cache.file(Path(launcher.config)) if launcher.config else None
        return {"processes": launcher.processes, "config": config}

    def _merge_adapter(self) -> Iterator[Step]:
        """Into the weights that it was trained on, those from before they were quantized, or the better of the two."""
        train = self._recipe.train
        if self._base not in BASE_TARGETS:
            yield self._merge({"base": "dense", "adapter": "adapter"})
            return
        inputs = MERGED_INTO[train.merge_base]
        if "dequantized" in inputs.values():
            yield self._step(
                "upcast", {"source": self._stand}, "dequantized", self._upcast_options, self._upcast_needs,
                name="dequantize",
            )  # fmt: skip
        yield self._merge({"adapter": "adapter", **inputs})

    def _merge(self, inputs: Mapping[str, str]) -> Step:
        train = self._recipe.train
        disk = self._sizes.dense_bytes(self._recipe.upcast.dtype)
        options: dict[str, Any] = {}
        data: dict[str, Data] = {}
        if "original" in inputs:  # the better is chosen
            assert train.data is not None
            disk *= 2
            options = {"sequence_length": train.sequence_length, "too_long": train.too_long}
            data = {"validation": train.data.model_copy(update={"part": "validation"})}
        needs = Needs(disk=disk, memory=RUNTIME_BYTES + 4 * self._sizes.parameters)
        return self._step("merge", inputs, "tuned", options, needs, data=data)

    def _quantize(self, dense: str, targets: tuple[Target, ...], *, name: str = "quantize") -> Step:
        recipe, dtype = self._recipe, self._recipe.upcast.dtype
        shared = {"seed": recipe.seed, "calibration": recipe.calibration.drawn}
        calibrated = {target.variant for target in targets if target.calibrated}
        rows = recipe.calibration.rows(recipe.train.data) if calibrated else {}
        data = {role: self._here(data) for role, data in rows.items()}
        inputs, outputs = {"dense": dense}, []
        for target in targets:
            known = target.variant in calibrated
            options = {"target": target.model_dump(exclude={"name"}), **(shared if known else {})}
            own = {"dense": dense, **self._packed(target, dense)}
            outputs.append(self._planned("quantize", own, target.variant, options, data if known else {}))
            inputs |= own
        disk = sum(quantizing_disk(self._sizes, target, dtype) for target in targets)
        memory = RUNTIME_BYTES + quantizing_memory(self._recipe, self._sizes, targets)
        return Step(
            name=name, stage="quantize", inputs=inputs, outputs=tuple(outputs), data=data, options=shared,
            targets=targets, needs=Needs(disk=disk, memory=memory, seconds=self._seconds(outputs)),
        )  # fmt: skip

    def _packed(self, target: Target, dense: str) -> Mapping[str, str]:
        """What has a target's packed bytes already, for all that did not change since it was dequantized."""
        if matches(target, self._source):
            return {"source": "source", "upcast": "dense"}
        base = BASE_TARGETS.get(self._base)
        if base and same_options(target, base) and dense == "tuned" and "dequantized" in self._fingerprints:
            return {"base": base.variant, "dequantized": "dequantized"}
        return {}

    def _evaluate(self, result: str) -> Step:
        evaluate, data = self._recipe.evaluate, self._recipe.evaluation_data
        assert evaluate is not None
        assert data is not None
        # A head that is new has nothing to be held against.
        fresh = result == "tuned" and self._kind in LABELLED and not self._classifier
        references = {result: None if fresh or result == "dense" else "dense"}
        references |= {target.variant: result for target in self._recipe.quantize}
        variants = [*references] if fresh or result == "dense" else ["dense", *references]
        options = {
            "sequence_length": evaluate.sequence_length,
            "references": {variant: reference for variant, reference in references.items() if reference},
        }
        needs = Needs(disk=10**5, memory=RUNTIME_BYTES + 2 * 4 * self._sizes.parameters)
        inputs = {variant: variant for variant in variants}
        return self._step("evaluate", inputs, "evaluation", options, needs, data={"evaluation": data})

    def _step(
        self,
        stage: str,
        inputs: Mapping[str, str],
        variant: str,
        options: Mapping[str, Any],
        needs: Needs,
        *,
        data: Mapping[str, Data] | None = None,
        name: str | None = None,
    ) -> Step:
        here = {role: self._here(rows) for role, rows in (data or {}).items()}
        output = self._planned(stage, inputs, variant, options, here)
        timed = replace(needs, seconds=self._seconds([output]))
        return Step(
            name=name or stage, stage=stage, inputs=inputs, outputs=(output,), data=here, options=options,
            needs=timed,
        )  # fmt: skip

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
