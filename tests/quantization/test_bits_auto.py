"""`bits: auto`: a mix of bits within a budget, written as gptqmodel's `dynamic`, read back by us and by gptqmodel."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import child, progress
from pipeline.bit_budget import Choice, affordable, allocate, check_budget, packed_bytes
from pipeline.catalog import DENSE
from pipeline.checkpoint import Checkpoint
from pipeline.errors import RecipeError, UnsupportedFormat
from pipeline.evaluation.tasks import ENVIRONMENT
from pipeline.execute import run_step
from pipeline.inspection import inspect
from pipeline.jobs import Job
from pipeline.kept import Donor, Kept
from pipeline.needs import quantizing_disk
from pipeline.plan import make_plan
from pipeline.quantization import engine, writers
from pipeline.quantization.gptq import round_each, round_gptq
from pipeline.quantization.reloaded import Reloaded
from pipeline.recipe import parse_recipe
from pipeline.reloadable import check_reload
from pipeline.sizes import dense_sizes
from pipeline.stages import upcast
from pipeline.targets import AUTO_BITS, GPTQTarget, parse_target
from tests.checkpoints import tiny_llama
from tests.classifiers import tiny_head
from tests.quantization.test_engine import Killed, contents, orders, restored

BUDGET = 6.0
AUTO = f"gptq:bits=auto,bits_per_weight={BUDGET},group_size=32"
PLAIN = {bits: f"gptq:bits={bits},group_size=32" for bits in AUTO_BITS}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("dense"), hidden=64, intermediate=128, layers=2)


@pytest.fixture(scope="module")
def mixed(dense, tmp_path_factory):
    """(the mixed order, what was written, bits → the order of all modules in so many, the run's messages)."""
    given, said = orders(tmp_path_factory.mktemp("mixed"), dense, AUTO, *PLAIN.values()), []
    with progress.shown_by(lambda event: said.append(event.text) if isinstance(event, progress.Message) else None):
        written = engine.write(given)
    return given[0], written[0], dict(zip(PLAIN, given[1:], strict=True)), said


def drawn(seed: int) -> tuple[dict[str, list[Choice]], int]:
    """Modules of four sizes with errors that fall with their bits, and a budget between the least and the most."""
    numbers = random.Random(seed)
    choices = {}
    for index in range(6):
        sides, error = numbers.choice([64, 128, 256, 512]), numbers.expovariate(1)
        choices[f"m{index}"] = [
            Choice(bits=bits, nbytes=packed_bytes((sides, 64), bits=bits, group_size=32),
                   error=error * 4.0**-bits * numbers.uniform(0.5, 2)) for bits in AUTO_BITS
        ]  # fmt: skip
    least, most = (sum(find(c.nbytes for c in found) for found in choices.values()) for find in (min, max))
    return choices, numbers.randint(least, most)


def taken(choices, found) -> list[Choice]:
    return [next(choice for choice in choices[module] if choice.bits == bits) for module, bits in found.items()]


@pytest.mark.parametrize("seed", range(40))
def test_a_mix_fits_and_nothing_that_would_help_is_left_to_buy(seed):
    choices, allowed = drawn(seed)
    found = allocate(choices, allowed)
    left = allowed - sum(choice.nbytes for choice in taken(choices, found))
    assert left >= 0
    for own, others in zip(taken(choices, found), choices.values(), strict=True):
        assert not [other for other in others if other.error < own.error and other.nbytes - own.nbytes <= left]


@pytest.mark.parametrize("seed", range(10))
def test_a_mix_loses_at_most_one_modules_step_more_than_the_best_there_is(seed):
    choices, allowed = drawn(seed)
    every = (mix for mix in itertools.product(*choices.values()) if sum(c.nbytes for c in mix) <= allowed)
    best = min(sum(choice.error for choice in mix) for mix in every)
    step = max(found[0].error - found[-1].error for found in choices.values())
    assert sum(choice.error for choice in taken(choices, allocate(choices, allowed))) <= best + step


def test_the_bits_go_where_they_save_most():
    sizes = {bits: packed_bytes((64, 64), bits=bits, group_size=32) for bits in AUTO_BITS}
    choices = {
        name: [Choice(bits=bits, nbytes=sizes[bits], error=scale * 4.0**-bits) for bits in AUTO_BITS]
        for name, scale in {"dull": 1, "keen": 1000}.items()
    }
    assert allocate(choices, sizes[3] + sizes[8]) == {"dull": 3, "keen": 8}


def test_each_number_of_bits_is_rounded_as_it_is_alone():
    numbers = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(24, 64, generator=numbers), torch.randn(200, 64, generator=numbers)
    targets = [GPTQTarget(format="gptq", bits=bits, group_size=32) for bits in AUTO_BITS]
    for found, target in zip(round_each(weight, rows.T @ rows, targets=targets), targets, strict=True):
        alone = round_gptq(weight, rows.T @ rows, target=target)
        assert found.bits == target.bits
        assert torch.equal(found.codes, alone.codes)
        assert torch.equal(found.scales, alone.scales)


def test_the_folder_keeps_the_budget_and_is_within_one_modules_step_of_it(mixed):
    order, written, *_ = mixed
    assert len(set(written.bits.values())) > 1
    tensors = load_file(order.out / "model.safetensors")
    packed = [tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in written.bits]
    weights = sum(tensor.numel() for name, tensor in load_file(order.dense / "model.safetensors").items()
                  if name.removesuffix(".weight") in written.bits)  # fmt: skip
    nbytes = sum(tensor.nbytes for tensor in packed)
    assert written.packed_bits_per_weight == 8 * nbytes / weights
    assert nbytes <= BUDGET * weights / 8 < nbytes + 64 * 128 * 5 // 8


def test_each_module_is_what_it_is_where_all_have_its_bits(mixed):
    order, written, plain, _ = mixed
    found = load_file(order.out / "model.safetensors")
    alone = {bits: load_file(one.out / "model.safetensors") for bits, one in plain.items()}
    for module, bits in written.bits.items():
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            assert torch.equal(found[f"{module}.{part}"], alone[bits][f"{module}.{part}"])


def test_the_most_frequent_bits_are_the_configs_and_the_others_are_named(mixed):
    order, written, *_ = mixed
    raw = json.loads((order.out / "config.json").read_text())["quantization_config"]
    assert raw["bits"] == max(AUTO_BITS, key=list(written.bits.values()).count)
    others = {module: bits for module, bits in written.bits.items() if bits != raw["bits"]}
    assert raw["dynamic"] == {f"+:^{module.replace('.', chr(92) + '.')}$": {"bits": b} for module, b in others.items()}


def test_a_message_says_what_the_mix_is(mixed):
    counts = [list(mixed[1].bits.values()).count(bits) for bits in AUTO_BITS]
    named = [f"{count} in {bits}" for count, bits in zip(counts, AUTO_BITS, strict=True) if count]
    first = named[0].replace(" in ", " modules in ") + " bits"
    size = f"{mixed[1].packed_bits_per_weight:.2f} of 6.0 bits per weight"
    assert f"gptq-auto: {', '.join([first, *named[1:]])}; {size}" in mixed[3]


def test_we_read_every_module_by_its_own_bits(mixed, tmp_path):
    order, written, plain, _ = mixed
    found = restored(order.out, tmp_path / "mixed")
    alone = {bits: restored(plain[bits].out, tmp_path / str(bits)) for bits in set(written.bits.values())}
    assert all(torch.equal(found[f"{m}.weight"], alone[bits][f"{m}.weight"]) for m, bits in written.bits.items())
    counted = {bits: list(written.bits.values()).count(bits) for bits in AUTO_BITS}
    facts = inspect(Checkpoint.open(order.out))
    assert facts.bits == {bits: count for bits, count in counted.items() if count}
    assert facts.trainable == "after an upcast only"


@pytest.mark.parametrize("last", [1])
def test_a_killed_run_goes_on_to_the_same_bytes(mixed, dense, tmp_path, monkeypatch, last):
    monkeypatch.setattr(engine, "SAVE_EVERY", 0.0)
    (order,) = orders(tmp_path, dense, AUTO)
    done = []

    def sink(event):
        if isinstance(event, progress.Step):
            done.append(event.done)
            if len(done) == last:
                raise Killed

    with progress.shown_by(sink):
        with pytest.raises(Killed):
            engine.write([order])
        engine.write([order])
    assert done == [1, 2]
    assert contents(order) == contents(mixed[0])


@pytest.mark.slow
def test_gptqmodel_answers_as_our_upcast_does_and_transformers_does_not_load_it(mixed, tmp_path):
    order = mixed[0]
    (output,) = upcast.run(Job(inputs={"source": order.out}, options={"dtype": "float32"}, workspace=tmp_path))
    ask = "tests.quantization.reloading:loaded_logits"
    found, right = (child.run(ask, path, environment=ENVIRONMENT) for path in (order.out, output.folder))
    found, right = torch.tensor(found), torch.tensor(right)
    assert float((found - right).std() / right.std()) < 0.02  # bfloat16
    # Once this passes, `load_model` needs no loader of its own, and docs/quantize.md an exception less.
    with pytest.raises(Exception, match="ignore_mismatched_sizes"):
        child.run("tests.quantization.reloading:logits", order.out, "float32")


def planned(tmp_path: Path, source: Path, target: str, *overrides: str):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the sum of {i} and {i + 1}"}) + "\n" for i in range(40)))
    text = f"""
        {{name: bot, source: {source}, store: {tmp_path / "store"}, quantize: [{target}],
        calibration: {{data: {rows}, samples: 4, sequence_length: 16}}}}"""
    return make_plan(parse_recipe(text, where="r", overrides=overrides))


RECIPE = "{format: gptq, bits: auto, bits_per_weight: 6, group_size: 32}"


@pytest.fixture
def _here(monkeypatch):
    """The engine runs in this process: what a child costs is no part of it."""
    monkeypatch.setattr(child, "run", lambda _, given, **__: engine.write(given))
    monkeypatch.setattr(writers, "reload", lambda made: [Reloaded(seconds=0.0)] * len(made))


def made(plan):
    for step in plan.steps:
        found = run_step(plan, step, isolated=False)
    return found["gptq-auto"]


@pytest.mark.usefixtures("_here")
def test_an_artifact_notes_the_bits_and_gives_them_to_what_did_not_change(dense, tmp_path):
    first = made(planned(tmp_path, dense, RECIPE))
    notes, metrics = first.manifest.notes, first.manifest.metrics
    assert len(notes["bits"]) == metrics["packed_modules"] == 14
    assert metrics["packed_bits_per_weight"] <= 6
    changed = tmp_path / "changed"
    tiny_llama(changed, hidden=64, intermediate=128, layers=2)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= -1
    tensors["lm_head.weight"] *= -1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    second = made(planned(tmp_path, changed, RECIPE))
    assert second.manifest.metrics["copied_modules"] == 13
    assert second.manifest.metrics["packed_bits_per_weight"] <= 6
    assert set(second.manifest.notes["bits"].items()) >= {
        (module, bits) for module, bits in notes["bits"].items() if module != "model.layers.1.mlp.up_proj"
    }
    restored(second.path, tmp_path / "upcast")


@pytest.mark.usefixtures("_here")
def test_a_head_that_changed_costs_no_module_and_the_config_stays(dense, tmp_path):
    first = made(planned(tmp_path, dense, RECIPE))
    changed = tiny_llama(tmp_path / "changed", hidden=64, intermediate=128, layers=2)
    tensors = load_file(changed / "model.safetensors")
    tensors["lm_head.weight"] *= -1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    second = made(planned(tmp_path, changed, RECIPE))
    assert second.manifest.metrics["copied_modules"] == 14
    assert second.manifest.notes["bits"] == first.manifest.notes["bits"]
    assert (second.path / "config.json").read_bytes() == (first.path / "config.json").read_bytes()


def test_donors_that_leave_too_little_for_the_rest_give_nothing(mixed, dense):
    _, written, plain, _ = mixed
    eight, shapes = plain[8], {name: info.shape for name, info in Checkpoint.open(dense).tensors.items()}
    donor = Donor(reference="old", folder=eight.out, made_from={}, packed=dict.fromkeys(written.bits, ""))
    kept = Kept(wanted=frozenset(written.bits), modules=dict.fromkeys(sorted(written.bits)[:-1], donor))
    few = replace(kept, modules=dict.fromkeys(sorted(written.bits)[:3], donor))
    assert not affordable(parse_target(AUTO), kept, shapes).modules
    assert affordable(parse_target(AUTO), few, shapes) == few


def test_all_modules_of_two_donors_are_not_described_by_the_config_of_one(mixed, dense):
    shapes = {name: info.shape for name, info in Checkpoint.open(dense).tensors.items()}
    packed = dict.fromkeys(mixed[1].bits, "")
    three, four = (
        Donor(reference=str(bits), folder=mixed[2][bits].out, made_from={}, packed=packed) for bits in (3, 4)
    )
    first = min(packed)
    kept = Kept(wanted=frozenset(packed), modules={module: three if module == first else four for module in packed})
    assert kept.described_by
    assert affordable(parse_target(AUTO), kept, shapes).described_by is None


def test_a_budget_below_the_fewest_bits_is_refused_with_the_least_that_is_possible(dense, tmp_path):
    with pytest.raises(
        UnsupportedFormat, match=r"gptq-auto: bits_per_weight 3.0 is less .* at least (\d+\.\d+)"
    ) as said:
        planned(tmp_path, dense, RECIPE.replace("6", "3", 1))
    least = str(said.value).rpartition(" ")[2]
    sizes = dense_sizes(Checkpoint.open(dense), DENSE)
    check_budget(sizes, parse_target(AUTO.replace("6.0", least)))
    with pytest.raises(UnsupportedFormat):
        check_budget(sizes, parse_target(AUTO.replace("6.0", str(float(least) - 0.0001))))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gptq:bits=auto", "go together; give both, or bits as a number"),
        ("gptq:bits=4,bits_per_weight=4.5", "go together"),
        ("gptq:bits=auto,bits_per_weight=0", "greater than 0"),
        (f"{AUTO},engine=gptqmodel", "bits auto has no engine; leave it out"),
        (f"{AUTO},rounding=nearest", "bits auto has no rounding"),
        (f"{AUTO},sequential=true", "bits auto has no sequential"),
        (f"{AUTO},grid=keep", "bits auto has no grid"),
    ],
)
def test_what_auto_does_not_go_with_is_said_in_one_sentence(text, said):
    with pytest.raises(RecipeError, match=said):
        parse_target(text)


