"""A model of a few hundred weights and rows that it can learn, for the tests of the loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from pipeline.training.arguments import training_arguments
from pipeline.training.checks import Expectation
from pipeline.training.trainer import Course, train

ARGUMENTS = {"max_steps": 6, "learning_rate": 0.05, "per_device_train_batch_size": 4, "save_steps": 2, "report_to": []}


@dataclass(frozen=True)
class Row:
    """Token ids and their class."""

    input_ids: list[int]
    target: int


class Small(torch.nn.Module):
    """A frozen embedding under a trained layer; `hook` sees each batch of a training step."""

    def __init__(self, *, hook=None, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.backbone = torch.nn.Embedding(16, 8).requires_grad_(requires_grad=False)
            self.backbone.weight.data[8:] += 1
            self.head = torch.nn.Linear(8, 2)
        self.register_buffer("scale", torch.ones(8))
        self.dropout = torch.nn.Dropout(dropout)
        self.hook = hook

    def forward(self, input_ids, attention_mask, labels):
        if self.hook and self.training:
            self.hook(self, input_ids)
        features = (self.backbone(input_ids) * self.scale * attention_mask[..., None]).sum(1)
        logits = self.head(self.dropout(features))
        return SequenceClassifierOutput(loss=torch.nn.functional.cross_entropy(logits, labels), logits=logits)


def rows(count=40, seed=0):
    """Rows of three tokens, all from one half of the vocabulary or all from the other: the label says which."""
    drawn = torch.randint(0, 8, (count, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Row(input_ids=[token + 8 * (i % 2) for token in ids], target=i % 2) for i, ids in enumerate(drawn)]


def collate(batch):
    ids = torch.tensor([row.input_ids for row in batch])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor([row.target for row in batch]),
    }


HEAD = Expectation(method="head", trainable=lambda name: name.startswith("head."))


def course(**changed):
    return Course(**({"examples": rows(), "collate": collate, "expected": HEAD} | changed))


def run(folder, build=Small, *, given=None, **changed):
    """Train on one thread."""
    arguments = training_arguments({**ARGUMENTS, **(given or {})}, folder=folder, seed=5, mixed=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(build, course(**changed), arguments)
    finally:
        torch.set_num_threads(threads)


def weights(trained):
    return {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
