"""The loop: any module and any rows, checked, watched, resumed, smaller where memory runs out."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from pipeline import progress
from pipeline.errors import CheckFailed, NonFinite, OutOfMemory
from pipeline.training.checks import Expectation, Record
from pipeline.training.memory import known_micro_batch
from pipeline.training.resume import last_complete, mark_complete
from tests.training.runs import Killed, dies_at
from tests.training.small import HEAD, Small, collate, rows, run, same, weights


def watched(action):
    """What `action` gives, its metrics by name and its messages."""
    events = []
    with progress.shown_by(events.append):
        found = action()
    metrics = {}
    for event in events:
        if isinstance(event, progress.Metric):
            metrics.setdefault(event.name, []).append(event.value)
    return found, metrics, [event.text for event in events if isinstance(event, progress.Message)]


def test_a_plain_module_trains_and_what_it_came_to_is_told(tmp_path):
    trained, metrics, messages = watched(lambda: run(tmp_path, given={"logging_steps": 2}))
    assert (trained.steps, trained.trainable_parameters) == (6, 18)
    assert trained.tokens == pytest.approx(6 * 4 * 3, rel=0.01)
    assert trained.loss_after < trained.loss_before
    assert messages[0] == "trains 18 of 146 parameters, in 2 tensors, as method head says, on 40 examples"
    assert messages[-1].startswith("trained 6 steps, 72 tokens in ")
    assert f"went from {trained.loss_before:.4g} to {trained.loss_after:.4g}" in messages[-1]
    assert len(metrics["loss"]) == 4  # the first step and every second one
    assert metrics["learning_rate"][0] == pytest.approx(0.05)
    assert metrics["learning_rate"] == sorted(metrics["learning_rate"], reverse=True)
    assert all(value > 0 for name in ("gradient_norm", "tokens_per_second") for value in metrics[name])
    assert all(
        0 < now <= 1.05 * peak for now, peak in zip(metrics["resident_bytes"], metrics["peak_bytes"], strict=True)
    )


def test_rows_without_a_mask_are_counted_as_rows(tmp_path):
    class Unmasked(Small):
        def forward(self, input_ids, labels):
            return super().forward(input_ids, torch.ones_like(input_ids), labels)

    def unmasked(batch):
        return {name: value for name, value in collate(batch).items() if name != "attention_mask"}

    _, metrics, messages = watched(lambda: run(tmp_path, Unmasked, collate=unmasked))
    assert metrics["rows_per_second"]
    assert "tokens_per_second" not in metrics
    assert "24 rows in" in messages[-1]


def test_each_epoch_ends_with_the_loss_of_the_validation_rows(tmp_path):
    given = {"max_steps": -1, "num_train_epochs": 3}
    trained, metrics, _ = watched(lambda: run(tmp_path, given=given, validation=rows(10, seed=1)))
    assert len(metrics["validation_loss"]) == 3
    assert metrics["validation_loss"][-1] == trained.validation_loss < metrics["validation_loss"][0]
    with torch.no_grad():
        logits = trained.model.eval()(**collate(rows(10, seed=1))).logits
    labels = collate(rows(10, seed=1))["labels"]
    assert trained.validation_loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=0.05)


# --- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_a_run_that_dies_goes_on_to_the_same_weights_with_the_loss_from_before(tmp_path, step):
    build = lambda: Small(dropout=0.3)  # noqa: E731 - the model, again and again
    whole = run(tmp_path / "whole", build)
    with pytest.raises(Killed), progress.shown_by(dies_at(step)):
        run(tmp_path / "killed", build)
    resumed = run(tmp_path / "killed", build)
    assert same(weights(resumed), weights(whole))
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)


def test_evaluation_moves_no_random_state_so_a_run_that_dies_at_an_epochs_end_resumes_to_the_same_weights(tmp_path):
    """The checkpoint of an epoch's last step is written before the epoch's evaluation, which a resumed run lacks."""
    build = lambda: Small(dropout=0.3)  # noqa: E731 - the model, again and again
    given = {"max_steps": -1, "num_train_epochs": 2, "save_steps": 5}  # 10 steps an epoch
    options = {"given": given, "validation": rows(10, seed=1)}
    whole = run(tmp_path / "whole", build, **options)
    with pytest.raises(Killed), progress.shown_by(dies_at(12)):
        run(tmp_path / "killed", build, **options)
    assert last_complete(tmp_path / "killed").name == "checkpoint-10"
    assert same(weights(run(tmp_path / "killed", build, **options)), weights(whole))


def test_a_run_that_died_after_its_last_step_takes_no_further_one(tmp_path):
    first = run(tmp_path)
    assert last_complete(tmp_path).name == "checkpoint-6"
    again, metrics, messages = watched(lambda: run(tmp_path))
    assert "resumes from checkpoint-6" in messages
    assert again.steps == 6
    assert "loss" not in metrics
    assert same(weights(again), weights(first))
    assert again.loss_after == first.loss_after


class Exploit:
    """A pickle that writes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "code ran")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_resume_file_that_this_run_did_not_write_is_never_loaded(tmp_path, name):
    whole = run(tmp_path / "whole")
    work = tmp_path / "work"
    with pytest.raises(Killed), progress.shown_by(dies_at(5)):
        run(work)
    evidence = tmp_path / "evidence"
    with (work / "checkpoint-4" / name).open("wb") as file:
        torch.save(Exploit(evidence), file)
    resumed, _, messages = watched(lambda: run(work))
    assert "resumes from checkpoint-2" in messages
    assert not evidence.exists()
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_resume_file_with_code_in_it_runs_nothing_even_where_its_digest_matches(tmp_path, name):
    """Trainer's own reading is torch.load with weights_only; this holds it to that."""
    with pytest.raises(Killed), progress.shown_by(dies_at(5)):
        run(tmp_path / "work")
    evidence = tmp_path / "evidence"
    checkpoint = tmp_path / "work" / "checkpoint-4"
    with (checkpoint / name).open("wb") as file:
        torch.save(Exploit(evidence), file)
    mark_complete(checkpoint)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        run(tmp_path / "work")
    assert not evidence.exists()


