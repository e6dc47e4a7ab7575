"""A recipe is parsed once, strictly, and every mistake is one sentence."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe, load_recipe, parse_recipe
from pipeline.sections import Upcast
from pipeline.targets import parse_target

MINIMAL = "name: bot\nsource: ./model\n"


def parse(text: str, *overrides: str) -> Recipe:
    return parse_recipe(text, where="r.yaml", overrides=overrides)


def test_a_minimal_recipe_requantizes_nothing_and_trains_nothing():
    recipe = parse(MINIMAL)
    assert recipe.train.method == "none"
    assert recipe.quantize == ()
    assert not recipe.calibrated


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nme: bot\nsource: x", "unknown key nme; did you mean name?"),
        (MINIMAL + "quantize: [{format: gptq, bitz: 4}]", "quantize.0: unknown key bitz; did you mean bits?"),
        (MINIMAL + "train: {methd: lora}", "train: unknown key methd; did you mean method?"),
        (
            MINIMAL + "quantize: [{format: gptq, bits: 5}]",
            "quantize.0.bits: Input should be 2, 3, 4, 8 or 'auto' (found 5)",
        ),
        (MINIMAL + "quantize: [{format: gptqq}]", "'gptqq'"),
        (MINIMAL + "train: {method: lora}", "train.data is missing"),
        (MINIMAL + "quantize: [{format: awq}]", "calibration.data is train, but train.data is missing"),
        (MINIMAL + "promote: {alias: production}", "promote needs evaluate"),
        (MINIMAL + "evaluate: {data: e}\npromote: {alias: v0001}", "would look like a version"),
        (MINIMAL + "quantize: [{format: bitsandbytes, bits: 8, type: nf4}]", "neither type nor double_quant"),
        (MINIMAL + "quantize: [{format: bitsandbytes}, {format: bitsandbytes}]", "two targets would be called nf4"),
        (MINIMAL + "quantize: [{format: bitsandbytes, name: dense}]", "cannot be called dense"),
        ("name: ../evil\nsource: x", "name"),
        ("- a\n- b", "found list"),
        ("a: [1, 2", "not YAML"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_place(text: str, said: str):
    with pytest.raises(RecipeError) as error:
        parse(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_learning_rate_without_a_decimal_point_is_a_number():
    assert parse(MINIMAL + "train: {arguments: {learning_rate: 2e-4}}").train.arguments == {"learning_rate": 2e-4}


def test_set_overrides_values_deep_in_the_recipe():
    recipe = parse(
        MINIMAL + "quantize: [{format: bitsandbytes}]",
        "quantize.0.type=fp4", "train.arguments.learning_rate=1e-3", "seed=7",
    )  # fmt: skip
    assert recipe.quantize[0].variant == "fp4"
    assert recipe.train.arguments["learning_rate"] == 1e-3
    assert recipe.seed == 7


@pytest.mark.parametrize("override", ["seed", "quantize.3.bits=4", "name.x.y=3", "=3"])
def test_a_wrong_override_is_one_sentence(override: str):
    with pytest.raises(RecipeError):
        parse(MINIMAL + "quantize: [{format: bitsandbytes}]", override)


def test_a_missing_recipe_file_is_one_sentence(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_yaml_builds_plain_values_only():
    with pytest.raises(RecipeError, match="not YAML"):
        parse(MINIMAL + "seed: !!python/object/apply:os.getpid []")


def test_the_recipe_survives_a_round_trip_as_json():
    recipe = parse(MINIMAL + "quantize: [{format: bitsandbytes}, {format: gptq}]\ncalibration: {data: c.txt}")
    assert Recipe.model_validate(recipe.model_dump(mode="json", by_alias=True)) == recipe


@pytest.mark.parametrize(
    ("text", "variant"),
    [("nf4", "nf4"), ("int8", "int8"), ("gptq:bits=3,group_size=-1", "gptq-3bit"), ("awq:group_size=64", "awq-4bit")],
)
def test_a_target_has_a_short_form(text: str, variant: str):
    assert parse_target(text).variant == variant


@pytest.mark.parametrize("text", ["gptq:bits", "gptq:bits=5", "zip", "nf4:bits=8", "gptq:grid=old", "nf4:grid=keep"])
def test_a_wrong_target_is_one_sentence(text: str):
    with pytest.raises(RecipeError, match="--to"):
        parse_target(text)


@pytest.mark.parametrize("format_", ["gptq", "awq"])
@pytest.mark.parametrize("grid", ["keep", "better"])
def test_only_our_own_engine_keeps_a_grid(format_: str, grid: str):
    assert parse_target(f"{format_}:grid={grid}").grid == grid
    with pytest.raises(RecipeError, match="engine gptqmodel has no grid; leave it out, or use engine requant"):
        parse_target(f"{format_}:grid={grid},engine=gptqmodel")


@pytest.mark.parametrize(("said", "expected"), [("500MB", 500_000_000), ("2.5 GB", 2_500_000_000), ("5GB", 5 * 10**9)])
def test_a_shard_size_is_in_powers_of_ten(said, expected):
    assert Upcast(max_shard_size=said).max_shard_bytes == expected


@pytest.mark.parametrize("said", ["5", "0GB", "-1GB", "1TB", "GB", "5 gigabytes"])
def test_what_is_no_shard_size_is_refused(said):
    with pytest.raises(ValidationError):
        Upcast(max_shard_size=said)
