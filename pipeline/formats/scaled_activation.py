"""AWQ's scaled activations: scales that a dense model has no place for, folded into the layer that they belong to.

Where an activation has no weight to fold its scales into, AutoAWQ divides its output by them and stores them as
`<activation>.scales`, float [I] (modules/act.py `ScaledActivation`; transformers, integrations/awq.py, knows the same
architectures). The linear layer that takes the output was quantized times the scales, so its dense weight is
W[:, i] / scales[i].
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.errors import UnsupportedFormat

# What feeds the activation in those architectures (transformers, integrations/awq.py AWQ_SCALES_MAPPINGS).
BEFORE = frozenset({"c_fc", "dense_h_to_4h", "up_proj", "fc_in"})


def consumer(model: nn.Module, name: str, *, count: int) -> str:
    """The linear layer that takes the output of the activation whose `count` scales are the tensor `name`.

    It is the activation's only sibling with `count` inputs that does not feed it. `model` may be on the meta device.
    Raise UnsupportedFormat where there is none, or more than one.
    """
    activation = name.removesuffix(".scales")
    parent, _, own = activation.rpartition(".")
    try:
        siblings = dict(model.get_submodule(parent).named_children())
    except AttributeError:
        siblings = {}
    if own not in siblings or isinstance(siblings[own], nn.Linear):
        raise UnsupportedFormat(
            f"{name}: the architecture has no activation {activation} that these scales could belong to; "
            "load it with the library that wrote it"
        )
    found = [
        child
        for child, module in siblings.items()
        if isinstance(module, nn.Linear) and module.in_features == count and child not in BEFORE
    ]
    if len(found) != 1:
        layers = " and ".join(found) or "none"
        raise UnsupportedFormat(
            f"{name}: expected one layer beside it that takes its {count} values, found {layers}; "
            "load it with the library that wrote it"
        )
    return f"{parent}.{found[0]}" if parent else found[0]


def fold(weight: Tensor, scales: Tensor) -> Tensor:
    """`weight` [R, I] as float32, each column divided by its scale [I]."""
    return weight.float() / scales.float()