# --- checks ---------------------------------------------------------------------------------------------------------


def test_a_model_that_trains_other_than_its_method_says_is_stopped_before_the_first_step(tmp_path):
    def thawed():
        model = Small()
        model.backbone.requires_grad_(requires_grad=True)
        return model

    with pytest.raises(CheckFailed, match=r"backbone\.weight trains, which is not what method head says \(2 tensors"):
        run(tmp_path, thawed)
    wider = Expectation(method="full", trainable=frozenset({"head.weight", "head.bias", "backbone.weight", "lost"}))
    with pytest.raises(CheckFailed, match=r"backbone\.weight and 1 other does not train, .* method full says \(4 tens"):
        run(tmp_path, expected=wider)
    assert last_complete(tmp_path) is None


def change_backbone(model, _):
    model.backbone.weight.data[0, 0] += 1e-6


def change_buffer(model, _):
    model.scale += 1e-6


@pytest.mark.parametrize(("hook", "name"), [(change_backbone, "backbone.weight"), (change_buffer, "scale")])
def test_a_frozen_tensor_that_changed_stops_the_run_and_the_checkpoint_stays(tmp_path, hook, name):
    with pytest.raises(CheckFailed, match=f"train: {name} changed while frozen"):
        run(tmp_path, lambda: Small(hook=hook))
    assert last_complete(tmp_path).name == "checkpoint-6"


def test_a_buffer_that_its_method_moves_may_change(tmp_path):
    moving = Expectation(method="head", trainable=HEAD.trainable, changing=lambda name: name == "scale")
    assert run(tmp_path, lambda: Small(hook=change_buffer), expected=moving).steps == 6


def test_a_loss_that_did_not_fall_stops_the_run_and_the_checkpoint_stays(tmp_path):
    with pytest.raises(CheckFailed, match=r"did not fall \(\d\.\d+ before, \d\.\d+ after\); change train.arg"):
        run(tmp_path, given={"learning_rate": 0.0})
    assert last_complete(tmp_path).name == "checkpoint-6"


def test_a_loss_that_is_not_finite_before_training_stops_it_there(tmp_path):
    def broken():
        model = Small()
        model.scale[0] = float("nan")
        return model

    events = []
    with pytest.raises(NonFinite, match="is nan before training"), progress.shown_by(events.append):
        run(tmp_path, broken)
    assert not any(isinstance(event, progress.Step) for event in events)


