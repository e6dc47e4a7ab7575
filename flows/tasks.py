"""One Prefect task a step of the plan. Tasks pass artifact references, never tensors; the store is the only cache."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE

from flows.figures import line
from flows.remaining import Clock, Remaining
from flows.tables import plan_rows, result_rows
from pipeline import outcome, progress
from pipeline.execute import run_step
from pipeline.plan import Plan, make_plan
from pipeline.recipe import Recipe

References = dict[str, str]  # variant → name/variant@version
UPDATE_SECONDS = 2.0  # a progress artifact is a request to the server; a bar needs no more than this


def lay_out(recipe: Recipe) -> Plan:
    """Check the recipe and show its plan as an artifact of the run."""
    plan = make_plan(recipe)
    create_table_artifact(table=plan_rows(plan), key=_key(recipe, "plan"), description=f"The plan of {recipe.name}")
    return plan


def _step_task(name: str) -> Callable[..., References]:
    """The task of a step: its inputs are named only so that Prefect draws what follows from what."""

    @task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    def run(plan: Plan, *inputs: References) -> References:
        passed = {variant: reference for given in inputs for variant, reference in given.items()}
        step = plan.step(name)
        if step is None:
            return passed
        logger = get_run_logger()
        for output in step.outputs:
            logger.info("%s: %s", output.variant, output.reason)
        sink = PrefectSink(plan.recipe, logger)
        try:
            with progress.shown_by(sink):
                found = run_step(plan, step)
        finally:
            sink.flush()
        return passed | {variant: artifact.reference for variant, artifact in found.items()}

    return run


upcast = _step_task("upcast")
base = _step_task("base")
dequantize = _step_task("dequantize")
train = _step_task("train")
merge = _step_task("merge")
quantize = _step_task("quantize")
evaluate = _step_task("evaluate")


@task(name="promote", task_run_name="promote", cache_policy=NO_CACHE, persist_result=False)
def promote(plan: Plan, report: References) -> dict[str, Any]:
    """Show the result table and move the alias of each passing variant; raises GateRefused where one was refused."""
    get_run_logger().info("judging %s", report.get("evaluation", "nothing: the recipe has no evaluate section"))
    rows = outcome.rows(plan)
    table = result_rows(plan, rows)
    create_table_artifact(table=table, key=_key(plan.recipe, "result"), description=f"The models of {plan.recipe.name}")
    lines = [f"- `{row.artifact.reference}`: `{row.artifact.path}`" for row in rows]
    create_markdown_artifact(
        markdown="\n".join(["# Where the artifacts are", *lines]), key=_key(plan.recipe, "artifacts")
    )
    moved = outcome.promote(plan, rows)
    for reference, version in moved.items():
        get_run_logger().info("promoted: %s is now %s", reference, version)
    return {"models": table, "promoted": dict(moved)}


class PrefectSink:
    """Shows a stage's events in its task run: messages and figures as logs, steps as a progress artifact.

    Figures that belong together come one by one; they are one line of the log, and stand beside the bar.
    """

    def __init__(
        self,
        recipe: Recipe,
        logger: logging.Logger | logging.LoggerAdapter[logging.Logger],
        clock: Clock = time.monotonic,
    ) -> None:
        self._recipe, self._logger = recipe, logger
        self._clock, self._remaining = clock, Remaining(clock)
        self._bars: dict[tuple[str, str], tuple[UUID, float]] = {}  # by stage and unit
        self._unsaid: dict[str, dict[str, float]] = {}  # figures by stage
        self._figures: dict[str, str] = {}  # the last line of them

    def __call__(self, event: progress.Event) -> None:
        """Show one event."""
        match event:
            case progress.Message(stage=stage, text=text):
                self.flush()
                self._logger.info("%s: %s", stage, text)
            case progress.Metric(stage=stage, name=name, value=value):
                if name in self._unsaid.get(stage, {}):
                    self.flush()
                self._unsaid.setdefault(stage, {})[name] = value
            case progress.Step():
                self.flush()
                self._advance(event)

    def flush(self) -> None:
        """Log the figures that have come since the last line."""
        for stage, figures in self._unsaid.items():
            self._figures[stage] = line(figures, short=False)
            self._logger.info("%s: %s", stage, self._figures[stage])
        self._unsaid.clear()

    def _advance(self, event: progress.Step) -> None:
        self._remaining.saw(event)
        percent = 100.0 * event.done / max(event.total, 1)
        bar, shown = self._bars.get((event.stage, event.unit), (None, 0.0))
        if bar is not None and self._clock() - shown < UPDATE_SECONDS and event.done < event.total:
            return
        if bar is None:
            key = _key(self._recipe, f"{event.stage}-{event.unit}")
            made = create_progress_artifact(progress=percent, key=key, description=f"{event.stage} in {event.unit}")
            bar = cast("UUID", made)  # a coroutine only inside an event loop, where no stage runs
        else:
            counted = f"{event.stage} in {event.unit}: {event.done:,} of {event.total:,}"
            left, figures = self._remaining.said(event.stage, event.unit), self._figures.get(event.stage)
            said = "; ".join(filter(None, (counted, left, figures)))
            update_progress_artifact(artifact_id=bar, progress=percent, description=said)
        self._bars[event.stage, event.unit] = (bar, self._clock())


def _key(recipe: Recipe, what: str) -> str:
    """An artifact key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{recipe.name}-{what}".lower()).strip("-")
