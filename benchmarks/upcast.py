"""Upcast beside its rivals, to see whether reading a quantized checkpoint costs more than copying it.

A synthetic Llama is quantized to NF4 by bitsandbytes. Then, each in a process of its own: copying the same source and
output bytes with a sync, `requant upcast`'s stage, and transformers' load, dequantize and save. Shown are seconds from
file to file after the imports, peak anonymous memory beyond the imports, and the largest difference from what
bitsandbytes computes from the stored bytes. It does not cover other formats, several shards, or a GPU.
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
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from pipeline.child import WAITING
from pipeline.execute import preload

HIDDEN, INTERMEDIATE, VOCABULARY = 1024, 2816, 16384
ROUNDS = 3  # of which each role's fastest is shown: what else the machine does only ever adds


def main() -> None:
    """Print the table; `--role` is how it calls itself for one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--role", choices=[*ROLES, "make"])
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.role:
        role = ROLES.get(given.role)
        print(json.dumps(_measured(role, given.folder) if role else _make(given.folder, given.layers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        made = _run("make", Path(folder), given.layers)
        rounds = [{role: _run(role, Path(folder), given.layers) for role in ROLES} for _ in range(ROUNDS)]
        _show(
            {role: min((round_[role] for round_ in rounds), key=lambda result: result["seconds"]) for role in ROLES},
            made,
        )


def _show(results: dict[str, dict[str, float]], made: dict[str, float]) -> None:
    source, dense = made["source_bytes"] / 1e6, made["dense_bytes"] / 1e6
    table = Table(title=f"NF4 → bf16, {made['parameters'] / 1e6:.0f} M parameters, {source:.0f} MB → {dense:.0f} MB")
    for heading in ("", "seconds", "of a copy", "peak memory beyond imports", "largest error"):
        table.add_column(heading, justify="right" if heading else "left")
    for role, result in results.items():
        error = "" if role == "copy" else f"{result['error']:.2e}"
        ratio = result["seconds"] / results["copy"]["seconds"]
        table.add_row(role, f"{result['seconds']:.2f}", f"{ratio:.2f}", f"{result['memory'] / 1e6:.0f} MB", error)
    Console(width=110).print(table)


def _run(role: str, folder: Path, layers: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--role", role, "--folder", str(folder), "--layers", str(layers)]
    # Every role waits as Requant's own child processes do; the libraries' warnings are of no use here.
    done = subprocess.run(command, env={**WAITING, **os.environ}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{role}: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _make(folder: Path, layers: int) -> dict[str, float]:
    """Write `folder/source`, a random Llama in NF4."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, vocab_size=VOCABULARY, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(folder / "dense")
    quantized = AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    )
    quantized.save_pretrained(folder / "source")
    dense = sum(path.stat().st_size for path in (folder / "dense").iterdir())
    source = sum(path.stat().st_size for path in (folder / "source").iterdir())
    shutil.rmtree(folder / "dense")
    return {"parameters": parameters, "dense_bytes": dense, "source_bytes": source}


def _measured(role: Callable[[Path, Path], Callable[[], None]], folder: Path) -> dict[str, float]:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for module in (*preload("llama"), "bitsandbytes", "transformers.integrations.bitsandbytes"):
        importlib.import_module(module)
    work = role(folder / "source", out)
    before, peak, done = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous() - before)

    os.sync()  # what was written before is not this role's
    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    work()
    os.sync()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {"seconds": seconds, "memory": peak[0], "error": _error(folder / "source", out)}


def _copy(source: Path, out: Path) -> Callable[[], None]:
    """Read every source byte, and write as many as the dense model has."""
    parameters = sum(weight.numel() for _, weight in _truth(source, shapes_only=True))
    block = os.urandom(1 << 24)

    def work() -> None:
        total = 0
        for path in source.iterdir():
            shutil.copyfile(path, out / path.name)
            total += path.stat().st_size
        with (out / "rest").open("wb") as file:
            left = parameters * 2 - total
            while left > 0:
                left -= file.write(block[: min(left, len(block))])

    return work


def _requant(source: Path, out: Path) -> Callable[[], None]:
    from pipeline.stages import Job, upcast

    def work() -> None:
        job = Job(inputs={"source": source}, options={"dtype": "bfloat16"}, workspace=out)
        for _ in upcast.run(job):
            pass

    return work


def _transformers(source: Path, out: Path) -> Callable[[], None]:
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).dequantize()
        model.save_pretrained(out, save_original_format=False)

    return work


ROLES = {"copy": _copy, "requant": _requant, "transformers": _transformers}


def _truth(source: Path, *, shapes_only: bool = False) -> list[tuple[str, torch.Tensor]]:
    """Every weight as bitsandbytes dequantizes the stored bytes (or empty tensors of their shapes)."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    found = []
    with safe_open(source / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        for name in sorted(names):
            if any(part in name for part in (".absmax", ".quant_map", ".nested_", ".quant_state")):
                continue
            tensor = file.get_tensor(name)
            parts = {other: file.get_tensor(other) for other in names if other.startswith(f"{name}.")}
            if parts:
                state = QuantState.from_dict(dict(parts), device=torch.device("cpu"))
                tensor = torch.empty(state.shape, device="meta") if shapes_only else dequantize_4bit(tensor, state)
            found.append((name, tensor))
    return found


def _error(source: Path, out: Path) -> float:
    shards = [path for folder in (out, out / "out") for path in folder.glob("*.safetensors")]
    written: dict[str, torch.Tensor] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            written |= {name: file.get_tensor(name) for name in list(file.keys())}
    if "model.layers.0.mlp.up_proj.weight.absmax" in written:  # the copy
        return 0.0
    return max(float((written[name].float() - weight.float()).abs().max()) for name, weight in _truth(source))


def _anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status names no RssAnon")


if __name__ == "__main__":
    main()
