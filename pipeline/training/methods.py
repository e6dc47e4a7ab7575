"""The methods that train through Trainer: what each makes of a loaded model, what trains in it, how it is written.

A new method is a row here, its rows in `pipeline/preflight_training.py`, and a module beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint, copy_companions
from pipeline.companions import PROJECTOR
from pipeline.model_class import class_of
from pipeline.packing import require_apart
from pipeline.training import full, head, lora, qat
from pipeline.training.model import Loaded, compute_dtype, head_names, load, open_dense
from pipeline.training.projected import write_backbone, write_projector
from pipeline.training.projector import ProjectedModel, begin
from pipeline.training.task import Task, write_config

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A model that is ready to train: it, the names of the parameters that train, and what it was loaded as."""

    model: Any
    trainable: frozenset[str]
    loaded: Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a method's output is called, how its model is readied, and how what came of it is written.

    `masters` says that the weights themselves train, which float32 keeps: an update smaller than half a step of bf16
    (1/512 of the weight) would round to nothing.
    """

    variant: str
    masters: bool
    prepare: Callable[[Loaded, Checkpoint, Options], Ready]
    write: Callable[[Any, Ready, Checkpoint, Path], None]

    def dtype(self, base: Checkpoint, device: str) -> torch.dtype:
        """What the model computes in."""
        return torch.float32 if self.masters else compute_dtype(base, device)

    def ready(self, base: Checkpoint, task: Task, options: Options, *, device: str, trust_remote_code: bool) -> Ready:
        """The model of `base`, ready to train; the same options give the same one."""
        if self.masters:
            open_dense(base)
        own = class_of(base.config, trust_remote_code=trust_remote_code) if self.variant == "projector" else None
        loaded = load(
            base, task, dtype=self.dtype(base, device), seed=options["seed"], trust_remote_code=trust_remote_code,
            model_class=own,
        )  # fmt: skip
        if options.get("packing"):
            require_apart(loaded.model)
        return self.prepare(loaded, base, options)


def _lora(loaded: Loaded, base: Checkpoint, options: Options) -> Ready:
    model, trainable = lora.attach(loaded, options["lora"], base, seed=options["seed"])
    return Ready(model=model, trainable=trainable, loaded=loaded)


def _full(loaded: Loaded, base: Checkpoint, options: Options) -> Ready:
    full.check_names(loaded, base)
    trainable = full.freeze_but(loaded.model, options.get("trainable", ()), also=loaded.new)
    return Ready(model=loaded.model, trainable=trainable, loaded=loaded)


def _qat(loaded: Loaded, base: Checkpoint, options: Options) -> Ready:
    ready = _full(loaded, base, options)
    head = () if loaded.task.language else head_names(loaded.model, loaded.new)
    qat.prepare(ready.model, options["grid"], dense={name.rpartition(".")[0] for name in head})
    return ready


def _head(loaded: Loaded, _: Checkpoint, options: Options) -> Ready:
    own, patterns = head.prepare(loaded), options.get("trainable", ())
    if patterns:
        head.unfreeze_base(loaded.model)
    trainable = full.freeze_but(loaded.model, patterns, also=own, only=True)
    return Ready(model=loaded.model, trainable=trainable, loaded=loaded)


def _projector(loaded: Loaded, _: Checkpoint, options: Options) -> Ready:
    task = loaded.task
    layer, description = begin(
        options["projector"], loaded.model.config, task=task.projected, classes=task.classes, seed=options["seed"]
    )
    model = ProjectedModel(loaded.model, description, layer=layer)
    own = frozenset(f"projector.{name}" for name, _ in model.projector.named_parameters())
    trainable = full.freeze_but(model, options.get("trainable", ()), also=own, only=True)
    return Ready(model=model, trainable=trainable, loaded=loaded)


def _write_lora(model: Any, ready: Ready, _: Checkpoint, folder: Path) -> None:
    lora.write_adapter(model, ready.loaded.task, folder)


def _write_tuned(model: Any, ready: Ready, base: Checkpoint, folder: Path) -> None:
    loaded = ready.loaded
    state = full.stored_state(model)
    full.write_tuned(state, base, folder, new=sorted(loaded.new), dropped=loaded.task.dropped)
    write_config(base, loaded.task, folder)
    copy_companions(base.path, folder, but=PROJECTOR)


def _write_head(model: Any, _: Ready, base: Checkpoint, folder: Path) -> None:
    head.write_head(folder, model, base.path)


def _write_projector(model: Any, ready: Ready, base: Checkpoint, folder: Path) -> None:
    write_projector(folder, model.projector.layer, model.description)
    inner = {name.removeprefix("backbone.") for name in ready.trainable if name.startswith("backbone.")}
    if inner:
        write_backbone(model.backbone, inner, base, folder)


METHODS: Mapping[str, Method] = {
    "lora": Method(variant="adapter", masters=False, prepare=_lora, write=_write_lora),
    "full": Method(variant="tuned", masters=True, prepare=_full, write=_write_tuned),
    "qat": Method(variant="tuned", masters=True, prepare=_qat, write=_write_tuned),
    "head": Method(variant="head", masters=False, prepare=_head, write=_write_head),
    "projector": Method(variant="projector", masters=False, prepare=_projector, write=_write_projector),
}
