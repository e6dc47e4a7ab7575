"""Whether a written folder is the model that was meant, as its users load it: asked in a fresh process before a commit.

Three questions, each of which names the module that is wrong. Are the tensors on the disk those that were handed over
(to the bit)? Does each packed module, as transformers' kernels compute it, give what the weights give that this
project's reader has (on a few random rows)? Does the whole model say what these weights say, in float32?
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline import pairing
from pipeline.catalog import format_of
from pipeline.cgroup import memory_left
from pipeline.checkpoint import Checkpoint, inside, language_of, read_json
from pipeline.digests import digest_tensors
from pipeline.errors import InputError, NonFinite, ReloadMismatch
from pipeline.evaluation.load import load_model
from pipeline.evaluation.rounding import rounded
from pipeline.model_class import class_of, lacks
from pipeline.quantization.meant import Meant, answer_of, meant_by
from pipeline.quantization.reload_bounds import BOUNDS, FLOOR, MARGIN, Bound
from pipeline.quantization.reloaded import Reload, Reloaded
from pipeline.sizes import dense_sizes

ROWS = 8  # that each packed module is given
MOST_TOKENS = 128  # that the model is given
_AGAIN = "run again; if it stays so, choose another target, and report it with what requant doctor prints"


def check(reloads: Sequence[Reload]) -> list[Reloaded | ReloadMismatch]:
    """Check folders one after the other, in this process; a folder that is not what was meant gives the error.

    An error names the folder's variant and the module, and what was found.
    """
    return [_answered(one) for one in reloads]


def _answered(one: Reload) -> Reloaded | ReloadMismatch:
    try:
        return _check(one)
    except (InputError, NonFinite, ReloadMismatch) as error:
        return ReloadMismatch(f"{one.variant}: {error}")


def _check(one: Reload) -> Reloaded:
    started = time.monotonic()
    checkpoint = Checkpoint.open(one.folder)
    _compare_files(one, checkpoint)
    if pairing.is_projected(one.folder):
        pairing.check(one.folder)
    if left_out := _too_large(checkpoint):
        return Reloaded(seconds=time.monotonic() - started, left_out=left_out)
    bound = BOUNDS[format_of(checkpoint.quantization).name]
    with meant_by(one.folder, trust_remote_code=one.trust_remote_code) as meant:
        config = read_json(one.folder / "config.json")
        model_class = class_of(config, trust_remote_code=one.trust_remote_code)
        given = _given(one, config, model_class)
        loaded = _load(one, model_class, meant, given)
        module, furthest = _compare_modules(loaded, meant, bound)
        deviation, limit = _compare_answers(loaded, meant, given, bound)
    return Reloaded(
        modules=len(meant.packed),
        module=module,
        module_deviation=furthest,
        deviation=deviation,
        bound=limit,
        seconds=time.monotonic() - started,
    )


def _compare_files(one: Reload, checkpoint: Checkpoint) -> None:
    """Raise ReloadMismatch where a tensor on the disk is not the one that was handed over."""
    found = digest_tensors(
        {name: (inside(checkpoint.folder, checkpoint.weight_map[name]), info)
         for name, info in checkpoint.tensors.items()}
    )  # fmt: skip
    for name in sorted(found.keys() | one.digests.keys()):
        if found.get(name) != one.digests.get(name):
            said = "is not on the disk" if name not in found else "was never written" if name not in one.digests else (
                "is not on the disk as it was written")  # fmt: skip
            raise ReloadMismatch(f"{name}: {said}; the disk or whoever changed the folder is at fault, {_AGAIN}")


def _too_large(checkpoint: Checkpoint) -> str:
    """That a model, as it is loaded, does not fit the memory that is left; or nothing where it does."""
    sizes = dense_sizes(checkpoint, format_of(checkpoint.quantization))
    loaded = sizes.dense_bytes("float32") if checkpoint.is_gguf else checkpoint.nbytes
    left = memory_left()
    if loaded <= left:
        return ""
    return f"was not loaded: its {loaded / 1e9:.1f} GB do not fit the {left / 1e9:.1f} GB of memory that are left"


def _given(one: Reload, config: Mapping[str, Any], model_class: Any) -> dict[str, Tensor]:
    """What the model is asked, of one row; nothing where it takes no tokens."""
    if lacks(model_class) == "takes no token ids":
        return {}
    said = language_of(config)
    longest = said.get("max_position_embeddings") or said.get("n_positions") or MOST_TOKENS
    count = min(MOST_TOKENS, max(1, int(longest) - 2))  # RoBERTa's kin count two positions that no token has
    drawn = torch.randint(int(said["vocab_size"]), (count,), generator=torch.Generator().manual_seed(0))
    tokens = (torch.tensor(one.tokens[:count]) if one.tokens else drawn)[None]
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if said.get("is_encoder_decoder") else {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """What was asked of the loaded model, which is gone: its modules' outputs, its answer, and what is kept of it."""

    dtype: torch.dtype
    outputs: Mapping[str, Tensor]
    answer: Tensor | None
    joined: Mapping[str, Tensor]


@torch.no_grad()
def _load(one: Reload, model_class: Any, meant: Meant, given: Mapping[str, Tensor]) -> _Loaded:
    """Load the model as its users do and ask it; raise ReloadMismatch where other modules are packed than meant."""
    with _loading():
        model = load_model(one.folder, model_class=model_class, trust_remote_code=one.trust_remote_code)
        _unpack(model)
        _check_classes(model, meant)
        parameters = dict(model.named_parameters())
        return _Loaded(
            dtype=model.dtype,
            outputs={name: _output(model.get_submodule(name), meant, name, model) for name in meant.multiplied},
            answer=answer_of(model(**{name: row.to(model.device) for name, row in given.items()})) if given else None,
            joined={name: parameters[name].detach() for name in meant.joined if name in parameters},
        )


