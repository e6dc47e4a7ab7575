"""A recipe is parsed once, strictly, and every mistake is one sentence."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe, load_recipe, parse_recipe
from pipeline.sections import Upcast
from pipeline.targets import CompressedTensorsTarget, parse_target

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


MIXED = MINIMAL + "train: {data: t.jsonl}\nquantize: [{format: gptq}]\ncalibration: "


@pytest.mark.parametrize(
    ("text", "roles", "samples"),
    [
        ("{data: c.txt}", ["calibration"], 128),
        ("{data: [c.txt], samples: 5}", ["calibration"], 5),
        ("{data: [train, c.txt], shares: [3, 1]}", ["calibration_1", "calibration_2"], [96, 32]),
        ("{data: [train, {path: c.txt, format: text}], samples: 7}", ["calibration_1", "calibration_2"], [4, 3]),
        ("{data: [a, train, b], shares: [1, 1, 0.7], samples: 4}", [f"calibration_{i}" for i in (1, 2, 3)], [2, 1, 1]),
    ],
)
def test_calibration_samples_are_dealt_out_by_share_and_none_is_lost(text, roles, samples):
    recipe = parse(MIXED + text)
    assert list(recipe.calibration_rows) == roles
    assert recipe.calibration.drawn["samples"] == samples
    assert Recipe.model_validate(recipe.model_dump(mode="json", by_alias=True)) == recipe


def test_train_stands_for_the_training_rows_wherever_it_is_listed():
    rows = parse(MIXED + "{data: [c.txt, train]}").calibration_rows
    assert [data.path for data in rows.values()] == ["c.txt", "t.jsonl"]
    with pytest.raises(RecipeError, match=r"calibration.data is train, but train.data is missing"):
        parse(MINIMAL + "quantize: [{format: gptq}]\ncalibration: {data: [c.txt, train]}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{data: [train, c.txt], shares: [3]}", "calibration: shares has 1 for 2 sources of data; give each one"),
        ("{data: c.txt, shares: [3, 1]}", "calibration: shares has 2 for 1 sources of data"),
        ("{data: [train, c.txt], shares: [1000, 1]}", "shares leaves c.txt none of the 128 samples; raise samples or"),
        ("{data: [train, c.txt], samples: 1}", "none of the 1 samples"),
        ("{data: [train, c.txt], shares: [1, 0]}", "calibration.shares.1: Input should be greater than 0"),
        ("{data: [train, c.txt], shares: [.inf, 1]}", "calibration.shares.0: Input should be a finite number"),
        ("{data: []}", "calibration.data: Tuple should have at least 1 item"),
        ("{data: {pth: c.txt}}", "calibration.data: unknown key pth; did you mean path?"),
        ("{data: [train, {pth: c.txt}]}", "calibration.data.1: unknown key pth; did you mean path?"),
    ],
)
def test_a_mixture_that_does_not_add_up_is_one_sentence(text, said):
    with pytest.raises(RecipeError) as error:
        parse(MIXED + text)
    assert said in str(error.value)


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
    [
        ("nf4", "nf4"),
        ("int8", "int8"),
        ("gptq:bits=3,group_size=-1", "gptq-3bit"),
        ("awq:group_size=64", "awq-4bit"),
        ("gguf", "gguf-q8_0"),
        ("gguf:type=q4_0", "gguf-q4_0"),
        ("compressed-tensors", "w4a16"),
        ("compressed-tensors:scheme=w8a8,rounding=nearest", "rtn-w8a8"),
        ("compressed-tensors:scheme=fp8", "fp8"),
    ],
)
def test_a_target_has_a_short_form(text: str, variant: str):
    assert parse_target(text).variant == variant


@pytest.mark.parametrize(
    "text", ["gptq:bits", "gptq:bits=5", "zip", "nf4:bits=8", "gptq:grid=old", "nf4:grid=keep", "gguf:type=q6_k"]
)
def test_a_wrong_target_is_one_sentence(text: str):
    with pytest.raises(RecipeError, match="--to"):
        parse_target(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("scheme=w8a8,group_size=64", "scheme w8a8 has one scale for each output; leave group_size out"),
        ("scheme=fp8,group_size=128", "scheme fp8 has one scale for each output; leave group_size out"),
        ("scheme=fp8,mse=true", "scheme fp8 has no mse; leave it out"),
        ("scheme=fp8,rounding=nearest", "scheme fp8 has no rounding; leave it out"),
        ("scheme=fp8,grid=keep", "scheme fp8 has no grid; leave it out"),
        ("rounding=nearest,sequential=true", "rounding nearest has no sequential; leave it out"),
        ("scheme=w4a4", "scheme: Input should be 'w4a16', 'w8a8' or 'fp8'"),
        ("symmetric=false", "unknown key symmetric; valid keys are damping"),
    ],
)
def test_what_a_scheme_of_compressed_tensors_has_not_is_said(options: str, said: str):
    with pytest.raises(RecipeError, match=said):
        parse_target(f"compressed-tensors:{options}")


def test_what_a_job_is_told_of_a_target_is_the_target():
    for scheme in ("w4a16", "w8a8", "fp8"):
        target = parse_target(f"compressed-tensors:scheme={scheme}")
        assert CompressedTensorsTarget.model_validate(target.model_dump()) == target
        assert target.calibrated == (scheme != "fp8")


@pytest.mark.parametrize("format_", ["gptq", "awq"])
@pytest.mark.parametrize("grid", ["keep", "better"])
def test_only_our_own_engine_keeps_a_grid(format_: str, grid: str):
    assert parse_target(f"{format_}:grid={grid}").grid == grid
    with pytest.raises(RecipeError, match="engine gptqmodel has no grid; leave it out, or use engine requant"):
        parse_target(f"{format_}:grid={grid},engine=gptqmodel")


def test_autoawq_is_an_engine_of_awq_alone():
    assert parse_target("awq:engine=autoawq").engine == "autoawq"
    with pytest.raises(RecipeError, match="engine autoawq has no clip: false"):
        parse_target("awq:engine=autoawq,clip=false")
    with pytest.raises(RecipeError, match="engine"):
        parse_target("gptq:engine=autoawq")


@pytest.mark.parametrize(("said", "expected"), [("500MB", 500_000_000), ("2.5 GB", 2_500_000_000), ("5GB", 5 * 10**9)])
def test_a_shard_size_is_in_powers_of_ten(said, expected):
    assert Upcast(max_shard_size=said).max_shard_bytes == expected


@pytest.mark.parametrize("said", ["5", "0GB", "-1GB", "1TB", "GB", "5 gigabytes"])
def test_what_is_no_shard_size_is_refused(said):
    with pytest.raises(ValidationError):
        Upcast(max_shard_size=said)