def test_a_tensor_that_no_gradient_reached_stops_the_run_and_is_named(tmp_path):
    class Idle(Small):
        def __init__(self):
            super().__init__()
            self.head.spare = torch.nn.Linear(2, 2)

    with pytest.raises(CheckFailed, match=r"no gradient reached head\.spare\.weight and 1 other of 4 trainable"):
        run(tmp_path, Idle)
    assert last_complete(tmp_path).name == "checkpoint-6"
    with pytest.raises(CheckFailed, match=r"head\.spare\.weight and 1 other"):  # also where nothing is left to do
        run(tmp_path, Idle)


class LowRank(Small):
    """The layer as a product whose second factor begins at zero, as LoRA's does."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(4, 2, bias=False))
        torch.nn.init.zeros_(self.head[1].weight)


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_a_gradient_that_is_zero_only_until_the_first_update_is_enough(tmp_path, steps):
    assert run(tmp_path, LowRank, given={"max_steps": steps}).steps == steps


def test_a_first_update_without_a_learning_rate_moves_nothing_and_is_not_judged_by(tmp_path):
    """A warm-up begins at zero, so the second gradient is still that of the untrained weights."""
    assert run(tmp_path, LowRank, given={"max_steps": 2, "warmup_steps": 1}).steps == 2


def test_a_gradient_that_stays_zero_is_none(tmp_path):
    class Severed(Small):
        def __init__(self):
            super().__init__()
            self.head.gate = torch.nn.Parameter(torch.zeros(2))

        def forward(self, input_ids, attention_mask, labels):
            found = super().forward(input_ids, attention_mask, labels)
            found["loss"] = found["loss"] + 0 * self.head.gate.sum()
            return found

    with pytest.raises(CheckFailed, match=r"no gradient reached head\.gate of 3 trainable"):
        run(tmp_path, Severed)


def test_what_a_gradient_reached_is_remembered_by_the_run_that_resumes(tmp_path):
    """A tensor that only the first rows use, such as an expert's, is not missed by a run that starts after them."""
    steps = []

    def early(model, _):
        steps.append(model.head.extra)

    class Early(Small):
        def __init__(self):
            super().__init__(hook=early)
            self.head.extra = torch.nn.Parameter(torch.ones(2))

        def forward(self, input_ids, attention_mask, labels):
            found = super().forward(input_ids, attention_mask, labels)
            if self.training and len(steps) in {2, 3}:
                found["loss"] = found["loss"] + (0.1 * self.head.extra.sum()) ** 2
            return found

    with pytest.raises(Killed), progress.shown_by(dies_at(5)):
        run(tmp_path, Early)
    assert run(tmp_path, Early).steps == 6


def test_labels_that_are_all_masked_stop_the_run_before_its_first_step(tmp_path):
    def masking(batch):
        found = collate(batch)
        return {**found, "labels": torch.full_like(found["labels"], -100)}

    with pytest.raises(CheckFailed, match=r"every label of the sampled batches is masked \(-100\)"):
        run(tmp_path, collate=masking)
    assert Record(tmp_path).get("loss_before") is None


# --- out of memory --------------------------------------------------------------------------------------------------


