"""The recipe's arguments reach TrainingArguments verbatim, beside what Requant decides."""

from __future__ import annotations

import importlib.util

import pytest

from pipeline.errors import RecipeError
from pipeline.training.arguments import training_arguments


def build(tmp_path, *, mixed=False, **given):
    return training_arguments(given, folder=tmp_path, seed=7, mixed=mixed)


def test_given_names_arrive_verbatim(tmp_path):
    given = {
        "learning_rate": 3e-4, "num_train_epochs": 2, "per_device_train_batch_size": 3, "warmup_steps": 5,
        "lr_scheduler_type": "cosine", "weight_decay": 0.1, "gradient_accumulation_steps": 4, "logging_steps": 3,
    }  # fmt: skip
    built = build(tmp_path, **given)
    assert {name: getattr(built, name) for name in given} == given


def test_what_requant_decides_is_filled_in(tmp_path):
    built = build(tmp_path)
    assert (built.output_dir, built.seed, built.data_seed) == (str(tmp_path), 7, 7)
    assert (built.disable_tqdm, built.remove_unused_columns) == (True, False)
    assert (built.save_strategy, built.save_total_limit, built.logging_nan_inf_filter) == ("no", 2, False)


def test_saving_by_steps_is_turned_on_by_naming_the_steps(tmp_path):
    assert build(tmp_path, save_steps=5).save_strategy == "steps"
    assert build(tmp_path, save_strategy="epoch").save_strategy == "epoch"


def test_mixed_precision_gives_way_to_what_the_recipe_says(tmp_path):
    assert build(tmp_path, mixed=True, bf16=False).bf16 is False
    assert build(tmp_path, mixed=False).bf16 is False


@pytest.mark.parametrize(("installed", "reporters"), [(True, ["tensorboard"]), (False, [])])
def test_tensorboard_is_told_where_it_is_installed(tmp_path, monkeypatch, installed, reporters):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: installed if name == "tensorboard" else found(name, *rest)
    )
    assert build(tmp_path).report_to == reporters


def test_the_recipes_report_to_wins(tmp_path):
    assert build(tmp_path, report_to=[]).report_to == []
    assert build(tmp_path, report_to="none").report_to == []


def test_a_reporter_that_is_not_installed_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(RecipeError, match="report_to names smoke_signals, which is not installed; choose from"):
        build(tmp_path, report_to=["smoke_signals"])


@pytest.mark.parametrize("given", [{"lr_scheduler_type": "zigzag"}, {"warmup_steps": -1}])
def test_a_value_that_transformers_refuses_is_the_recipes_mistake(tmp_path, given):
    with pytest.raises(RecipeError, match=r"train.arguments: .*; correct the value") as caught:
        build(tmp_path, **given)
    assert "\n" not in str(caught.value)