def _unpack(model: nn.Module) -> None:
    """Do at once what a library puts off until the first forward pass: compressed-tensors has no weights before."""
    for hook in [*model._forward_pre_hooks.values()]:  # noqa: SLF001 - torch has no other way to call them alone
        hook(model, ())


@contextmanager
def _loading() -> Iterator[None]:
    """Tell whatever a library raises as a model that does not reload."""
    try:
        yield
    except (InputError, ReloadMismatch, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a quantizer may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ReloadMismatch(f"transformers cannot load and run what was written ({reason}); {_AGAIN}") from error


def _check_classes(model: Any, meant: Meant) -> None:
    """Raise ReloadMismatch unless the library's own modules are exactly those that are packed."""
    linear = {name: kind for name, kind in meant.classes.items() if issubclass(kind, nn.Linear | Conv1D)}
    replaced = {name for name, kind in linear.items() if _is_packed(model.get_submodule(name), kind)}
    packed = set() if meant.loads_dense else set(meant.multiplied)
    if not meant.packed:
        raise ReloadMismatch("none of its modules is packed: transformers quantizes no layer of this architecture")
    for name in sorted(packed ^ replaced):
        kind = type(model.get_submodule(name)).__name__
        said = "is packed, but was loaded as a dense" if name in packed else "is stored dense, but was loaded as a"
        raise ReloadMismatch(
            f"{name}: {said} {kind} ({len(packed & replaced)} of {len(packed)} packed modules are the library's own); "
            f"{_AGAIN}"
        )


def _is_packed(module: nn.Module, dense: type[nn.Module]) -> bool:
    """Whether a library made it: of a class of its own, or a linear one that it has marked (compressed-tensors)."""
    return type(module) is not dense or hasattr(module, "quantization_scheme")


def _output(module: nn.Module, meant: Meant, name: str, model: Any) -> Tensor:
    """float32 [ROWS, O] of a packed module's kernel, for the rows that it is given."""
    # A batch of one: compressed-tensors takes the rows of a matrix for one token, and gives them one scale.
    found: Tensor = module(_probe(meant, name)[None].to(model.device, model.dtype))
    return found[0].float().cpu()


def _probe(meant: Meant, module: str) -> Tensor:
    """float32 [ROWS, I], the same each time: a standard normal, within what bfloat16 and float16 hold."""
    drawn = torch.randn(ROWS, meant.inputs(module), generator=torch.Generator().manual_seed(0))
    return drawn.to(torch.bfloat16).float().clamp(-4, 4)


def _compare_modules(loaded: _Loaded, meant: Meant, bound: Bound) -> tuple[str, float]:
    """The module that deviates most, and by how much; raise ReloadMismatch where that is beyond its bound."""
    found = {name: deviation(output, meant, name) for name, output in loaded.outputs.items()}
    name = max(found, key=lambda name: (found[name] != found[name], found[name]), default="")
    furthest, limit = found.get(name, 0.0), bound.of(loaded.dtype)
    if not furthest <= limit:  # also where it is NaN
        raise ReloadMismatch(
            f"{name}: gives outputs that are off by {furthest:.3g} of their size from those of its weights, more than "
            f"the {limit:.3g} that its kernel's arithmetic explains; {_AGAIN}"
        )
    return name, furthest


def deviation(output: Tensor, meant: Meant, module: str) -> float:
    """By how much of its size the output of `module` that is furthest from its weights' is off.

    The size is what a random row gives on average with an output's own weights, and its bias: a single wrong output is
    seen in a wide module, and one whose products happen to cancel is no false alarm.
    """
    rows = rounded(_probe(meant, module), meant.activations)
    weight, bias = meant.weight(module), meant.bias(module)
    expected = nn.functional.linear(rows, weight, bias)
    size = rows.norm() / weight.shape[1] ** 0.5 * weight.norm(dim=1)
    if bias is not None:
        size += ROWS**0.5 * bias.abs()
    off = (output - expected).norm(dim=0)
    return float(torch.where(off == 0, 0.0, off / size).max())


def _compare_answers(
    loaded: _Loaded, meant: Meant, given: Mapping[str, Tensor], bound: Bound
) -> tuple[float | None, float]:
    """How far the model's answer is from that of the weights, and how far it may be; raise ReloadMismatch beyond it."""
    if loaded.answer is None:
        return None, 0.0
    exact = meant.answer(given, loaded.joined)
    coarse = meant.answer(given, loaded.joined, computes=bound.computes(loaded.dtype))
    found, limit = distance(loaded.answer, exact), MARGIN * distance(coarse, exact) + FLOOR
    if not found <= limit:  # also where it is NaN
        raise ReloadMismatch(
            f"the reloaded model's answer is off by {found:.3g} of its size from that of its weights in float32, more "
            f"than the {limit:.3g} that rounding explains, though each packed module by itself gives what it should; "
            f"{_AGAIN}"
        )
    return found, limit


def distance(found: Tensor, exact: Tensor) -> float:
    """The middle one of all tokens' relative distances: rounding may send a few to another expert."""
    apart = (found - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(apart.median())
