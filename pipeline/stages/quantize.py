"""Quantize: one dense checkpoint becomes several quantized ones, each written in a process that is not this one.

Everything that can be known to fail is checked before the first of them starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from pipeline import mixture, progress
from pipeline.bit_budget import affordable
from pipeline.checkpoint import Checkpoint, language_of
from pipeline.encoding import load_tokenizer
from pipeline.errors import ReloadMismatch, UnsupportedFormat
from pipeline.jobs import Job, Output
from pipeline.kept import Donor, Kept, keep, made_from, writable
from pipeline.manifest import MANIFEST, Manifest
from pipeline.mixture import Mixture, Source
from pipeline.quantization import writers
from pipeline.quantization.folder import Order, Written
from pipeline.quantization.survival import rounded_away
from pipeline.rows import read_rows
from pipeline.targets import Target, grid_of, is_own

_TARGETS: TypeAdapter[list[Target]] = TypeAdapter(list[Target])


def run(job: Job) -> Iterator[Output]:
    """`job.inputs["dense"]` in every format of `job.options["targets"]`, each output once it is written and reloads.

    What `job.data` calls `calibration…` are the rows for what is calibrated, of which `job.options["calibration"]` says
    how many `samples` (where there are several, a list) of `sequence_length` tokens. What a donor of a target holds
    already is copied; where that is everything, no row is read and nothing is rounded. Raises UnsupportedFormat or
    MissingLibrary before anything is written, ReloadMismatch for a folder that does not reload as it was meant, after
    those beside it that do.
    """
    targets = _TARGETS.validate_python(job.options["targets"])
    parent = Checkpoint.open(job.inputs["dense"])
    writers.check(parent, targets)
    digests = _digests(parent)
    kept = {target.variant: _kept(job, target, parent, digests) for target in targets}
    grids = {target.variant: _grid_of(job, target) for target in targets}
    rounded = [target for target in targets if target.calibrated and not kept[target.variant].described_by]
    calibration = _calibration(job, parent) if rounded else mixture.NOTHING
    orders = [
        Order(
            dense=job.inputs["dense"].resolve(),
            out=(job.workspace / target.variant).resolve(),
            scratch=(job.workspace / f"{target.variant}.scratch").resolve(),
            target=target,
            calibration=calibration.samples if target in rounded else (),
            kept=kept[target.variant].modules,
            described_by=kept[target.variant].described_by,
            grid_of=grids[target.variant],
            seed=job.options["seed"],
            trust_remote_code=job.trust_remote_code,
        )
        for target in targets
    ]
    for variant, own in kept.items():
        for donor, count in own.counted.items():
            progress.message("quantize", f"{variant}: copies {count} of {len(own.wanted)} modules from {donor}")
    for made in writers.write(orders):
        mismatches: list[ReloadMismatch] = []
        for (order, written), reloaded in zip(made, writers.reload(made), strict=True):
            if isinstance(reloaded, ReloadMismatch):
                mismatches.append(reloaded)
                continue
            own = kept[order.target.variant]
            progress.message("quantize", reloaded.sentence(order.target.variant))
            yield Output(
                variant=order.target.variant,
                folder=order.out,
                metrics={**_metrics(written), **reloaded.metrics, "copied_modules": len(own.modules)},
                notes={
                    **_notes(order.target, written, own, digests),
                    **(calibration.notes if order.calibration else {}),
                    **reloaded.notes,
                },
            )
        if mismatches:
            raise mismatches[0]


def _digests(parent: Checkpoint) -> Mapping[str, str]:
    """Tensor → its digest, where the parent is an artifact; a folder of the user's has no donors to compare with."""
    return Manifest.read(parent.path).tensors if (parent.path / MANIFEST).is_file() else {}


def _kept(job: Job, target: Target, parent: Checkpoint, digests: Mapping[str, str]) -> Kept:
    shapes = {name: info.shape for name, info in parent.tensors.items()}
    found = keep(target, shapes, digests, job.donors.get(target.variant, ()))
    return affordable(target, writable(target, found), shapes)


def _grid_of(job: Job, target: Target) -> Donor | None:
    """The quantized source of the dense weights; raise UnsupportedFormat where its grid is asked for and unknown."""
    if not is_own(target):
        return None
    found = next((donor for donor in job.donors.get(target.variant, ()) if donor.ancestor), None)
    if (grid := grid_of(target)) != "fresh" and not (found and found.made_from):
        raise UnsupportedFormat(
            f"{target.variant}: grid {grid} needs to know what the source's packed modules were dequantized to, "
            "which is noted nowhere; run a recipe on the quantized source, or leave grid out"
        )
    return found


def _notes(target: Target, written: Written, kept: Kept, digests: Mapping[str, str]) -> dict[str, Any]:
    """What stayed dense; by which a later run knows the packed bytes again; and whence those that were copied."""
    notes: dict[str, Any] = {"dense": list(written.dense), **written.notes}
    if made := made_from(target, written.packed, digests):
        notes["made_from"] = made
    if kept.modules:
        notes["copied_from"] = kept.counted
    if written.bits:
        notes["bits"] = dict(sorted(written.bits.items()))
    if written.survival:
        notes["survival"] = {
            module: {key: float(f"{value:.6g}") for key, value in asdict(found).items()}
            for module, found in sorted(written.survival.items())
        }
    return notes


def _calibration(job: Job, parent: Checkpoint) -> Mixture:
    tokenizer = load_tokenizer(job.inputs["dense"], trust_remote_code=job.trust_remote_code)
    options = job.options["calibration"]
    counts = options["samples"] if isinstance(options["samples"], list) else [options["samples"]]
    rows = {role: data for role, data in job.data.items() if role.startswith("calibration")}
    return mixture.drawn(
        [
            Source(role=role, path=data.path, rows=read_rows(data), samples=samples)
            for (role, data), samples in zip(rows.items(), counts, strict=True)
        ],
        tokenizer,
        length=options["sequence_length"],
        seed=job.options["seed"],
        vocabulary=_vocabulary(parent),
    )


def _vocabulary(dense: Checkpoint) -> int | None:
    """How many tokens the model knows, where its config says so."""
    known = language_of(dense.config).get("vocab_size")
    return known if isinstance(known, int) else None


def _metrics(written: Written) -> dict[str, float]:
    survival: dict[str, float] = {}
    if found := written.survival:
        changed = sum(one.changed_codes for one in found.values()) / len(found)
        survival = {"rounded_away": len(rounded_away(found)), "changed_codes": round(changed, 6)}
    return {
        **survival,
        "packed_modules": len(written.packed),
        "packed_bits_per_weight": round(written.packed_bits_per_weight, 4),
        "bits_per_weight": round(written.bits_per_weight, 4),
    }
