"""A toy task for projectors and heads: rows of token ids whose class is a word that they hold."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from pipeline.sections import Projector
from pipeline.training.arguments import training_arguments
from pipeline.training.feature_loop import fit
from pipeline.training.feature_rows import LabelledRows
from pipeline.training.features import features, pooled
from pipeline.training.projector import FeatureProjector, ProjectorLayer, describe
from tests.checkpoints import tiny_llama

HIDDEN = 64
CLASSES = ("no", "perhaps", "yes")
BATCH = 16


def toy_rows(count=96, *, seed=0, shortest=4, longest=60, last=True):
    """(token ids, class numbers): the class is the last token's, or one in the middle."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size=()):
        return torch.randint(low, high, size, generator=generator).tolist()

    rows, labels = [], []
    for _ in range(count):
        row, label = draw(40, 250, (draw(shortest, longest),)), draw(0, len(CLASSES))
        row.insert(len(row) if last else len(row) // 2, 10 + label)
        rows.append(row)
        labels.append(label)
    return rows, labels


def backbone(folder, **options):
    return tiny_llama(folder, hidden=HIDDEN, intermediate=96, **options)


def loaded(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def description(*, task="classification", classes=CLASSES, **section):
    return describe(Projector(**section), in_features=HIDDEN, task=task, classes=classes)


def arguments(folder, *, seed=7, **given):
    given = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
    } | given
    return training_arguments(given, folder=folder, seed=seed, mixed=False)


def cached(model, rows, folder, *, pooling="last_token", backbone="b", dtype="float32", **options):
    """The features of rows of at most 64 tokens; `model` or what gives it."""
    load = model if not isinstance(model, torch.nn.Module) else lambda: model
    given = {"kept": pooled(pooling), "width": HIDDEN, "sequence_length": 64, "pad_token": 0}
    return features(load, rows, folder=folder, backbone=backbone, dtype=dtype, **given | options)


def trained_on(found, labels, run, *, seed=0, validation=None, **section):
    """(the projector, what the loop says of it)."""
    module = FeatureProjector(ProjectorLayer(description(**section), seed=seed), "classification")
    rows = LabelledRows(features=found, labels=torch.tensor(labels))
    return module.layer, fit(module, rows, run, validation=validation)


def counted(model):
    """The calls of the base model's forward pass from now on, as a list that grows."""
    calls = []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def weights(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