def test_a_target_without_a_budget_is_what_it_was_before_there_were_any():
    assert "bits_per_weight" not in parse_target("gptq").model_dump()
    assert parse_target(AUTO).model_dump()["bits_per_weight"] == BUDGET


def test_the_disk_holds_every_candidate_until_the_mix_is_chosen(dense):
    sizes = dense_sizes(Checkpoint.open(dense), DENSE)
    each = [sizes.quantized_bytes(parse_target(text), "bfloat16") for text in PLAIN.values()]
    auto = parse_target(AUTO)
    assert quantizing_disk(sizes, auto, "bfloat16") == sizes.quantized_bytes(auto, "bfloat16") + sum(each)


def test_what_gptqmodel_does_not_load_is_refused_with_different_bits_alone(tmp_path):
    classifier = Checkpoint.open(tiny_head(tmp_path, "LlamaForSequenceClassification"))
    sizes = dense_sizes(classifier, DENSE)
    check_reload(classifier, sizes, parse_target("gptq"))
    with pytest.raises(UnsupportedFormat, match=r"causal language model.; give bits as a number"):
        check_reload(classifier, sizes, parse_target(AUTO))


def test_nothing_trains_on_different_bits(mixed, tmp_path):
    train = f"train={{method: lora, base: source, data: {tmp_path / 'rows.jsonl'}}}"
    with pytest.raises(RecipeError, match=r"different bits .dynamic., which transformers does not load"):
        planned(tmp_path, mixed[0].out, "{format: bitsandbytes}", train)
