"""Requant's quantization beside gptqmodel's and bitsandbytes', from the same dense folder and calibration tokens.

Each role runs in a process of its own: Requant's GPTQ, AWQ and NF4 together from one calibration pass, and each by
itself; gptqmodel's GPTQ and AWQ (`engine: gptqmodel`); bitsandbytes' NF4 through transformers, loaded and saved; and as
the floor a plain float32 forward of the dense model over the same batches with one product for each distinct input, its
model read before the clock runs. 4 bits and groups of 128, 64 for NF4. Shown are seconds beyond the imports to the
synced folder, peak anonymous memory beyond the imports, and the size of the weights; then, on tokens that no role saw,
perplexity, KL divergence from the dense model, agreement on the likeliest token, and the difference of token losses
from the rival's folder of the same format, with a paired 95 % bootstrap interval over windows; then how fast weights
become NF4, without files. `--draws` calibrates on so many draws of rows; times are of the first.

`small` is the example checkpoint, upcast: its weights lie on AWQ's grid in groups of 64, which groups of 128 do not
meet but which is not what weights fresh from training look like; `--checkpoint` takes any dense folder instead.
`hundred` and `half` are random weights, whose quality says nothing and is not judged. `--smoke` shows in seconds that
the script runs, without gptqmodel.

Not covered: a GPU; loading by transformers, since all folders are read back by Requant's upcast and computed in
float32; llm-compressor, which needs an environment of its own. AutoAWQ is a role where it is installed
(`pip install 'requant[autoawq]'`), as `engine: autoawq` has it: with its search mended, and in float32. gptqmodel
compiles helpers when it first runs on a machine: run twice there, or with `--rounds 2`.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import synthetic
from quality import Judged, interval
from quantize_roles import FLOOR, GROUP, JUDGED, RIVALS, ROLES, out_of
from rich.console import Console
from rich.table import Table

from pipeline import child
from pipeline.encoding import calibration_samples, encode, load_tokenizer
from pipeline.errors import RequantError
from pipeline.evaluation.tasks import ENVIRONMENT
from pipeline.jobs import Job
from pipeline.preloading import preload
from pipeline.rows import read_rows
from pipeline.sections import Data
from pipeline.stages import upcast

EXAMPLES = Path(__file__).parents[1] / "examples"
SMOKE = synthetic.Size(hidden=256, intermediate=512, vocabulary=4096, layers=2)
SIZES = {"smoke": SMOKE, "hundred": synthetic.HUNDRED_MILLION, "half": synthetic.HALF_BILLION}
SIDES = (8192, 4096)  # of the matrix that becomes NF4 without files
Result = dict[str, float]


def main() -> None:
    """Print the tables."""
    given = _arguments()
    child.warm([*preload("llama", training=False), "bitsandbytes", "quantize_roles"])
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        _prepare(folder, given)
        results = {role: _fastest(role, folder, given.rounds) for role in given.roles}
        drawn = {role for role, _ in JUDGED.values()} & {role for role in results if isinstance(results[role], dict)}
        for draw in range(1, given.draws):
            for role in sorted(drawn):
                if isinstance(failed := _run(role, folder, draw), str):
                    raise SystemExit(f"{role}, draw {draw}: {failed}")
        tables = [_costs(folder, given, results)]
        if given.model in ("small", "smoke"):
            tables.append(_qualities(folder, given))
        speed = child.run("quantize_roles:nf4_speed", *given.sides)
    console = Console(width=140)
    for table in tables:
        console.print(table)
    console.print(
        f"NF4 without files, {given.sides[0]} x {given.sides[1]} bfloat16, M parameters/s: "
        f"{speed['Requant']:.0f} by Requant, {speed['bitsandbytes']:.0f} by bitsandbytes, "
        f"{speed['Requant'] / speed['bitsandbytes']:.1f} times as many"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", *SIZES), default="small")
    parser.add_argument("--checkpoint", type=Path, help="a dense folder with its tokenizer, instead of small's")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and no gptqmodel: seconds")
    parser.add_argument("--roles", nargs="*", default=list(ROLES), choices=ROLES, metavar="ROLE")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples")
    parser.add_argument("--length", type=int, default=256, help="tokens of a calibration sample")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window that is judged")
    parser.add_argument("--draws", type=int, default=1, help="calibration draws")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each role, of which the fastest is shown")
    parser.add_argument("--folder", type=Path, help="where to write; a folder that is removed by default")
    given = parser.parse_args()
    given.sides = SIDES
    if given.smoke:
        given.model, given.samples, given.length, given.window, given.sides = "smoke", 4, 32, 64, (256, 512)
        given.roles = [role for role in given.roles if not role.startswith(("gptqmodel", "AutoAWQ"))]
    return given


def _prepare(folder: Path, given: argparse.Namespace) -> None:
    """The dense folder, and the token ids: calibration samples for each draw, and windows to judge by."""
    dense, tokens = folder / "dense", folder / "tokens"
    tokens.mkdir()
    if given.model in SIZES:
        synthetic.write(dense, "dense", SIZES[given.model], synthetic.DENSE)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(EXAMPLES / "stdlib-lm-awq" / name, dense / name)
    elif given.checkpoint:
        shutil.copytree(given.checkpoint, dense)
    else:
        source = {"source": EXAMPLES / "stdlib-lm-awq"}
        (output,) = upcast.run(Job(inputs=source, options={"dtype": "bfloat16"}, workspace=folder / "upcast"))
        output.folder.rename(dense)
    tokenizer = load_tokenizer(dense, trust_remote_code=False)
    for name, texts in runpy.run_path(str(EXAMPLES / "make_data.py"))["split"]().items():
        (folder / name).write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")
    for draw in range(given.draws):
        rows = read_rows(Data(path=str(folder / "train.jsonl")))
        samples = calibration_samples(rows, tokenizer, samples=given.samples, length=given.length, seed=draw)
        (tokens / f"{draw}.json").write_text(json.dumps(samples.tolist()))
    unseen = encode(read_rows(Data(path=str(folder / "eval.jsonl"))), tokenizer, sequence_length=given.window).items
    windows = [window.input_ids for window in unseen if len(window.input_ids) == given.window]
    (tokens / "unseen.json").write_text(json.dumps(windows[:4] if given.smoke else windows))


def _fastest(role: str, folder: Path, rounds: int) -> Result | str:
    """The fastest of several processes, since what else the machine does only ever adds; or why there is none."""
    found = [_run(role, folder, 0) for _ in range(rounds)]
    fine = [result for result in found if not isinstance(result, str)]
    return min(fine, key=lambda result: result["seconds"]) if fine else found[0]


def _run(role: str, folder: Path, draw: int) -> Result | str:
    print(f"{role}{f', draw {draw}' if draw else ''} …", file=sys.stderr)
    try:
        result: Result = child.run("quantize_roles:measured", role, folder, draw, environment=ENVIRONMENT)
    except RequantError as error:
        return str(error)
    return result


def _costs(folder: Path, given: argparse.Namespace, results: Mapping[str, Result | str]) -> Table:
    samples = json.loads((folder / "tokens" / "0.json").read_text())
    floor = results.get(FLOOR)
    table = Table(
        title=f"{given.checkpoint or given.model}: {len(samples)} samples of {given.length} tokens, groups of {GROUP}, "
        f"{os.cpu_count()} cores"
    )
    for heading in ("", "seconds", "of the floor", "peak memory", "size"):
        table.add_column(heading, justify="right" if heading else "left")
    for role, result in results.items():
        if isinstance(result, str):
            table.add_row(role, "", "", "", f"failed: {result[:60]}")
            continue
        share = f"{result['seconds'] / floor['seconds']:.2f}" if isinstance(floor, dict) else ""
        size = f"{result['size'] / 1e6:.1f} MB" if result["size"] else ""
        table.add_row(role, f"{result['seconds']:.2f}", share, f"{result['memory'] / 1e6:.0f} MB", size)
    return table


def _qualities(folder: Path, given: argparse.Namespace) -> Table:
    print("judging …", file=sys.stderr)
    child.run("quantize_roles:judge_all", folder)
    dense = Judged.load(folder / "dense.safetensors")
    drawn = f"means over {given.draws} calibration draws, " if given.draws > 1 else ""
    table = Table(title=f"{drawn}{dense.losses.numel()} tokens in {len(dense.losses)} windows of {given.window}")
    for heading in ("", "perplexity", "KL divergence", "top-1 agreement", "token loss less the rival's (95 %)"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("dense", f"{dense.losses.mean().exp():.3f}", "", "", "")
    found = {what: _of_draws(folder, given, *place) for what, place in JUDGED.items()}
    for what, judged in found.items():
        if not judged:
            continue
        rival = RIVALS[JUDGED[what][1]]
        compared = what != rival and len(found[rival]) == len(judged)
        mean, low, high = interval(judged, found[rival]) if compared else (0.0, 0.0, 0.0)
        perplexity, divergence, agreement = (
            sum(figures) / len(judged)
            for figures in zip(*((float(each.losses.double().mean().exp()), float(each.divergences.mean()),
                                  float(each.agreeing.mean())) for each in judged), strict=True)
        )  # fmt: skip
        difference = f"{mean:+.4f} ({low:+.4f} to {high:+.4f})" if compared else ""
        table.add_row(what, f"{perplexity:.3f}", f"{divergence:.4f}", f"{agreement:.2%}", difference)
    return table


def _of_draws(folder: Path, given: argparse.Namespace, role: str, name: str) -> list[Judged]:
    """One judgement of a format for each draw; NF4 by the library, which no draw changes, is run for all the same."""
    paths = [out_of(folder, role, draw) / name / "judged.safetensors" for draw in range(given.draws)]
    return [Judged.load(path) for path in paths if path.exists()]


if __name__ == "__main__":
    main()
