"""Names in train.arguments and train.lora are those of the installed libraries, read without importing them."""

from __future__ import annotations

import dataclasses

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from pipeline.argument_names import (
    LAUNCHED_ARGUMENTS,
    RESERVED_ARGUMENTS,
    RESERVED_LORA,
    check_arguments,
    lora_types,
    training_argument_types,
)  # fmt: skip
from pipeline.errors import RecipeError


def test_the_names_read_off_the_source_are_the_fields_of_the_imported_classes():
    assert training_argument_types().keys() == {field.name for field in dataclasses.fields(TrainingArguments)}
    assert lora_types().keys() == {field.name for field in dataclasses.fields(LoraConfig)}


def test_every_reserved_name_exists():
    assert RESERVED_ARGUMENTS.keys() | LAUNCHED_ARGUMENTS.keys() <= training_argument_types().keys()
    assert RESERVED_LORA.keys() <= lora_types().keys()


def test_names_of_both_libraries_pass():
    check_arguments({"learning_rate": 1e-4, "num_train_epochs": 2}, {"r": 8, "target_modules": "all-linear"})
    check_arguments({}, {"init_lora_weights": "gaussian", "bias": "none"})


@pytest.mark.parametrize(
    ("arguments", "lora", "said"),
    [
        ({"learningrate": 1}, {}, "train.arguments: unknown key learningrate; did you mean learning_rate"),
        ({"output_dir": "x"}, {}, "train.arguments: output_dir cannot be set: the run keeps its resume files"),
        ({"seed": 1}, {}, "train.arguments: seed cannot be set: the recipe's seed is used"),
        ({"push_to_hub": True}, {}, "train.arguments: push_to_hub cannot be set"),
        ({"learning_rate": "fast"}, {}, "train.arguments: learning_rate is 'fast', expected a number"),
        ({"max_steps": 1.5}, {}, "train.arguments: max_steps is 1.5, expected a whole number"),
        ({"bf16": 1}, {}, "train.arguments: bf16 is 1, expected true or false"),
        ({"tf32": "yes"}, {}, "train.arguments: tf32 is 'yes', expected true or false or null"),
        ({"learning_rate": True}, {}, "learning_rate is True, expected a number"),
        ({}, {"r": "8"}, "train.lora: r is '8', expected a whole number"),
        ({}, {"rank": 8}, "train.lora: unknown key rank; did you mean rank_pattern"),
        ({}, {"task_type": "SEQ_CLS"}, "train.lora: task_type cannot be set"),
        ({}, {"alora_invocation_tokens": [1]}, "cannot be merged"),
        ({}, {"bias": "all"}, "train.lora: bias is 'all'"),
        (
            {},
            {"init_lora_weights": "pissa"},
            "train.lora: init_lora_weights is 'pissa', which changes the base weights",
        ),
    ],
)
def test_an_unknown_or_reserved_name_is_refused_with_the_nearest_or_the_reason(arguments, lora, said):
    with pytest.raises(RecipeError, match=said) as caught:
        check_arguments(arguments, lora)
    assert "\n" not in str(caught.value)


def test_what_speaks_of_several_processes_is_allowed_where_a_launcher_starts_them():
    given = {"fsdp": True, "fsdp_config": {"version": 2}}
    check_arguments(given, {}, launched=True)
    with pytest.raises(RecipeError, match=r"train\.arguments: fsdp cannot be set: .*; set train.launcher first"):
        check_arguments(given, {})


@pytest.mark.parametrize("name", ["deepspeed", "parallelism_config", "local_rank", "auto_find_batch_size"])
def test_what_no_launcher_makes_work_stays_refused(name):
    with pytest.raises(RecipeError, match=f"train.arguments: {name} cannot be set"):
        check_arguments({name: 1}, {}, launched=True)
