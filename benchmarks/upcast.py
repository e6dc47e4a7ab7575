"""Upcast beside its rivals, to see whether reading a quantized checkpoint costs more than copying it.

For each format a synthetic Llama of half a billion parameters is written with random codes (`synthetic.py`). Then, each
in a process of its own and the fastest of several: copying the same source and output bytes, `requant upcast`'s stage,
transformers' load, dequantize and save where it has one, and gptqmodel's dequantizer where it takes the format. Shown
are seconds from file to synced file after the imports, peak anonymous memory beyond the imports, and the largest
difference from what plain formulas make of the stored bits in the first layer. It does not cover a GPU, or a disk that
is slower than memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import synthetic
import synthetic_gguf
import torch
from measuring import Work, measured
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from pipeline.child import WAITING
from pipeline.preloading import preload

SIZES = {"half": synthetic.HALF_BILLION, "two": synthetic.TWO_BILLION, "tiny": synthetic.TINY}
DEFAULT = ["nf4", "int8", "gptq", "awq", "fp8"]  # eight minutes on two cores
Result = dict[str, float]


def main() -> None:
    """Print the table; `--role` is how it calls itself for one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=DEFAULT, choices=[*synthetic.PACKERS, *synthetic_gguf.KINDS])
    parser.add_argument("--size", choices=SIZES, default="half")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; a folder that is removed by default")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        print(json.dumps(_measured(given.role, given.formats[0], given.folder, SIZES[given.size])))
        return
    table = Table(title=f"{SIZES[given.size].parameters / 1e6:.0f} M parameters → bf16, {os.cpu_count()} cores")
    for heading in ("format", "", "seconds", "of a copy", "M params/s a core", "peak memory", "largest error"):
        table.add_column(heading, justify="left" if heading in ("format", "") else "right")
    for name in given.formats:
        print(f"{name} …", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            writer = synthetic_gguf if name in synthetic_gguf.KINDS else synthetic
            writer.write(Path(folder) / "source", name, SIZES[given.size])
            results = _results(name, Path(folder), given.rounds, given.size)
            _rows(table, name, results, SIZES[given.size].parameters)
    Console(width=120).print(table)


def _results(name: str, folder: Path, rounds: int, size: str) -> dict[str, Result | str]:
    """Role → its fastest result (what else the machine does only ever adds), or why there is none."""
    results: dict[str, Result | str] = {}
    for role, (_, formats) in ROLES.items():
        if formats and name not in formats:
            continue
        # A rival that takes several times as long is timed once.
        found = [_run(role, name, folder, size) for _ in range(rounds if role in ("copy", "requant") else 1)]
        fine = [result for result in found if not isinstance(result, str)]
        results[role] = min(fine, key=lambda result: result["seconds"]) if fine else found[0]
    return results


def _rows(table: Table, name: str, results: dict[str, Result | str], parameters: int) -> None:
    copy = results["copy"]
    assert not isinstance(copy, str), copy
    for role, result in results.items():
        if isinstance(result, str):
            table.add_row("", role, "", "", "", "", f"failed: {result}")
            continue
        seconds = result["seconds"]
        speed = "" if role == "copy" else f"{parameters / seconds / 1e6 / (os.cpu_count() or 1):.0f}"
        error = "" if role == "copy" else f"{result['error']:.1e}"
        table.add_row(
            name if role == "copy" else "", role, f"{seconds:.2f}", f"{seconds / copy['seconds']:.2f}", speed,
            f"{result['memory'] / 1e6:.0f} MB", error,
        )  # fmt: skip
    table.add_section()


def _run(role: str, name: str, folder: Path, size: str) -> Result | str:
    command = [sys.executable, __file__, "--role", role, "--folder", str(folder), "--formats", name, "--size", size]
    # Every role waits as Requant's own child processes do; the libraries' warnings are of no use here.
    settings = {**WAITING, **os.environ, "GPTQMODEL_CPU_WORKERS": "2", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1][:60]
    result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _measured(role: str, name: str, folder: Path, size: synthetic.Size) -> Result:
    source, out = folder / "source", folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for module in preload("llama"):
        importlib.import_module(module)
    work = ROLES[role][0](source, out, size)
    result = measured(lambda: work)
    return {**result, "error": 0.0 if role == "copy" else _error(name, source, out)}


def _copy(source: Path, out: Path, size: synthetic.Size) -> Work:
    """Read every source byte, and write as many as the dense model has."""
    block = os.urandom(1 << 24)

    def work() -> None:
        total = 0
        for path in source.iterdir():
            shutil.copyfile(path, out / path.name)
            total += path.stat().st_size
        with (out / "rest").open("wb") as file:
            left = size.parameters * 2 - total
            while left > 0:
                left -= file.write(block[: min(left, len(block))])

    return work


def _requant(source: Path, out: Path, _: synthetic.Size) -> Work:
    from pipeline.jobs import Job
    from pipeline.stages import upcast

    if (source / "model.gguf").exists():
        importlib.import_module("pipeline.upcasting.gguf")

    def work() -> None:
        for _ in upcast.run(Job(inputs={"source": source}, options={"dtype": "bfloat16"}, workspace=out)):
            pass

    return work


def _transformers(source: Path, out: Path, _: synthetic.Size) -> Work:
    import transformers

    if (source / "model.gguf").exists():

        def work_on_gguf() -> None:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, gguf_file="model.gguf", dtype=torch.bfloat16
            )
            model.save_pretrained(out)

        return work_on_gguf
    method = json.loads((source / "config.json").read_text())["quantization_config"]["quant_method"]
    config = {
        "fp8": lambda: transformers.FineGrainedFP8Config(dequantize=True),
        "compressed-tensors": lambda: transformers.CompressedTensorsConfig(run_compressed=False),
    }.get(method)
    importlib.import_module(
        f"transformers.integrations.{'bitsandbytes' if method == 'bitsandbytes' else 'hub_kernels'}"
    )

    def work() -> None:
        more = {"quantization_config": config()} if config else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **more)
        if method == "bitsandbytes":
            model = model.dequantize()
        model.save_pretrained(out, save_original_format=False)

    return work