def fails_above(limit, error, at=1):
    """A hook that fails as an allocation does, above so many rows, from the `at`-th step on."""
    seen = []

    def hook(model, ids):
        seen.append(len(ids))
        if len(seen) >= at and len(ids) > limit:
            raise error

    hook.seen = seen
    return hook


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_rows_until_they_fit_and_ends_with_the_weights_of_such_a_run(tmp_path, error):
    hook = fails_above(2, error)
    given = {"per_device_train_batch_size": 8}
    trained, _, messages = watched(lambda: run(tmp_path / "a", lambda: Small(hook=hook), given=given))
    assert "out of memory with 8 rows at a time, 1 times an update; goes on with 4 rows at a time, 2 times an " in str(
        messages
    )
    assert "goes on with 2 rows at a time, 4 times an update" in str(messages)
    known = known_micro_batch(tmp_path / "a")
    assert (known.size, known.accumulation) == (2, 4)
    plain = run(tmp_path / "b", given={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    assert same(weights(trained), weights(plain))
    whole = run(tmp_path / "c", given=given)
    assert trained.steps == whole.steps
    for name, tensor in weights(whole).items():
        assert torch.allclose(weights(trained)[name], tensor, atol=1e-5), name


def test_out_of_memory_in_the_middle_goes_on_from_the_last_checkpoint_with_the_rows_that_come_next(tmp_path):
    """42 rows: the last update of an epoch has fewer rows, and the resumed step lies in the second epoch."""
    given = {"per_device_train_batch_size": 8, "max_steps": 12, "save_steps": 4}
    examples = rows(42)
    whole = run(tmp_path / "whole", given=given, examples=examples)
    hook = fails_above(4, MemoryError(), at=10)
    trained, _, messages = watched(
        lambda: run(tmp_path / "short", lambda: Small(hook=hook), given=given, examples=examples)
    )
    assert "resumes from checkpoint-8" in messages
    assert (trained.steps, trained.tokens) == (whole.steps, whole.tokens)
    assert hook.seen[:10] == [8, 8, 8, 8, 8, 2, 8, 8, 8, 8]  # the tenth step fails; the ninth is taken again
    assert hook.seen[10:] == [4, 4, 4, 4, 4, 4, 2]
    for name, tensor in weights(whole).items():
        assert torch.allclose(weights(trained)[name], tensor, atol=1e-5), name


def test_a_killed_run_that_had_run_out_of_memory_starts_with_what_fits(tmp_path):
    hook = fails_above(2, MemoryError())
    with pytest.raises(Killed), progress.shown_by(dies_at(3)):
        run(tmp_path, lambda: Small(hook=hook))
    hook.seen.clear()
    run(tmp_path, lambda: Small(hook=hook))
    assert set(hook.seen) == {2}


def test_a_single_row_that_does_not_fit_is_an_error_with_the_remedy(tmp_path):
    hook = fails_above(0, MemoryError())
    with pytest.raises(OutOfMemory, match=r"with 1 row at a time, 4 times an update; set train\.arg.*activation_check"):
        run(tmp_path, lambda: Small(hook=hook))


def test_a_loss_that_compares_the_rows_of_a_batch_is_not_made_of_halves(tmp_path):
    hook = fails_above(2, MemoryError())
    with pytest.raises(OutOfMemory, match=r"lower train\.arguments\.per_device_train_batch_size \(the loss compares"):
        run(tmp_path, lambda: Small(hook=hook), divisible=False)
    assert known_micro_batch(tmp_path) is None


def test_a_model_that_does_not_fit_is_another_error_and_no_reason_for_fewer_rows(tmp_path):
    def build():
        raise MemoryError

    with pytest.raises(OutOfMemory, match="while the model was loaded"):
        run(tmp_path, build)
    assert known_micro_batch(tmp_path) is None


def test_another_error_is_not_taken_for_it(tmp_path):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(tmp_path, lambda: Small(hook=fails_above(2, RuntimeError("shapes cannot be multiplied"))))


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def test_tensorboards_files_lie_where_the_caller_says_and_a_message_says_how_to_look(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    given = {"report_to": ["tensorboard"], "logging_steps": 2}
    trained, metrics, messages = watched(lambda: run(tmp_path / "work", given=given, logs=logs))
    assert f"watch it with: tensorboard --logdir {logs}" in messages
    found = EventAccumulator(str(logs)).Reload()
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(metrics["loss"])
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second", "train/resident_bytes"} <= set(
        found.Tags()["scalars"]
    )
    assert not list((tmp_path / "work").glob("runs*"))
    assert trained.steps == 6


def test_without_reporters_nothing_is_written_and_nothing_said_of_it(tmp_path):
    _, _, messages = watched(lambda: run(tmp_path / "work", logs=tmp_path / "logs"))
    assert not (tmp_path / "logs").exists()
    assert "tensorboard" not in str(messages)


def test_what_was_measured_before_training_lies_beside_the_checkpoints(tmp_path):
    with pytest.raises(Killed), progress.shown_by(dies_at(1)):
        run(tmp_path)
    kept = json.loads((tmp_path / Record.NAME).read_text())
    assert kept["loss_before"] == run(tmp_path / "other").loss_before
