"""Accumulation changes how many rows are in memory, not what is learned, whatever the head's loss."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from pipeline.training.checks import Expectation
from tests.training.small import HEAD, Small, rows, run

SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "max_steps": 3, "lr_scheduler_type": "constant"}


def classifier(labels):
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=labels, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


def collator(dtype):
    def collate(batch):
        ids = torch.tensor([row.input_ids for row in batch])
        targets = torch.tensor([row.target for row in batch], dtype=dtype)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": targets}

    return collate


FULL = Expectation(method="full", trainable=lambda _: True)
CASES = {
    "classifier": (lambda: classifier(2), collator(torch.int64), FULL),
    "regressor": (lambda: classifier(1), collator(torch.float32), FULL),
    "plain module": (Small, collator(torch.int64), HEAD),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("count", "sizes"), [(40, ((4, 1), (1, 4))), (5, ((5, 1), (2, 3)))], ids=["even", "uneven"])
def test_rows_at_once_and_in_parts_come_to_the_same_weights(tmp_path, case, count, sizes):
    """Transformers' classifiers ignore the count that Trainer hands them, which would make their gradient fourfold.

    Uneven: three parts of five rows hold two, two and one, which a mean of means would weigh alike.
    """
    build, collate, expected = CASES[case]
    found = []
    for size, times in sizes:
        given = {**SGD, "per_device_train_batch_size": size, "gradient_accumulation_steps": times}
        folder, examples = tmp_path / str(size), rows(count)
        trained = run(folder, build, given=given, examples=examples, collate=collate, expected=expected)
        found.append(trained.model.state_dict())
    for name, tensor in found[0].items():
        assert torch.allclose(found[1][name], tensor, atol=1e-5), name
