"""GPTQ, AWQ and compressed-tensors for every target of a recipe, from one calibration pass.

Layer after layer the pass gives weights and Gram matrices, each target rounds them, and what it packed lies in a file
of its own for each layer before the next one begins: a run that was killed goes on there. At the end the folder is made
of these files and the parent, as with any other writer.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from pipeline import progress, tensor_file
from pipeline.catalog import format_to
from pipeline.checkpoint import Checkpoint
from pipeline.digests import digest_value, file_marks
from pipeline.evaluation.load import device
from pipeline.headers import read_header
from pipeline.quantization import compressed_tensors
from pipeline.quantization.bits_auto import MixedGPTQ, chosen_in, mix, mixed_config, said_of
from pipeline.quantization.calibration import Pass, Passed, State, unasked
from pipeline.quantization.folder import Order, Written, scan, write_folder
from pipeline.quantization.rounders import AWQ, GPTQ, Rounder
from pipeline.quantization.streamed import Streamed, linears_of
from pipeline.quantization.survival import Survival, sentence
from pipeline.shards import ShardReader
from pipeline.targets import AWQTarget, CompressedTensorsTarget, GPTQTarget, grid_of, is_sequential

VERSION = 1  # raised when the same order gives other bytes
SAVE_EVERY = 30.0  # seconds between two savings of the activations, from which a killed run goes on


def rounder_of(order: Order, parent: Checkpoint, streamed: Streamed) -> Rounder | MixedGPTQ:
    """Who rounds for an order's target."""
    match order.target:
        case GPTQTarget(bits="auto"):
            return MixedGPTQ(order, streamed)
        case GPTQTarget():
            return GPTQ(order, parent, streamed)
        case AWQTarget():
            return AWQ(order, parent, streamed)
        case CompressedTensorsTarget(scheme="fp8"):
            return compressed_tensors.Floats(order, parent, streamed)
        case _:
            return compressed_tensors.SymmetricIntegers(order, parent, streamed)


