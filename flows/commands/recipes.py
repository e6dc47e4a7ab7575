"""Commands that take a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from flows.tables import plan_rows, result_rows
from flows.terminal import ERR, OUT, print_json, show_plan, show_results, showing_progress
from pipeline import outcome
from pipeline.errors import InputError
from pipeline.plan import Plan, make_plan
from pipeline.recipe import Recipe, load_recipe
from pipeline.sources import open_source

Set = Annotated[list[str], Parameter(name="--set", negative="")]
Json = Annotated[bool, Parameter(name="--json", negative="")]


def run(recipe: Path, *, overrides: Set = [], json: Json = False) -> None:  # noqa: B006  # cyclopts reads the default
    """Plan, then run every stage that is not already in the store; resumes by itself.

    Parameters
    ----------
    recipe
        A YAML file.
    overrides
        key.path=value, such as train.arguments.learning_rate=1e-4; may be given several times.
    json
        Print one JSON document on standard output; progress stays on standard error.

    """
    parsed = load_recipe(recipe, overrides)
    plan = make_plan(parsed)
    ran = [output.variant for step in plan.steps for output in step.pending]
    ERR.print(f"to run: {', '.join(ran)}" if ran else "every stage is in the store: nothing to run", markup=False)
    try:
        promoted = _run_flow(plan, parsed)
    finally:
        rows = outcome.rows(plan)
        if json:
            print_json({"ran": ran, "plan": plan_rows(plan), "models": result_rows(plan, rows)})
        elif rows:
            show_results(result_rows(plan, rows))
    if not json:
        for reference, version in promoted.items():
            OUT.print(f"promoted: {reference} is now {version}", markup=False)
        OUT.print(f"ran {len(ran)} stage outputs" if ran else "ran no stage: everything was reused", markup=False)


def _run_flow(plan: Plan, recipe: Recipe) -> dict[str, str]:
    """Run the flow in this process, against the server of PREFECT_API_URL or a temporary one."""
    from flows.temporary_server import quiet_environment, temporary_server
    from pipeline import child
    from pipeline.preloading import preload

    os.environ.update(quiet_environment())  # before Prefect is imported
    if plan.runs:
        child.warm(preload(plan.source.model_type))  # while the server starts
    with showing_progress(), temporary_server():
        from flows.train_and_quantize import train_and_quantize

        result: dict[str, Any] = train_and_quantize(recipe)
    return dict(result["promoted"])


def plan(recipe: Path, *, overrides: Set = [], json: Json = False) -> None:  # noqa: B006  # cyclopts reads the default
    """Show what would run and why, and the disk, memory and time it needs; check everything that can be checked.

    Parameters
    ----------
    recipe
        A YAML file.
    overrides
        key.path=value; may be given several times.
    json
        Print one JSON document.

    """
    parsed = load_recipe(recipe, overrides)
    rows = plan_rows(make_plan(parsed))
    if json:
        print_json({"plan": rows})
        return
    show_plan(rows)
    if parsed.promote:
        OUT.print(f"then: each variant that keeps its bounds becomes @{parsed.promote.alias}", markup=False)


def train(recipe: Path, *, overrides: Set = [], json: Json = False) -> None:  # noqa: B006  # cyclopts reads the default
    """Run a recipe up to and including its train stage.

    Parameters
    ----------
    recipe
        A YAML file.
    overrides
        key.path=value; may be given several times.
    json
        Print one JSON document on standard output.

    """
    from pipeline.execute import run_step

    parsed = load_recipe(recipe, overrides)
    if parsed.train.method == "none":
        raise InputError(f"recipe {recipe}: train.method is none; set it to lora, full, head or projector")
    plan = make_plan(parsed, until="train")
    with showing_progress():
        found = {variant: artifact for step in plan.steps for variant, artifact in run_step(plan, step).items()}
    places = {artifact.reference: str(artifact.path) for artifact in found.values()}
    if json:
        print_json({"artifacts": places})
    else:
        for reference, place in places.items():
            OUT.print(f"{reference}  {place}", markup=False, soft_wrap=True)


def schema(*, reference: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Print the recipe's JSON Schema, for editors that check YAML.

    Parameters
    ----------
    reference
        Print the reference page in Markdown instead.

    """
    if reference:
        from flows import reference as page

        OUT.print(page.reference(), markup=False, soft_wrap=True, end="")
    else:
        print_json(Recipe.model_json_schema(by_alias=True))


def init(
    model: str, *, output: Path | None = None, data: str = "data/train.jsonl", evaluation: str = "data/eval.jsonl"
) -> None:
    """Write a commented recipe for a model.

    Parameters
    ----------
    model
        A folder or a hub id[@revision].
    output
        The file to write; the model's name with .yaml where it is left out.
    data
        The training rows that the recipe will name.
    evaluation
        The evaluation rows that the recipe will name.

    """
    from flows.template import recipe_text

    text, name = recipe_text(model, open_source(model), data=data, evaluation=evaluation)
    path = output or Path(f"{name}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InputError(f"{path}: exists already; name another file with --output") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a file that can be written with --output") from error
    OUT.print(f"wrote {path}; next: edit its data, then requant plan {path}", markup=False, soft_wrap=True)
