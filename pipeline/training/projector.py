"""A projector: a small layer, float32, on pooled features of a backbone; and the two together as a model.

The backbone is the base model, without its output head. Nothing of it trains unless someone says so of single weights
afterwards; it then stays in evaluation mode and runs without gradients, whatever `train()` is called with.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from pipeline.errors import RecipeError, UnsupportedFormat
from pipeline.pairing import Description
from pipeline.sections import Projector, ProjectorTask
from pipeline.training.pooling import POOLINGS

TEMPERATURE = 0.05  # of the contrastive loss on normalized vectors; sentence-transformers' scale of 20


def describe(
    section: Projector, *, in_features: int, task: ProjectorTask, classes: tuple[str, ...] | None
) -> Description:
    """What the recipe's `train.projector` comes to on features of `in_features` values.

    Raise RecipeError where `out_features` does not fit the task.
    """
    wanted = {"classification": len(classes or ()), "regression": 1, "pairs": in_features}[task]
    given = section.out_features
    if given is not None and (given < wanted if task == "classification" else task == "regression" and given != 1):
        raise RecipeError(
            f"train.projector: out_features is {given}, but the rows want {wanted} for {task}; leave it out"
        )
    return Description(
        kind=section.kind,
        pooling=section.pooling,
        in_features=in_features,
        hidden_features=(section.hidden_features or in_features) if section.kind == "mlp" else None,
        out_features=given or wanted,
        task=task,
        classes=classes,
    )


class ProjectorLayer(nn.Module):
    """One matrix and a bias, or two with GELU between: features [B, in] → float32 [B, out].

    Begins as torch's linear layers do, from `seed` alone.
    """

    def __init__(self, description: Description, *, seed: int = 0) -> None:
        super().__init__()
        wide = description.hidden_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = None if wide is None else nn.Linear(description.in_features, wide, dtype=torch.float32)
            self.output = nn.Linear(wide or description.in_features, description.out_features, dtype=torch.float32)

    def forward(self, features: Tensor) -> Tensor:
        """What the projector makes of features, in float32."""
        features = features.to(torch.float32)
        if self.hidden is not None:
            features = functional.gelu(self.hidden(features))
        out: Tensor = self.output(features)
        return out


def begin(
    section: Mapping[str, Any], config: Any, *, task: ProjectorTask, classes: tuple[str, ...] | None, seed: int
) -> tuple[ProjectorLayer, Description]:
    """A new projector by the recipe's `train.projector`, for a backbone of that config; the same seed, the same one."""
    parsed = Projector.model_validate(section)
    description = describe(parsed, in_features=width_of(config) or 0, task=task, classes=classes)
    return ProjectorLayer(description, seed=seed), description


class FeatureProjector(nn.Module):
    """A projector with its task's loss, on features: what the loop on cached features trains."""

    def __init__(self, layer: ProjectorLayer, task: ProjectorTask) -> None:
        super().__init__()
        self.layer = layer
        self.task = task

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        positive: Tensor | None = None,
        negative: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Loss and logits: cross-entropy on class numbers, mean squared error on numbers, or `contrastive`.

        For pairs `features` are the anchors' [B, in], `positive` [B, in], `negative` [M, in] or none; the logits are
        then the similarities that the loss is made of, and the label of row i is i.
        """
        logits = self.layer(features)
        if positive is not None:
            others = positive if negative is None else torch.cat([positive, negative])
            similar, loss = contrastive(logits, self.layer(others))
            return SequenceClassifierOutput(loss=loss, logits=similar)
        return SequenceClassifierOutput(loss=None if labels is None else self._loss(logits, labels), logits=logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        if self.task == "classification":
            return functional.cross_entropy(logits, labels)
        return functional.mse_loss(logits.squeeze(-1), labels.to(torch.float32)) if self.task == "regression" else None


def contrastive(anchors: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities [B, N] of normalized vectors over TEMPERATURE, and InfoNCE (van den Oord 2018) of them.

    Row i's positive is `others[i]`; all the others are its negatives.
    """
    similar = functional.normalize(anchors, dim=-1) @ functional.normalize(others, dim=-1).T / TEMPERATURE
    return similar, functional.cross_entropy(similar, torch.arange(len(anchors), device=anchors.device))


def base_of(model: Any) -> Any:
    """The model below a head: what gives hidden states; raise UnsupportedFormat where it would give none."""
    base = getattr(model, "base_model", model)
    config = getattr(base, "config", None)
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedFormat(
            f"{name}: is an encoder with a decoder, which gives no single row of hidden states; take a decoder-only or "
            "an encoder-only model for a projector"
        )
    if "input_ids" not in inspect.signature(base.forward).parameters or width_of(config) is None:
        raise UnsupportedFormat(
            f"{name}: gives no hidden states of a stated size for token ids; take a text model for a projector"
        )
    return base