def write(orders: Sequence[Order]) -> list[Written]:
    """Quantize the one parent of all orders to each of their targets.

    The same orders give the same bytes on the same kind of device, wherever an earlier run of them was killed. Sources:
    arXiv 2210.17323 (GPTQ) and 2306.00978 (AWQ). Raise what the pass and the algorithms raise, with the layer's name.
    """
    parent = orders[0].open()
    scan(parent)
    for order in orders:
        _prepare(order, parent)
    with ShardReader(parent) as reader:
        streamed = Streamed(parent, reader.__getitem__, device=device(), trust_remote_code=orders[0].trust_remote_code)
        works = [_Work(order=order, rounder=rounder_of(order, parent, streamed)) for order in orders]
        for work in works:
            if not work.order.target.calibrated:
                _round(work, streamed)
        for together in _passes([work for work in works if work.order.target.calibrated]):
            _calibrate(together, streamed)
        return [_finish(work, parent) for work in works]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """An order and who rounds for it."""

    order: Order
    rounder: Rounder | MixedGPTQ

    @property
    def sequential(self) -> bool:
        """Whether it is calibrated on its own quantized layers."""
        return is_sequential(self.order.target)

    def keep(self, passed: Passed) -> None:
        """Round a layer; what it gives lies on the disk."""
        name = f"layer-{passed.index:05d}"
        if isinstance(self.rounder, MixedGPTQ):
            for candidate in self.rounder.candidates(passed):
                self._save(f"{name}-{candidate.bits}bit", candidate.tensors, said_of(candidate))
            return
        tensors = self.rounder(passed)
        said = {module: asdict(found) for module, found in self.rounder.survivors().items()}
        self._save(name, tensors, {"survival": json.dumps(said)})

    def _save(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        tensor_file.save(self.order.scratch / "made" / f"{name}.safetensors", whole, metadata=metadata)


def _passes(works: Sequence[_Work]) -> Iterator[list[_Work]]:
    """The works that one pass serves: all that take dense inputs, and by itself each that is sequential."""
    if dense := [work for work in works if not work.sequential]:
        yield dense
    for work in works:
        if work.sequential:
            yield [work]


def _prepare(order: Order, parent: Checkpoint) -> None:
    """Make the folders; what lies in them is kept only where it was made of these files, rows and options."""
    mark = _mark(order)
    rows = [list(sample) for sample in order.calibration]
    options = order.target.model_dump(exclude={"name"})
    kept = {module: donor.folded for module, donor in order.kept.items()}
    grid = dict(order.grid_of.packed) if order.grid_of else {}
    identity = digest_value([VERSION, file_marks(parent.folder, parent.files), options, rows, kept, grid])
    if not (mark.exists() and mark.read_text(encoding="utf-8") == identity):
        shutil.rmtree(order.scratch, ignore_errors=True)
    shutil.rmtree(order.out, ignore_errors=True)
    (order.scratch / "made").mkdir(parents=True, exist_ok=True)
    mark.write_text(identity, encoding="utf-8")


def _round(work: _Work, streamed: Streamed) -> None:
    """Every layer of an order that asks nothing of the calibration rows, but those that a killed run left whole."""
    done = len(list((work.order.scratch / "made").glob("layer-*.safetensors")))
    for passed in unasked(streamed, done=done):
        work.keep(passed)
        unit = f"{work.order.target.variant} layers"
        progress.step("quantize", done=passed.index + 1, total=len(streamed.layers), unit=unit)


def _calibrate(works: list[_Work], streamed: Streamed) -> None:
    """One pass for orders that share it."""
    orders = [work.order for work in works]
    # Where the activations are, every one of these orders was, and no other: it is known by them all.
    together = digest_value([_mark(order).read_text(encoding="utf-8") for order in orders])
    spill = orders[0].scratch
    saved = spill / f"state-{together}.safetensors"
    variants = ", ".join(order.target.variant for order in orders)
    state = State.load(saved) if saved.exists() else None
    calibration = orders[0].calibration
    asked = frozenset(name for name in streamed.layers if any(_asks(order, streamed, name) for order in orders))
    first = works[0].rounder
    replaced = first.replace if works[0].sequential and not isinstance(first, MixedGPTQ) else None
    begin = partial(Pass, streamed, calibration, spill=spill, replace=replaced, asked=asked)
    going = begin(state=state)
    if not going.fits():
        state, going = None, begin()
    total = len(streamed.layers)
    since = time.monotonic()
    with closing(iter(going)) as layers:
        for passed in layers:
            for work in works:
                work.keep(passed)
            if time.monotonic() - since >= SAVE_EVERY and passed.index + 1 < total:
                passed.state().save(saved)
                since = time.monotonic()
            progress.step("quantize", done=passed.index + 1, total=total, unit=f"{variants} layers")


def _asks(order: Order, streamed: Streamed, layer: str) -> bool:
    """Whether a module of the layer is not kept."""
    names = (f"{layer}.{name}.weight" for name in linears_of(streamed.layers[layer]))
    return any(streamed.stored(name).removesuffix(".weight") not in order.kept for name in names)


def _mark(order: Order) -> Path:
    """The file that says what the files beside it were made of."""
    return order.scratch / "order.sha256"


def _finish(work: _Work, parent: Checkpoint) -> Written:
    """The folder, from the files of all layers."""
    order, target, rounder = work.order, work.order.target, work.rounder
    folder = order.scratch / "made"
    paths = sorted(folder.glob("layer-*.safetensors"))
    if isinstance(rounder, MixedGPTQ):
        bits = rounder.choose(parent, paths)
        made = _opened(folder, paths, {path: chosen_in(path, bits) for path in paths})
        written = write_folder(order, parent, made, quantization=mixed_config(rounder.target, bits))
        progress.message("quantize", mix(rounder.target, bits, written.packed_bits_per_weight))
        return written
    survivors = {module: found for path in paths for module, found in _survivors(path).items()}
    made = _opened(folder, paths)
    packed = {*format_to(target).packed_modules(made.tensors), *order.kept}
    quantization, scaled = rounder.config(packed), target.format == "awq"
    written = write_folder(order, parent, made, quantization=quantization, scaled=scaled)
    if said := sentence(target.variant, survivors, grid=grid_of(target)):
        progress.message("quantize", said)
    return replace(written, survival=survivors)


def _opened(folder: Path, paths: Sequence[Path], modules: Mapping[Path, frozenset[str]] | None = None) -> Checkpoint:
    """The tensors in the files of all layers; where `modules` are named for each file, theirs alone."""
    found = {
        name: (path.name, info)
        for path in paths
        for name, info in read_header(path).items()
        if modules is None or name.rpartition(".")[0] in modules[path]
    }
    return Checkpoint(
        path=folder, config={}, quantization=None, companions=(),
        weight_map={name: file for name, (file, _) in found.items()},
        tensors={name: info for name, (_, info) in found.items()},
    )  # fmt: skip


def _survivors(path: Path) -> dict[str, Survival]:
    """What became of a layer's changed modules."""
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["survival"])
    return {module: Survival(**found) for module, found in said.items()}
