"""The flow `train-and-quantize`: from a checkpoint, quantized or not, to promoted variants."""

from __future__ import annotations

from typing import Any, cast

from prefect import flow
from prefect.utilities.annotations import opaque

from flows import tasks
from pipeline.plan import Plan
from pipeline.recipe import Recipe


@flow(name="train-and-quantize", flow_run_name="{recipe.name}", persist_result=False)
def train_and_quantize(recipe: Recipe) -> dict[str, Any]:
    """Run every step of the recipe that is not in the store yet; return the result table as plain values."""
    # The plan is handed on as it is: Prefect would otherwise look through every tensor's name in it.
    plan = cast("Plan", opaque(tasks.lay_out(recipe)))
    dense = tasks.upcast(plan)
    base = tasks.base(plan, dense)
    trained = tasks.train(plan, base)
    tuned = tasks.merge(plan, tasks.dequantize(plan, base), trained)
    models = tasks.quantize(plan, tuned)
    report = tasks.evaluate(plan, models)
    return tasks.promote(plan, report)