def _gptqmodel(source: Path, out: Path, _: synthetic.Size) -> Work:
    from gptqmodel.utils.model_dequant import dequantize_model

    def work() -> None:
        dequantize_model(source, out / "model", target_dtype=torch.bfloat16, device="cpu")

    return work


ROLES: dict[str, tuple[Callable[[Path, Path, synthetic.Size], Work], tuple[str, ...]]] = {
    "copy": (_copy, ()),
    "requant": (_requant, ()),
    "transformers": (_transformers, ("nf4", "int8", "fp8", "compressed-tensors int4", *synthetic_gguf.KINDS)),
    "gptqmodel": (_gptqmodel, ("gptq", "gptq desc_act", "gptq 3 bits", "awq", "fp8")),
}


def _error(name: str, source: Path, out: Path) -> float:
    """The largest difference from the truth in the first layer's linear layers."""
    written: dict[str, torch.Tensor] = {}
    for shard in out.rglob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            written |= {key: file.get_tensor(key) for key in file.keys() if ".layers.0." in key}  # noqa: SIM118 - a handle, no dict
    if name in synthetic_gguf.KINDS:
        pairs = [(written[key].float(), weight) for key, weight in synthetic_gguf.truth(source / "model.gguf").items()]
        return max(float((found - weight.bfloat16().float()).abs().max()) for found, weight in pairs)
    worst = 0.0
    with safe_open(source / "model.safetensors", framework="pt") as file:
        names = [key for key in file.keys() if ".layers.0." in key and "norm" not in key]  # noqa: SIM118 - a handle, no dict
        for module in sorted({".".join(key.split(".")[:5]) for key in names}):
            parts = {key.removeprefix(f"{module}."): file.get_tensor(key) for key in names if key.startswith(module)}
            expected = synthetic.truth(name, parts).bfloat16().float()
            worst = max(worst, float((written[f"{module}.weight"].float() - expected).abs().max()))
    return worst


if __name__ == "__main__":
    main()
