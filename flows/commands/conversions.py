"""Commands that make one checkpoint out of another, without a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import ValidationError

from flows.commands.models import Json
from flows.terminal import OUT, print_json, showing_progress
from pipeline.artifacts import Store
from pipeline.bit_budget import check_budget
from pipeline.catalog import format_of, format_to
from pipeline.errors import InputError
from pipeline.libraries import require_libraries
from pipeline.preflight import open_model
from pipeline.reloadable import check_reload
from pipeline.rows import check_rows
from pipeline.section import first_sentence
from pipeline.sections import Calibration, Dtype, Upcast
from pipeline.sizes import check_target, dense_sizes
from pipeline.target_layout import check_grid
from pipeline.targets import Target, parse_target


def upcast(
    src: str,
    dst: Path,
    *,
    dtype: Dtype = "bfloat16",
    max_shard_size: str = "5GB",
    verify: Literal["none", "logits"] = "none",
    text: Path | None = None,
    store: str = "artifacts",
    trust_remote_code: bool = False,
    json: Json = False,
) -> None:
    """Dequantize a checkpoint into a new folder.

    Parameters
    ----------
    src
        A folder, a GGUF file, a hub id[@revision], or a store reference.
    dst
        The folder to write; it must not exist or be empty.
    dtype
        The data type of the dense weights.
    max_shard_size
        Most bytes of a weight file, such as 500MB or 5GB.
    verify
        `logits`: load both models and compare what they say of a text, before DST appears.
    text
        A file with the text to compare on; a paragraph of prose and code where it is left out.
    store
        The store that references are looked up in.
    trust_remote_code
        Whether Python files of the model may be read to know its architecture.
    json
        Print one JSON document.

    """
    from pipeline.by_hand import run_by_hand

    source = open_model(src, Store.open(store))
    row = format_of(source.quantization)
    if text is not None and verify == "none":
        raise InputError("--text: says what to compare logits on; add --verify logits")
    if verify == "logits" or source.is_gguf:  # the one format that is read with its own library
        require_libraries(row)
    try:
        options = Upcast(dtype=dtype, max_shard_size=max_shard_size)
    except ValidationError as error:
        raise InputError(f"--max-shard-size {max_shard_size}: not a size; write it as 500MB or 5GB") from error
    with showing_progress():
        (written,) = run_by_hand(
            "upcast", dst, inputs={"source": source.path.absolute()}, by_variant=False, model_type=source.model_type,
            options={"dtype": dtype, "max_shard_bytes": options.max_shard_bytes}, trust_remote_code=trust_remote_code,
            verify=_text(text) if verify == "logits" else None,
        )  # fmt: skip
    if json:
        found = {"dropped": written.dropped, "agreement": written.agreement}
        print_json({"path": str(written.path), **written.metrics, **found})
        return
    for name, reason in written.dropped.items():
        OUT.print(f"dropped {name}: {reason}", markup=False, soft_wrap=True)
    if written.agreement:
        OUT.print(
            "logits agree: KL divergence {kl_divergence:.2e} nats per token over {tokens} tokens, at most {bound:.2e} "
            "from rounding".format(**written.agreement), markup=False, soft_wrap=True,
        )  # fmt: skip
    OUT.print(f"wrote {written.path}", markup=False, soft_wrap=True)


def quantize(
    src: str,
    dst: Path,
    *,
    to: Annotated[list[str], Parameter(negative="")],
    calibration: Annotated[list[Path], Parameter(negative="")] = [],  # noqa: B006  # cyclopts reads the default
    shares: Annotated[list[float], Parameter(negative="")] = [],  # noqa: B006
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
        A target, such as nf4, int8, gptq:bits=4,group_size=128, awq:group_size=64, compressed-tensors:scheme=fp8 or
        gguf:type=q8_0; may be given several times.
    calibration
        The rows that GPTQ, AWQ, w4a16 and w8a8 are calibrated on; given several times they are mixed.
    shares
        What each of several files has of the samples, such as --shares 3 --shares 1; left out: all alike.
    samples
        How many calibration samples to take, of all files together.
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
    given = _calibration(targets, calibration, shares, samples=samples, sequence_length=sequence_length)
    sizes = dense_sizes(source, format_of(None))
    for target in targets:
        require_libraries(format_to(target))
        check_reload(source, sizes, target)
        check_target(sizes, target)
        check_budget(sizes, target)
        check_grid(target, source)
    options = {"targets": [target.model_dump() for target in targets], "seed": seed, "calibration": given.drawn}
    with showing_progress():
        written = run_by_hand(
            "quantize", dst, inputs={"dense": source.path.resolve()}, options=options, data=given.rows(None),
            by_variant=True, model_type=source.model_type,
        )  # fmt: skip
    for output in written:
        OUT.print(f"wrote {output.path}", markup=False, soft_wrap=True)


def _text(path: Path | None) -> str:
    """The text in a file, or nothing for the one that is built in."""
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {path}: cannot be read ({error}); name a UTF-8 text file") from error


def _calibration(
    targets: list[Target], paths: list[Path], shares: list[float], *, samples: int, sequence_length: int
) -> Calibration:
    """The rows that the targets are calibrated on, checked; where none is calibrated, those of nothing."""
    needy = [target.variant for target in targets if target.calibrated]
    if needy and not paths:
        raise InputError(f"{needy[0]}: needs calibration rows; name a file with --calibration")
    try:
        given = Calibration.model_validate({
            "data": [str(path.resolve()) for path in paths] if needy else "train", "shares": shares if needy else (),
            "samples": samples, "sequence_length": sequence_length,
        })  # fmt: skip
    except ValidationError as error:
        raise InputError(f"--calibration: {first_sentence(error)}") from error
    for data in given.rows(None).values():
        check_rows(data, limit=None)
    return given
