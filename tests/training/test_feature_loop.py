"""The loop on cached features: Trainer's arguments, exact resume, one step however it is cut."""

from __future__ import annotations

import json
import socket
from itertools import chain

import pytest
import torch
from torch import multiprocessing, nn
from transformers import TrainingArguments, get_scheduler
from transformers.modeling_outputs import SequenceClassifierOutput

from pipeline import progress
from pipeline.argument_names import HONOURED, training_argument_types
from pipeline.errors import DataError, NonFinite, RecipeError
from pipeline.training.feature_loop import fit
from pipeline.training.feature_rows import LabelledRows, PairRows, pair_texts
from pipeline.training.feature_schedule import Schedule
from pipeline.training.features import Features
from pipeline.training.projector import FeatureProjector, ProjectorLayer, contrastive
from tests.training.feature_runs import arguments, backbone, cached, description, loaded, same, toy_rows, weights
from tests.training.runs import Killed

ROWS, WIDTH = 200, 64


def made_up(count=ROWS, *, seed=0):
    """Features with three classes that a plane tells apart, and their labels, as rows for the loop."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    vectors = torch.randn(count, WIDTH, generator=generator)
    vectors[torch.arange(count), labels] += 3
    return LabelledRows(features=as_features(vectors), labels=labels)


def as_features(vectors):
    count = len(vectors)
    return Features(vectors=vectors, first=torch.arange(count), counts=torch.ones(count).long(), computed=0)


class Dropping(FeatureProjector):
    """A projector with dropout before it, whose randomness a resume must find again."""

    def forward(self, features, labels=None, positive=None, negative=None):
        return super().forward(nn.functional.dropout(features, 0.3, self.training), labels, positive, negative)


def module(made=FeatureProjector, *, task="classification", kind="mlp", **section):
    return made(ProjectorLayer(description(task=task, kind=kind, **section), seed=3), task)


def dies_at_loss(number):
    seen = []

    def sink(event):
        if isinstance(event, progress.Metric) and event.name == "loss":
            seen.append(event.value)
            if len(seen) == number:
                raise Killed

    return sink


def metrics(events, name):
    return [event.value for event in events if isinstance(event, progress.Metric) and event.name == name]


def told(work):
    events = []
    with progress.shown_by(events.append):
        work()
    return events


def test_the_names_that_the_loop_heeds_are_names_of_training_arguments():
    assert training_argument_types().keys() >= HONOURED


def test_a_step_is_what_torch_and_transformers_make_of_the_arguments(tmp_path):
    rows = made_up()
    run = arguments(
        tmp_path, num_train_epochs=2, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=5, max_grad_norm=0.1,
        adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6,
    )  # fmt: skip
    trained, by_hand = module(), module()
    fit(trained, rows, run)
    named = dict(by_hand.named_parameters())
    groups = [
        {"params": [weight for name, weight in named.items() if "bias" not in name], "weight_decay": 0.1},
        {"params": [weight for name, weight in named.items() if "bias" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, fused=True)
    schedule = Schedule.of(ROWS, run, 1)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=schedule.steps)
    for _, chosen in schedule.batches(0):
        by_hand(**rows.batch(chosen)).loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    assert same(weights(trained), weights(by_hand))


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(tmp_path):
    schedule = Schedule.of(50, arguments(tmp_path, num_train_epochs=2), 1)
    seen = [rows.tolist() for _, rows in schedule.batches(0)]
    assert [len(rows) for rows in seen] == [16, 16, 16, 2] * 2
    first, second = list(chain(*seen[:4])), list(chain(*seen[4:]))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert [rows.tolist() for _, rows in schedule.batches(5)] == seen[5:]
    other = Schedule.of(50, arguments(tmp_path, seed=8, num_train_epochs=2), 1)
    assert [rows.tolist() for _, rows in other.batches(0)] != seen


@pytest.mark.parametrize(
    ("given", "steps", "rows"),
    [
        ({"num_train_epochs": 2}, 26, 400),
        ({"num_train_epochs": 0.5}, 7, 112),
        ({"max_steps": 30}, 30, 464),
        ({"num_train_epochs": 1, "dataloader_drop_last": True}, 12, 192),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 4}, 4, 200),
        ({"num_train_epochs": 1, "per_device_train_batch_size": 500}, 1, 200),
    ],
)
def test_steps_and_rows_are_counted_as_trainer_counts_them(tmp_path, given, steps, rows):
    fitted = fit(module(), made_up(), arguments(tmp_path, **given))
    assert (fitted.steps, fitted.rows) == (steps, rows)


def test_micro_batches_add_up_to_the_same_step(tmp_path):
    run = {"num_train_epochs": 2, "learning_rate": 1e-3}
    whole, parts = module(), module()
    fit(whole, made_up(), arguments(tmp_path / "a", per_device_train_batch_size=24, **run))
    small = arguments(tmp_path / "b", per_device_train_batch_size=8, gradient_accumulation_steps=3, **run)
    fit(parts, made_up(), small)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_loss_rate_and_speed_are_told_and_validation_after_every_epoch(tmp_path):
    trained = module()
    run = arguments(tmp_path, num_train_epochs=4)
    unseen = made_up(60, seed=1)
    events = told(lambda: fit(trained, made_up(), run, validation=unseen))
    losses = metrics(events, "loss")
    assert len(losses) == 1 + 52 // 10 + 1  # the first, every tenth, the last
    assert losses[-1] < losses[0] / 3
    rates = metrics(events, "learning_rate")
    assert rates[0] == pytest.approx(1e-2 * 51 / 52)
    assert rates[-1] == 0
    assert all(speed > 0 for speed in metrics(events, "rows_per_second"))
    accuracies = metrics(events, "validation_accuracy")
    assert len(accuracies) == len(metrics(events, "validation_loss")) == 4
    batch = unseen.batch(torch.arange(60))
    with torch.no_grad():
        output = trained.eval()(**batch)
    assert accuracies[-1] == pytest.approx(float((output.logits.argmax(1) == batch["labels"]).float().mean()))
    assert metrics(events, "validation_loss")[-1] == pytest.approx(float(output.loss), rel=1e-5)
    steps = [event for event in events if isinstance(event, progress.Step)]
    assert (steps[-1].done, steps[-1].total, steps[-1].unit) == (52, 52, "steps")


def test_what_comes_back_says_what_was_done(tmp_path):
    events = []
    with progress.shown_by(events.append):
        fitted = fit(module(kind="linear"), made_up(), arguments(tmp_path), validation=made_up(60, seed=1))
    losses = metrics(events, "loss")
    assert fitted.loss == pytest.approx(sum(losses[-10:]) / len(losses[-10:]))
    assert fitted.trainable_parameters == 3 * WIDTH + 3
    assert fitted.validation_accuracy == metrics(events, "validation_accuracy")[-1]
    assert fitted.validation_loss == metrics(events, "validation_loss")[-1]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_that_dies_resumes_to_the_same_bits(tmp_path, accumulation):
    run = {"num_train_epochs": 4, "save_steps": 4, "logging_steps": 3, "weight_decay": 0.1, "warmup_steps": 3,
           "gradient_accumulation_steps": accumulation}  # fmt: skip
    whole, cut = module(Dropping), module(Dropping)
    fitted = fit(whole, made_up(), arguments(tmp_path / "whole", **run), validation=made_up(40))
    with pytest.raises(Killed), progress.shown_by(dies_at_loss(5)):
        fit(cut, made_up(), arguments(tmp_path / "cut", **run))
    assert not same(weights(cut), weights(whole))
    resumed = module(Dropping)
    events = []
    with progress.shown_by(events.append):
        again = fit(resumed, made_up(), arguments(tmp_path / "cut", **run), validation=made_up(40))
    assert "resumes from checkpoint-8" in [event.text for event in events if isinstance(event, progress.Message)]
    assert same(weights(resumed), weights(whole))
    assert again == fitted


def test_dropout_is_drawn_by_the_step_and_the_random_state_is_left_as_it_was(tmp_path):
    torch.manual_seed(1)
    one, two = module(Dropping), module(Dropping)
    before = torch.random.get_rng_state()
    fit(one, made_up(), arguments(tmp_path / "a"))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    fit(two, made_up(), arguments(tmp_path / "b"))
    assert same(weights(one), weights(two))
    other = module(Dropping)
    fit(other, made_up(), arguments(tmp_path / "c", seed=8))
    assert not same(weights(one), weights(other))


def test_checkpoints_hold_no_pickle_and_at_most_two_are_kept(tmp_path):
    fit(module(), made_up(), arguments(tmp_path, num_train_epochs=2, save_steps=5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-25"]
    names = sorted(path.name for path in (tmp_path / "checkpoint-25").iterdir())
    assert names == ["complete.json", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "complete.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, name):
    run = {"num_train_epochs": 2, "save_steps": 5}
    whole, resumed = module(), module()
    fit(whole, made_up(), arguments(tmp_path, **run))
    path = tmp_path / "checkpoint-25" / name
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / ".checkpoint-26.part").mkdir()
    events = told(lambda: fit(resumed, made_up(), arguments(tmp_path, **run)))
    assert "resumes from checkpoint-20" in [event.text for event in events if isinstance(event, progress.Message)]
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"num_train_epochs": 3}, {"seed": 8}])
def test_a_checkpoint_of_another_training_is_not_gone_on_from(tmp_path, change):
    run = {"num_train_epochs": 2, "save_steps": 5}
    fit(module(), made_up(), arguments(tmp_path / "one", **run))
    anew, alone = module(), module()
    events = told(lambda: fit(anew, made_up(), arguments(tmp_path / "one", **run | change)))
    assert any("begins anew" in event.text for event in events if isinstance(event, progress.Message))
    fit(alone, made_up(), arguments(tmp_path / "two", **run | change))
    assert same(weights(anew), weights(alone))


def test_the_clock_asks_for_checkpoints_where_the_arguments_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.training.feature_loop.EVERY", 0.0)
    monkeypatch.setattr("pipeline.training.feature_loop.SHARE", 0.0)
    fit(module(), made_up(), arguments(tmp_path, num_train_epochs=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-16", "checkpoint-32"]
    state = json.loads((tmp_path / "checkpoint-32" / "state.json").read_text())
    assert state["step"] == 32


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    rows = made_up()
    rows.features.vectors[5] = torch.inf
    with pytest.raises(NonFinite, match=r"the loss is (nan|inf) at step \d+; lower train\.arguments\.learning_rate"):
        fit(module(), rows, arguments(tmp_path))


def test_nothing_to_train_or_a_rate_that_needs_evaluations_is_refused_before_the_first_step(tmp_path):
    frozen = module()
    for weight in frozen.parameters():
        weight.requires_grad = False
    with pytest.raises(RecipeError, match="no parameter would train"):
        fit(frozen, made_up(), arguments(tmp_path))
    run = TrainingArguments(
        str(tmp_path), lr_scheduler_type="greedy", eval_strategy="epoch", report_to=[], use_cpu=True
    )
    with pytest.raises(RecipeError, match=r"greedy is steered by an evaluation"):
        fit(module(), made_up(), run)
    with pytest.raises(DataError, match="10 rows make no batch"):
        fit(module(), made_up(10), arguments(tmp_path, dataloader_drop_last=True))


def test_a_regression_learns_a_number(tmp_path):
    vectors = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(0))
    rows = LabelledRows(features=as_features(vectors), labels=vectors[:, 0] * 2 - 1)
    trained = module(task="regression", classes=None)
    events = told(lambda: fit(trained, rows, arguments(tmp_path, num_train_epochs=20), validation=rows))
    found = metrics(events, "validation_loss")
    assert found[-1] < 0.1 * found[0]
    assert metrics(events, "validation_accuracy") == []


# Pairs.


def test_a_pairs_batch_has_its_own_positives_and_the_negatives_that_there_are():
    texts, negative = pair_texts([[1], [2], [3]], [[4], [5], [6]], [None, [7], None])
    assert texts == [[1], [2], [3], [4], [5], [6], [7]]
    rows = PairRows(features=as_features(torch.tensor(texts, dtype=torch.float32)), negative=negative)
    batch = rows.batch(torch.tensor([2, 1]))
    assert {name: tensor.flatten().tolist() for name, tensor in batch.items()} == {
        "features": [3, 2], "positive": [6, 5], "labels": [0, 1], "negative": [7],
    }  # fmt: skip
    assert "negative" not in rows.batch(torch.tensor([0, 2]))


def test_contrastive_training_brings_pairs_together_that_the_backbone_does_not(tmp_path):
    model = loaded(backbone(tmp_path / "model"))
    shared, _ = toy_rows(64, seed=1, shortest=6, longest=12)
    noise, _ = toy_rows(128, seed=2, shortest=3, longest=6)
    anchors = [[*some, *row] for some, row in zip(noise[:64], shared, strict=True)]
    positives = [[*row, *some] for some, row in zip(noise[64:], shared, strict=True)]
    texts, negative = pair_texts(anchors, positives, [positives[i - 1] if i % 2 else None for i in range(64)])
    rows = PairRows(features=cached(model, texts, tmp_path / "f", pooling="mean"), negative=negative)
    trained = module(task="pairs", classes=None)
    everything = rows.batch(torch.arange(64))

    def found():
        with torch.no_grad():
            layer = trained.layer
            similar, _ = contrastive(layer(everything["features"]), layer(everything["positive"]))
        return float((similar.argmax(1) == torch.arange(64)).float().mean())

    before = found()
    events = told(lambda: fit(trained, rows, arguments(tmp_path, num_train_epochs=60), validation=rows))
    assert before < 0.7
    assert found() > 0.95
    assert metrics(events, "validation_accuracy")[-1] > 0.9


# Several processes.


def one_of_two(rank, port, folder, results):
    import os

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    run = arguments(folder / "two", per_device_train_batch_size=8, num_train_epochs=2, save_steps=10)
    assert (run.world_size, run.process_index) == (2, rank)
    model = loaded(folder / "model")
    rows, labels = toy_rows(90)
    found = cached(model, rows, folder / "features two")
    trained = module()
    data = LabelledRows(features=found, labels=torch.tensor(labels))
    fitted = fit(trained, data, run, validation=data)
    results.put((rank, fitted, {name: tensor.tolist() for name, tensor in weights(trained).items()},
                 found.pooled(torch.arange(90)).tolist()))  # fmt: skip


@pytest.mark.slow
def test_two_processes_compute_features_and_train_as_one_does(tmp_path):
    model = loaded(backbone(tmp_path / "model"))
    rows, labels = toy_rows(90)
    expected = cached(model, rows, tmp_path / "features one")
    alone = module()
    data = LabelledRows(features=expected, labels=torch.tensor(labels))
    fitted = fit(alone, data, arguments(tmp_path / "one", num_train_epochs=2, save_steps=10), validation=data)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    started = multiprocessing.spawn(one_of_two, args=(port, tmp_path, results), nprocs=2, join=False)
    answers = {}
    for _ in range(2):
        rank, *answers[rank] = results.get()
    started.join()
    (one, first, features), (_, second, _) = answers[0], answers[1]
    assert first == second
    assert torch.equal(torch.tensor(features), expected.pooled(torch.arange(90)))
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(torch.tensor(first[name]), tensor, rtol=1e-4, atol=1e-6)
    assert (one.steps, one.rows) == (fitted.steps, fitted.rows)
    assert one.loss == pytest.approx(fitted.loss, rel=1e-4)
    assert one.validation_accuracy == fitted.validation_accuracy
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["checkpoint-10"]


def test_the_loop_asks_of_a_module_only_loss_and_logits(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.zeros(WIDTH, 3))

        def forward(self, features, labels):
            logits = features @ self.matrix
            return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    assert fit(Own(), made_up(), arguments(tmp_path, num_train_epochs=5)).loss < 0.7  # of ln 3 = 1.1
