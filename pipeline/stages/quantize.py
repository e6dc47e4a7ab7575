"""Quantize: one dense checkpoint becomes several quantized ones, each written by its library in a process of its own.

Everything that can be known to fail is checked before the first of them starts.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import TypeAdapter

from pipeline.checkpoint import Checkpoint
from pipeline.encoding import calibration_samples, load_tokenizer
from pipeline.jobs import Job, Output
from pipeline.quantization import writers
from pipeline.quantization.folder import Order, Written
from pipeline.rows import read_rows
from pipeline.targets import Target

_TARGETS: TypeAdapter[list[Target]] = TypeAdapter(list[Target])


def run(job: Job) -> Iterator[Output]:
    """`job.inputs["dense"]` in every format of `job.options["targets"]`, each output as soon as it is written.

    `job.data["calibration"]` names the rows for GPTQ and AWQ, of which `job.options["calibration"]` says how many
    `samples` of `sequence_length` tokens. Raises UnsupportedFormat or MissingLibrary before anything is written.
    """
    targets = _TARGETS.validate_python(job.options["targets"])
    writers.check(Checkpoint.open(job.inputs["dense"]), targets)
    calibration = _calibration(job) if any(target.calibrated for target in targets) else ()
    orders = [
        Order(
            dense=job.inputs["dense"].resolve(),
            out=(job.workspace / target.variant).resolve(),
            scratch=(job.workspace / f"{target.variant}.scratch").resolve(),
            target=target,
            calibration=calibration if target.calibrated else (),
            seed=job.options["seed"],
            trust_remote_code=job.trust_remote_code,
        )
        for target in targets
    ]
    for order, written in writers.write(orders):
        yield Output(
            variant=order.target.variant, folder=order.out, metrics=_metrics(written),
            notes={"dense": list(written.dense)},
        )  # fmt: skip


def _calibration(job: Job) -> tuple[tuple[int, ...], ...]:
    """Token ids, a tuple for each sample."""
    tokenizer = load_tokenizer(job.inputs["dense"], trust_remote_code=job.trust_remote_code)
    options = job.options["calibration"]
    ids = calibration_samples(
        read_rows(job.data["calibration"]),
        tokenizer,
        samples=options["samples"],
        length=options["sequence_length"],
        seed=job.options["seed"],
    )
    return tuple(tuple(sample) for sample in ids.tolist())


def _metrics(written: Written) -> dict[str, float]:
    return {
        "packed_modules": len(written.packed),
        "packed_bits_per_weight": round(written.packed_bits_per_weight, 4),
        "bits_per_weight": round(written.bits_per_weight, 4),
    }
