"""Commands that take a model folder, a hub id or a store reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from flows.terminal import OUT, print_json, print_table, showing_progress, size
from pipeline.artifacts import Store
from pipeline.catalog import FORMATS, format_of, format_to, require_libraries
from pipeline.errors import InputError, UnsupportedFormat
from pipeline.preflight import open_model
from pipeline.recipe import Data, Dtype, Recipe
from pipeline.rows import check_rows
from pipeline.sizes import check_target, dense_sizes
from pipeline.targets import Target, parse_target

Json = Annotated[bool, Parameter(name="--json", negative="")]


def inspect(model: str, *, store: str = "artifacts", json: Json = False) -> None:
    """Say what a checkpoint is: format, bits, sizes, and what it can become.

    Parameters
    ----------
    model
        A folder, a hub id[@revision], or a store reference.
    store
        The store that references are looked up in.
    json
        Print one JSON document.

    """
    checkpoint = open_model(model, Store.open(store))
    quantization = checkpoint.quantization
    facts: dict[str, Any] = {"path": str(checkpoint.path), "architecture": checkpoint.model_type}
    try:
        row = format_of(quantization)
        sizes = dense_sizes(checkpoint, row)
        facts |= {
            "format": row.title,
            "parameters": sizes.parameters,
            "bytes_as_bfloat16": sizes.dense_bytes("bfloat16"),
        }
        facts["quantized_modules"] = len(row.packed_modules(checkpoint.tensors))
        facts["becomes"] = ["bfloat16", *(other.title for other in FORMATS.values() if other.writable)]
    except UnsupportedFormat as error:
        facts |= {"format": quantization.method if quantization else "unknown", "cannot_be_read": str(error)}
    if quantization:
        facts |= {"bits": quantization.bits, "group_size": quantization.group_size, "symmetric": quantization.symmetric}
        facts["ignored_modules"] = list(quantization.ignored)
    facts |= {"shards": len(checkpoint.shards), "bytes": checkpoint.nbytes}
    if json:
        print_json(facts)
        return
    shown = {key: size(value) if key.startswith("bytes") else value for key, value in facts.items()}
    for key, value in shown.items():
        OUT.print(f"{key.replace('_', ' '):<18} {', '.join(value) if isinstance(value, list) else value}", markup=False)


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

    checkpoint = open_model(model, Store.open(store))
    require_libraries(format_of(checkpoint.quantization))
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: ask for at least 1")
    asked = Prompt(
        path=checkpoint.path.resolve(), text=prompt, max_new_tokens=max_new_tokens, trust_remote_code=trust_remote_code
    )
    said = child.run("pipeline.evaluation.generate:generate", asked, environment=ENVIRONMENT)
    OUT.print(prompt + said, markup=False, soft_wrap=True)


def upcast(
    src: str, dst: Path, *, dtype: Dtype = "bfloat16", store: str = "artifacts", trust_remote_code: bool = False
) -> None:
    """Dequantize a checkpoint into a new folder.

    Parameters
    ----------
    src
        A folder, a hub id[@revision], or a store reference.
    dst
        The folder to write; it must not exist or be empty.
    dtype
        The data type of the dense weights.
    store
        The store that references are looked up in.
    trust_remote_code
        Whether Python files of the model may be read to know its architecture.

    """
    from pipeline.by_hand import run_by_hand

    source = open_model(src, Store.open(store))
    format_of(source.quantization)
    with showing_progress():
        written = run_by_hand(
            "upcast", dst, inputs={"source": source.path.resolve()}, options={"dtype": dtype}, by_variant=False,
            model_type=source.model_type, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    OUT.print(f"wrote {written[0]}", markup=False, soft_wrap=True)


def quantize(
    src: str,
    dst: Path,
    *,
    to: Annotated[list[str], Parameter(negative="")],
    calibration: Path | None = None,
    samples: int = 128,
    sequence_length: int = 512,
    seed: int = 42,
    store: str = "artifacts",
) -> None:
    """Quantize a dense checkpoint to one or several formats, each in a folder of its own under DST.

    Parameters
    ----------
    src
        A dense folder, hub id[@revision], or store reference.
    dst
        The folder to write; it must not exist or be empty.
    to
        A target, such as nf4, int8, gptq:bits=4,group_size=128 or awq:group_size=64; may be given several times.
    calibration
        The rows that GPTQ and AWQ are calibrated on.
    samples
        How many calibration samples to take.
    sequence_length
        Tokens in a sample.
    seed
        Chooses the samples.
    store
        The store that references are looked up in.

    """
    from pipeline.by_hand import run_by_hand

    source = open_model(src, Store.open(store))
    if source.quantization is not None:
        raise InputError(f"{src}: is quantized already ({source.quantization.method}); run requant upcast on it first")
    targets = [parse_target(text) for text in to]
    data = _calibration(targets, calibration)
    sizes = dense_sizes(source, format_of(None))
    for target in targets:
        require_libraries(format_to(target))
        check_target(sizes, target)
    options = {
        "targets": [target.model_dump() for target in targets], "seed": seed,
        "calibration": {"samples": samples, "sequence_length": sequence_length},
    }  # fmt: skip
    with showing_progress():
        written = run_by_hand(
            "quantize", dst, inputs={"dense": source.path.resolve()}, options=options, data=data, by_variant=True,
            model_type=source.model_type,
        )  # fmt: skip
    for path in written:
        OUT.print(f"wrote {path}", markup=False, soft_wrap=True)


def evaluate(
    models: list[str],
    *,
    data: Path,
    reference: str | None = None,
    sequence_length: int = 512,
    store: str = "artifacts",
    json: Json = False,
) -> None:
    """Measure perplexity on a file and, beside a reference, KL divergence and top-1 agreement.

    Parameters
    ----------
    models
        Folders, hub ids or store references.
    data
        The rows to measure on.
    reference
        The model that the others are compared with.
    sequence_length
        Tokens in a window; windows do not overlap.
    store
        The store that references are looked up in.
    json
        Print one JSON document.

    """
    from pipeline import child
    from pipeline.evaluation.tasks import ENVIRONMENT, Comparison

    opened = {model: open_model(model, Store.open(store)) for model in models}
    beside = open_model(reference, Store.open(store)) if reference else None
    rows_of = Data(path=str(data))
    check_rows(rows_of, limit=None)
    scores = []
    with showing_progress():
        for model, checkpoint in opened.items():
            task = Comparison(
                variant=model, path=checkpoint.path.resolve(), reference=reference,
                reference_path=beside.path.resolve() if beside else None, data=rows_of, sequence_length=sequence_length,
            )  # fmt: skip
            scores.append(child.run("pipeline.evaluation.compare:compare", task, environment=ENVIRONMENT))
    shown: list[dict[str, Any]] = [
        {
            "model": score.variant, "tokens": score.tokens, "perplexity": score.perplexity,
            "perplexity_increase": score.perplexity_increase, "kl_divergence": score.kl_divergence,
            "top1_agreement": score.top1_agreement,
        }
        for score in scores
    ]  # fmt: skip
    if json:
        print_json({"scores": shown})
    else:
        print_table(
            str(data),
            [
                {key: "" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in row.items()}
                for row in shown
            ],
        )


def _calibration(targets: list[Target], path: Path | None) -> dict[str, Data]:
    needy = [target.variant for target in targets if target.format in Recipe.CALIBRATED]
    if not needy:
        return {}
    if path is None:
        raise InputError(f"{needy[0]}: needs calibration rows; name a file with --calibration")
    data = Data(path=str(path.resolve()))
    check_rows(data, limit=None)
    return {"calibration": data}
