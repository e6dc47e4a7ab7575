"""Every model of the plan, reloaded in a fresh process, beside the model it came from. Ends in a report."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline import child
from pipeline.evaluation.tasks import ENVIRONMENT, Comparison
from pipeline.gates import Scores, write_report
from pipeline.jobs import Job, Output


def run(job: Job) -> Iterator[Output]:
    """Yield one output, `evaluation`: report.json with the Scores of every input.

    Inputs are named by their variants; `references` in the options says which is compared with which.
    """
    references = job.options["references"]
    scores: list[Scores] = []
    for variant, path in job.inputs.items():
        reference = references.get(variant)
        task = Comparison(
            variant=variant,
            path=path,
            reference=reference,
            reference_path=job.inputs[reference] if reference else None,
            data=job.data["evaluation"],
            sequence_length=job.options["sequence_length"],
            trust_remote_code=job.trust_remote_code,
        )
        scores.append(child.run("pipeline.judging.compare:compare", task, environment=ENVIRONMENT))
    folder = job.workspace / "out"
    folder.mkdir(exist_ok=True)
    write_report(folder, scores)
    yield Output(variant="evaluation", folder=folder)
