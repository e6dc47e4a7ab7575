"""What `quantize.py` measures, each role for a process of its own: an import, then the work."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Work
from quality import answers, judge, loaded
from torch import nn

from pipeline.formats import bnb_4bit_pack
from pipeline.quantization import autoawq, bitsandbytes, engine, gptqmodel
from pipeline.quantization.calibration import batches_of
from pipeline.quantization.folder import Order
from pipeline.targets import Target, parse_target

GROUP = 128
TARGETS = {"GPTQ": f"gptq:bits=4,group_size={GROUP}", "AWQ": f"awq:group_size={GROUP}", "NF4": "nf4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A dense folder, calibration samples of one length as token ids, and the folder for what comes out."""

    dense: Path
    samples: tuple[tuple[int, ...], ...]
    out: Path
    seed: int

    def order(self, name: str, *, by: str = "") -> Order:
        """The order of a format of TARGETS, which an engine that is not Requant's own fulfils where one is named."""
        target: Target = parse_target(TARGETS[name] + (f",engine={by}" if by else ""))
        return Order(
            dense=self.dense, out=self.out / name, scratch=self.out / f"{name}.scratch", target=target,
            calibration=self.samples if target.calibrated else (), seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """`prepare` gives what is timed; `imports` are behind it by then, and `formats` what it leaves in folders."""

    prepare: Callable[[Case], Work]
    formats: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()


def _floor(case: Case) -> Work:
    """The dense model whole in memory, read before the clock runs, and each distinct input's product with itself."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(case.dense, dtype=torch.float32).eval().get_decoder()
    grams: dict[str, torch.Tensor] = {}
    last: list[torch.Tensor] = []

    def hear(name: str, given: torch.Tensor) -> None:
        if last and last[0] is given:
            return  # the linear layer before was given the same tensor
        last[:] = [given]
        rows = given.reshape(-1, given.shape[-1])
        product = rows.T @ rows
        grams[name] = grams[name].add_(product) if name in grams else product

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given, name=name: hear(name, given[0]))

    @torch.inference_mode()
    def work() -> None:
        for batch in batches_of(case.samples):
            model(**batch, use_cache=False)

    return work


def _requant(*names: str) -> Callable[[Case], Work]:
    def prepare(case: Case) -> Work:
        calibrated = [case.order(name) for name in names if name != "NF4"]
        rest = [case.order(name) for name in names if name == "NF4"]

        def work() -> None:
            if calibrated:
                engine.write(calibrated)
            for order in rest:
                bitsandbytes.write(order)

        return work

    return prepare


def _library(name: str, by: str) -> Callable[[Case], Work]:
    write = {"gptqmodel": gptqmodel.write, "autoawq": autoawq.write}[by]

    def prepare(case: Case) -> Work:
        def work() -> None:
            write(case.order(name, by=by))

        return work

    return prepare


def _transformers(case: Case) -> Work:
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip

    def work() -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            case.dense, quantization_config=config, dtype="auto", device_map="cpu"
        )
        model.save_pretrained(case.out / "NF4")

    return work


_BITSANDBYTES = ("bitsandbytes", "transformers.integrations.bitsandbytes", "transformers.quantizers.quantizer_bnb_4bit")
# What it imports while it works, though it is no work of quantizing.
_GPTQMODEL = ("gptqmodel", "gptqmodel.eora", "gptqmodel.looper.module_looper", "gptqmodel.looper.gptq_processor",
              "gptqmodel.looper.awq_processor", "gptqmodel.looper.dequantize_processor", "peft")  # fmt: skip
AUTOAWQ = "AutoAWQ: AWQ"  # where it is installed
FLOOR, TOGETHER = "a calibration forward and its Gram products", "Requant: GPTQ, AWQ and NF4 together"
ROLES: dict[str, Role] = {
    FLOOR: Role(prepare=_floor),
    TOGETHER: Role(prepare=_requant(*TARGETS), formats=tuple(TARGETS)),
    **{f"Requant: {name}": Role(prepare=_requant(name), formats=(name,)) for name in TARGETS},
    **{f"gptqmodel: {name}": Role(prepare=_library(name, "gptqmodel"), formats=(name,), imports=_GPTQMODEL)
       for name in ("GPTQ", "AWQ")},
    **({AUTOAWQ: Role(prepare=_library("AWQ", "autoawq"), formats=("AWQ",), imports=("awq",))}
       if importlib.util.find_spec("awq") else {}),
    "bitsandbytes: NF4": Role(prepare=_transformers, formats=("NF4",), imports=_BITSANDBYTES),
}  # fmt: skip
# Which role's folder of a format each is compared with.
RIVALS = {"GPTQ": "gptqmodel: GPTQ", "AWQ": "gptqmodel: AWQ", "NF4": "bitsandbytes: NF4"}
# What is judged → the role and the format whose folder that is. What Requant makes alone is what it makes together.
JUDGED = {f"Requant: {name}": (TOGETHER, name) for name in TARGETS} | {rival: (rival, name)
                                                                       for name, rival in RIVALS.items()}  # fmt: skip
JUDGED |= {AUTOAWQ: (AUTOAWQ, "AWQ")} if AUTOAWQ in ROLES else {}


def nf4_speed(rows: int, columns: int) -> dict[str, float]:
    """Millions of bfloat16 weights [rows, columns] in a second, as NF4 with double quantization: the best of three."""
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    ways: dict[str, Callable[[], Any]] = {
        "Requant": lambda: bnb_4bit_pack.pack(weight, kind="nf4", double_quant=True),
        "bitsandbytes": lambda: quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):
        for way, work in ways.items():
            started = time.perf_counter()
            work()
            seconds[way].append(time.perf_counter() - started)
    return {way: weight.numel() / min(found) / 1e6 for way, found in seconds.items()}


def measured(role: str, folder: Path, draw: int) -> dict[str, float]:
    """Seconds, peak bytes of memory and bytes of weights of a role, on `folder`'s dense model and tokens of a draw."""
    samples = json.loads((folder / "tokens" / f"{draw}.json").read_text())
    out = out_of(folder, role, draw)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    case = Case(dense=folder / "dense", samples=tuple(map(tuple, samples)), out=out, seed=draw)
    for module in ROLES[role].imports:
        importlib.import_module(module)
    result = measuring.measured(lambda: ROLES[role].prepare(case))
    for path in out.glob("*.scratch"):
        shutil.rmtree(path)
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    return {**result, "size": size}


def judge_all(folder: Path) -> None:
    """Judge every folder of JUDGED that was made, of every draw, beside the dense model."""
    windows = torch.tensor(json.loads((folder / "tokens" / "unseen.json").read_text()))
    model = loaded(folder / "dense")
    dense = list(answers(model, windows))
    judge(dense, model, windows).save(folder / "dense.safetensors")
    for draws in (folder / "out").iterdir():
        for role, name in JUDGED.values():
            made = out_of(folder, role, int(draws.name)) / name
            if (made / "config.json").exists():
                judge(dense, loaded(made), windows).save(made / "judged.safetensors")


def out_of(folder: Path, role: str, draw: int) -> Path:
    """Where a role leaves what it makes of a calibration draw: a folder for each format."""
    return folder / "out" / str(draw) / role.replace(": ", "-").replace(" ", "-")