def width_of(config: Any) -> int | None:
    """Values in a hidden state by a model's config, or None where it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(text, "hidden_size", None)
    return width if isinstance(width, int) else None


def hidden_states(base: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The last layer's hidden states [B, T, H] of a base model; raise UnsupportedFormat where it returns none."""
    more: dict[str, Any] = {}
    if "use_cache" in inspect.signature(base.forward).parameters:
        more["use_cache"] = False  # keys and values for tokens that will never follow
    output = base(input_ids=input_ids, attention_mask=attention_mask, **more)
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:  # noqa: PLR2004 - rows, tokens, values
        raise UnsupportedFormat(
            f"{type(base).__name__}: returns no last_hidden_state of rows, tokens and values; "
            "take another model for a projector"
        )
    return hidden


class ProjectedModel(nn.Module):
    """A backbone and its projector as one model, for transformers' Trainer and for use.

    Of a quantized backbone it says `is_quantized`, so that Trainer's own guard sees what it would train. Its state is
    what trains: a checkpoint does not repeat the backbone.
    """

    _keys_to_ignore_on_save = None  # Trainer asks for it when it resumes

    def __init__(self, model: Any, description: Description, *, layer: ProjectorLayer | None = None) -> None:
        super().__init__()
        self.backbone = base_of(model)
        self.backbone.requires_grad_(False)  # noqa: FBT003 - torch's own signature
        self.projector = FeatureProjector(layer or ProjectorLayer(description), description.task)
        self.projector.to(next(self.backbone.parameters()).device)
        self.description = description
        self.config = self.backbone.config
        self.is_quantized = bool(getattr(model, "is_quantized", False))
        self.hf_quantizer = getattr(model, "hf_quantizer", None)
        if (width := width_of(self.config)) != description.in_features:
            raise UnsupportedFormat(
                f"projector: takes {description.in_features} values, the backbone's hidden states have {width}; "
                "take the backbone that it was trained on"
            )
        self.register_state_dict_post_hook(_only_what_trains)  # type: ignore[no-untyped-call]  # torch leaves it so
        self.register_load_state_dict_post_hook(_frozen_stays)  # type: ignore[no-untyped-call]  # torch leaves it so
        self.train(False)  # noqa: FBT003 - torch's own signature

    @property
    def trains_backbone(self) -> bool:
        """Whether some weight of the backbone trains too."""
        return any(weight.requires_grad for weight in self.backbone.parameters())

    def train(self, mode: bool = True) -> ProjectedModel:  # noqa: FBT001, FBT002 - torch's own signature
        """Switch the projector; the backbone only where something of it trains."""
        super().train(mode)
        self.backbone.train(mode and self.trains_backbone)
        return self

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,  # noqa: FBT001, FBT002 - transformers' own signature
    ) -> None:
        """Have the backbone keep fewer activations, as Trainer asks where `activation_checkpointing` is on."""
        self.backbone.activation_checkpointing_enable(
            activation_checkpointing_kwargs=activation_checkpointing_kwargs,
            every_n_layers=every_n_layers,
            offload=offload,
        )

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled hidden states, float32 [B, in_features]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_backbone):
            hidden = hidden_states(self.backbone, input_ids, attention_mask)
            return POOLINGS[self.description.pooling](hidden, attention_mask)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        anchor_input_ids: Tensor | None = None,
        anchor_attention_mask: Tensor | None = None,
        positive_input_ids: Tensor | None = None,
        positive_attention_mask: Tensor | None = None,
        negative_input_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits [B, out_features] in float32 for token ids [B, T], and the loss where there are labels.

        Pairs come as three such inputs (the negatives may be fewer, or none); see FeatureProjector for what comes out.
        """
        first = self._features(input_ids if input_ids is not None else anchor_input_ids,
                               attention_mask if input_ids is not None else anchor_attention_mask)  # fmt: skip
        assert first is not None, "a model is given token ids"
        positive = self._features(positive_input_ids, positive_attention_mask)
        negative = self._features(negative_input_ids, negative_attention_mask)
        with torch.autocast(first.device.type, enabled=False):  # mixed precision is the backbone's alone
            found = self.projector(first, labels, positive, negative)
        assert isinstance(found, SequenceClassifierOutput)
        return found

    def _features(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        if input_ids is None:
            return None
        return self.features(input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask)


def _only_what_trains(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave the frozen backbone out of a state that was just gathered."""
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for name in [name for name in state if name.startswith(f"{prefix}backbone.")]:
        if name.removeprefix(prefix) not in trains:
            del state[name]


def _frozen_stays(model: nn.Module, found: Any) -> None:
    """Of the names that a loaded state lacks, pass over the frozen backbone's."""
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    lacking = [name for name in found.missing_keys if name in trains or not name.startswith("backbone.")]
    found.missing_keys[:] = lacking
