"""Commands that take a model folder, a hub id or a store reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from flows.figures import size
from flows.tables import figure_columns, figures
from flows.terminal import OUT, print_json, print_table, showing_progress
from pipeline.artifacts import Store
from pipeline.catalog import format_of
from pipeline.checkpoint import Checkpoint
from pipeline.errors import InputError, one_line
from pipeline.libraries import require_libraries
from pipeline.model_task import kind_for, task_of
from pipeline.preflight import open_model
from pipeline.rows import check_rows
from pipeline.sections import Data, Kind

MOST_PROBLEMS = 10  # of a checkpoint that is no good at all, a screen tells enough
Json = Annotated[bool, Parameter(name="--json", negative="")]


def inspect(model: str, *, store: str = "artifacts", trust_remote_code: bool = False, json: Json = False) -> None:
    """Say what a checkpoint is: format, bits, sizes, what it can become, and what is wrong with it.

    Parameters
    ----------
    model
        A folder, a GGUF file, a hub id[@revision], or a store reference.
    store
        The store that references are looked up in.
    trust_remote_code
        Whether Python files of the model may be read to know its architecture.
    json
        Print one JSON document.

    """
    from pipeline import child

    # In a child, since what the libraries print while they are imported is of no use here.
    checkpoint = open_model(model, Store.open(store))
    facts: dict[str, Any] = child.run("pipeline.inspection:facts", checkpoint, trust_remote_code)
    if json:
        print_json(facts)
        return
    for key, value in _lines(facts):
        # A checkpoint can say anything: what a terminal would act on is shown by its escape.
        OUT.print(f"{key:<16} {one_line(value)}", markup=False, soft_wrap=True)


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is known, as the name of each fact and what is said of it."""
    yield "path", facts["path"]
    yield "architecture", facts["architecture"]
    yield "format", f"{facts['format']}, {facts['layout']}" if facts["layout"] else facts["format"]
    if facts["bits"]:
        yield "bits", ", ".join(f"{bits} ({count} modules)" for bits, count in facts["bits"].items())
    if facts["group_size"] is not None:
        yield "group size", str(facts["group_size"])
        yield "symmetric", "yes" if facts["symmetric"] else "no"
    if facts["ignored"]:
        yield "ignored modules", ", ".join(facts["ignored"])
    if facts["parameters"]:
        yield "parameters", f"{facts['parameters']:,}"
    yield "on disk", f"{size(facts['bytes'])} in {facts['shards']} shard{'s' if facts['shards'] > 1 else ''}"
    if facts["bytes_as_bfloat16"]:
        yield "as bfloat16", size(facts["bytes_as_bfloat16"])
    yield "trainable", facts["trainable"]
    if not facts["problems"]:
        yield "becomes", ", ".join(["dense", *(name for name, why in facts["becomes"].items() if not why)])
    yield from (("cannot become", why) for why in facts["becomes"].values() if why)
    yield from (("left out", f"{name}: {why}") for name, why in facts["dropped"].items())
    yield from (("wrong", problem) for problem in facts["problems"][:MOST_PROBLEMS])
    if len(facts["problems"]) > MOST_PROBLEMS:
        yield "wrong", f"and {len(facts['problems']) - MOST_PROBLEMS} more; --json names them all"


def try_(
    model: str, *, prompt: str, max_new_tokens: int = 64, store: str = "artifacts", trust_remote_code: bool = False
) -> None:
    """Generate text from any folder or artifact, taking the likeliest token each time.

    Parameters
    ----------
    model
        A folder, a hub id[@revision], or a store reference.
    prompt
        What the text begins with.
    max_new_tokens
        How many tokens to add at most.
    store
        The store that references are looked up in.
    trust_remote_code
        Whether Python files of the model may run.

    """
    from pipeline import child
    from pipeline.evaluation.tasks import ENVIRONMENT, Prompt

    checkpoint = _open_loadable(model, Store.open(store))
    require_libraries(format_of(checkpoint.quantization))
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: ask for at least 1")
    asked = Prompt(
        path=checkpoint.folder.resolve(),
        text=prompt,
        max_new_tokens=max_new_tokens,
        trust_remote_code=trust_remote_code,
    )
    said = child.run("pipeline.evaluation.generate:generate", asked, environment=ENVIRONMENT)
    OUT.print(prompt + said, markup=False, soft_wrap=True)


def evaluate(
    models: list[str],
    *,
    data: Path,
    reference: str | None = None,
    sequence_length: int = 512,
    format: Literal["auto"] | Kind = "auto",  # noqa: A002 - what the recipe calls it
    field: str = "text",
    label: str = "label",
    store: str = "artifacts",
    trust_remote_code: bool = False,
    json: Json = False,
) -> None:
    """Measure models on a file, each by what it answers, and how far each is from a reference.

    A language model has a perplexity; a classifier, a tagger and a projector of labels accuracy and F1; one of numbers
    an error; one of pairs the accuracy of finding an anchor's positive. Beside a reference there are KL divergence and
    agreement too.

    Parameters
    ----------
    models
        Folders, hub ids or store references.
    data
        The rows to measure on.
    reference
        The model that the others are compared with.
    sequence_length
        Tokens in a window; windows do not overlap. Rows with labels must be shorter.
    format
        What a row is; `auto` reads it off the first row's fields.
    field
        The field that holds the text.
    label
        The field that holds the label.
    store
        The store that references are looked up in.
    trust_remote_code
        Whether Python files of the models may run.
    json
        Print one JSON document.

    """
    from pipeline import child
    from pipeline.evaluation.tasks import ENVIRONMENT, Comparison

    opened = {model: _open_loadable(model, Store.open(store)) for model in models}
    beside = _open_loadable(reference, Store.open(store)) if reference else None
    rows_of = Data(path=str(data), format=format, field=field, label=label)
    _check_rows(rows_of, [*opened.values(), *([beside] if beside else [])])
    scores = []
    with showing_progress():
        for model, checkpoint in opened.items():
            task = Comparison(
                variant=model, path=checkpoint.folder.resolve(), reference=reference,
                reference_path=beside.folder.resolve() if beside else None, data=rows_of,
                sequence_length=sequence_length, trust_remote_code=trust_remote_code,
            )  # fmt: skip
            scores.append(child.run("pipeline.judging.compare:compare", task, environment=ENVIRONMENT))
    measured = figure_columns(scores)
    counted = [name for name in ("rows", "tokens") if any(getattr(score, name) is not None for score in scores)]
    shown: list[dict[str, Any]] = [
        {"model": score.variant, **{name: getattr(score, name) for name in counted}, **figures(score, measured)}
        for score in scores
    ]
    if json:
        print_json({"scores": shown})
        return
    print_table(str(data), [{key: _figure(value) for key, value in row.items()} for row in shown])


def _figure(value: float | str | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_rows(data: Data, models: list[Checkpoint]) -> None:
    """Check every row, and that rows of their kind say something of each model, before any of them loads."""
    kind = check_rows(data, limit=None)
    for checkpoint in models:
        kind_for(task_of(checkpoint.folder), kind, data=data, named=str(checkpoint.path))


def _open_loadable(model: str, store: Store) -> Checkpoint:
    """The checkpoint; raise InputError for a GGUF file without a config and tokenizer beside it."""
    checkpoint = open_model(model, store)
    if checkpoint.is_gguf and not (checkpoint.folder / "config.json").is_file():
        raise InputError(f"{model}: is a GGUF file; run requant upcast on it first, then name the folder it wrote")
    return checkpoint
