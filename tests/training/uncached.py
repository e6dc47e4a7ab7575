"""A projector trained with the backbone running at every step, and the same from cached features.

`compare` runs in a process of its own: loading GPTQ imports gptqmodel, which changes transformers for the process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.labelled import padded_ids
from pipeline.training.feature_schedule import Schedule
from pipeline.training.projector import ProjectorLayer
from tests.training.feature_runs import arguments, cached, description, loaded, toy_rows, trained_on, weights

RATE = 1e-3


def plain_loop(backbone: Any, rows: Any, labels: Any, schedule: Schedule) -> nn.Module:
    """The loop of anyone who trains a projector on a frozen backbone by hand: the backbone runs at every step."""
    for weight in backbone.parameters():
        weight.requires_grad = False
    backbone.eval()
    projector = ProjectorLayer(description(), seed=0)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    loss_fn = nn.CrossEntropyLoss()
    for _, chosen in schedule.batches(0):
        batch = padded_ids([rows[i] for i in chosen.tolist()], pad_token=0, length=64)
        with torch.no_grad():
            outputs = backbone(**batch, output_hidden_states=True)
        hidden = outputs.hidden_states[-1]
        features = hidden[torch.arange(len(hidden)), batch["attention_mask"].sum(1) - 1]
        loss = loss_fn(projector(features), torch.tensor(labels)[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return projector


def compare(folder: Path, workspace: Path, dtype: str, quantization: Any = None) -> dict[str, Any]:
    """The largest difference between the two projectors' weights, how far either moved, and the backbone's kind."""
    torch.set_num_threads(1)
    rows, labels = toy_rows(40)
    options = {} if quantization is None else {"quantization_config": quantization}
    model = loaded(folder, getattr(torch, dtype) if dtype != "auto" else "auto", **options)
    run = arguments(workspace / "run", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0,
                    num_train_epochs=2)  # fmt: skip
    by_hand = weights(plain_loop(model, rows, labels, Schedule.of(len(rows), run, 1)))
    found = cached(model, rows, workspace / "features", dtype=dtype)
    layer, _ = trained_on(found, labels, run)
    trained, start = weights(layer), weights(ProjectorLayer(description(), seed=0))
    return {
        "difference": max(float((trained[name] - by_hand[name]).abs().max()) for name in trained),
        "moved": max(float((trained[name] - start[name]).abs().max()) for name in trained),
        "kind": type(model.model.layers[0].mlp.down_proj).__name__,
    }
