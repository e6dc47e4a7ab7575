"""One pass gives every target's folder; a run that was killed goes on to the same bytes."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import child, progress
from pipeline.catalog import FORMATS
from pipeline.checkpoint import Checkpoint
from pipeline.errors import NonFinite, RequantError
from pipeline.jobs import Job
from pipeline.kept import Donor
from pipeline.quantization import engine, writers
from pipeline.quantization.folder import Order
from pipeline.stages import upcast
from pipeline.targets import parse_target
from pipeline.upcasting.stream import packed_digests
from tests.checkpoints import tiny_llama

LAYERS = 3


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("dense"), hidden=64, intermediate=128, layers=LAYERS)


def rows(count=6, length=32, seed=0):
    drawn = torch.randint(3, 255, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(map(tuple, drawn))


def orders(folder, dense, *targets, **more):
    return [
        Order(
            dense=dense, out=folder / target.variant, scratch=folder / f"{target.variant}.scratch", target=target,
            calibration=rows() if target.calibrated else (), **more,
        )
        for target in map(parse_target, targets)
    ]  # fmt: skip


def contents(order):
    return {path.name: path.read_bytes() for path in sorted(order.out.iterdir())}


def made(folder, dense, *targets):
    given = orders(folder, dense, *targets)
    engine.write(given)
    return [contents(order) for order in given]


def restored(folder, tmp_path):
    """The dense weights of a folder, as the upcast stage reads them."""
    (output,) = upcast.run(Job(inputs={"source": folder}, options={"dtype": "float32"}, workspace=tmp_path))
    return load_file(output.folder / "model.safetensors")


TOGETHER = (
    "gptq:group_size=32", "awq:group_size=32", "gptq:bits=3,group_size=32,name=three",
    "gptq:group_size=32,rounding=nearest", "gptq:group_size=32,desc_act=true,symmetric=false,name=ordered",
    "compressed-tensors:group_size=32", "compressed-tensors:scheme=w8a8", "compressed-tensors:scheme=fp8",
)  # fmt: skip


@pytest.fixture(scope="module")
def together(dense, tmp_path_factory):
    """(orders, the events of their one run)."""
    given, events = orders(tmp_path_factory.mktemp("together"), dense, *TOGETHER), []
    with progress.shown_by(events.append):
        engine.write(given)
    return given, events


def test_modules_that_are_all_kept_from_donors_of_which_none_has_them_all_are_copied(dense, tmp_path):
    text = "gptq:group_size=32,rounding=nearest"
    (first,) = orders(tmp_path / "first", dense, text)
    engine.write([first])
    digests = packed_digests(Checkpoint.open(first.out), FORMATS["gptq"])
    donors = []
    for part in ("mlp", "self_attn"):
        packed = {module: digest for module, digest in digests.items() if part in module}
        folder = shutil.copytree(first.out, tmp_path / part)
        donors.append(Donor(reference=f"bot/{part}", folder=folder, made_from={}, packed=packed))
    kept = {module: donor for donor in donors for module in donor.packed}
    (second,) = orders(tmp_path / "second", dense, text, kept=kept)
    engine.write([second])
    assert len(kept) == 7 * LAYERS
    assert contents(second) == contents(first)


def test_targets_that_share_a_pass_get_what_each_gets_alone(together, dense, tmp_path):
    for order, text in zip(together[0], TOGETHER, strict=True):
        (alone,) = made(tmp_path, dense, text)
        assert alone == contents(order), text


def test_each_layer_is_one_event_for_all_that_share_the_pass(together):
    steps = [event for event in together[1] if isinstance(event, progress.Step)]
    floor, shared = (
        [(step.done, step.total) for step in steps if step.unit == unit]
        for unit in ("rtn-4bit layers", "gptq-4bit, awq-4bit, three, ordered, w4a16, w8a8 layers")
    )
    assert floor == shared == [(done, LAYERS) for done in range(1, LAYERS + 1)]


def test_both_algorithms_are_nearer_to_the_dense_outputs_than_rounding_to_nearest(together, dense, tmp_path):
    before = {name: tensor.float() for name, tensor in load_file(dense / "model.safetensors").items()}
    hidden = before["model.embed_tokens.weight"][torch.tensor(rows())].flatten(0, 1)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)

    def queries(weights):
        layer = "model.layers.0"
        normed = hidden * weights[f"{layer}.input_layernorm.weight"]
        return normed @ weights[f"{layer}.self_attn.q_proj.weight"].T

    folders = [restored(order.out, tmp_path / order.target.variant) for order in together[0]]
    gptq, awq, _, nearest, _, w4a16, w8a8, fp8 = (
        float((queries(weights) - queries(before)).norm()) for weights in folders
    )
    assert gptq < 0.9 * nearest
    assert awq < 0.95 * nearest
    assert w4a16 < 1.05 * gptq  # whose scales have three digits more
    assert w8a8 < 0.2 * gptq
    assert fp8 < 0.6 * gptq


class Killed(Exception):
    """Stands for whatever ends a run in its middle."""


@pytest.mark.parametrize(
    "target",
    [
        "gptq:group_size=32",
        "awq:group_size=32",
        "gptq:group_size=32,sequential=true",
        "compressed-tensors:group_size=32",
        "compressed-tensors:scheme=w8a8,sequential=true",
        "compressed-tensors:scheme=fp8",
    ],
)
@pytest.mark.parametrize("last", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes_and_repeats_no_layer(tmp_path, dense, monkeypatch, target, last):
    monkeypatch.setattr(engine, "SAVE_EVERY", 0.0)
    (whole,) = made(tmp_path / "whole", dense, target)
    (order,) = orders(tmp_path, dense, target)
    done = []

    def sink(event):
        if isinstance(event, progress.Step):
            done.append(event.done)
            if event.done == last and len(done) == last:
                raise Killed

    with progress.shown_by(sink):
        with pytest.raises(Killed):
            engine.write([order])
        engine.write([order])
    assert contents(order) == whole
    assert done == [*range(1, last + 1), *range(last + 1, LAYERS + 1)]


def test_a_target_that_joins_after_a_kill_gets_every_layer(tmp_path, dense, monkeypatch):
    monkeypatch.setattr(engine, "SAVE_EVERY", 0.0)
    first, joining = orders(tmp_path, dense, "gptq:group_size=32", "awq:group_size=32")

    def dies(event):
        if isinstance(event, progress.Step) and event.done == LAYERS - 1:
            raise Killed

    with progress.shown_by(dies), pytest.raises(Killed):
        engine.write([first])
    engine.write([first, joining])
    assert [contents(first), contents(joining)] == made(
        tmp_path / "alone", dense, "gptq:group_size=32", "awq:group_size=32"
    )


def test_what_another_order_left_is_not_gone_on_from(tmp_path, dense, monkeypatch):
    monkeypatch.setattr(engine, "SAVE_EVERY", 0.0)
    (order,) = orders(tmp_path, dense, "gptq:group_size=32")
    with progress.shown_by(lambda _: (_ for _ in ()).throw(Killed)), pytest.raises(Killed):
        engine.write([order])
    other = replace(order, calibration=rows(seed=1))
    engine.write([other])
    alone = replace(other, out=tmp_path / "alone", scratch=tmp_path / "alone.scratch")
    engine.write([alone])
    assert contents(other) == contents(alone)


def test_sequential_calibration_gives_later_layers_other_codes(together, dense, tmp_path):
    (found,) = orders(tmp_path, dense, "gptq:group_size=32,sequential=true")
    engine.write([found])
    plain, sequential = (load_file(order.out / "model.safetensors") for order in (together[0][0], found))
    same = {name for name in plain if torch.equal(plain[name], sequential[name])}
    assert all(name in same for name in plain if ".layers.0." in name)
    assert not any(name in same for name in plain if ".layers.2." in name and name.endswith("qweight"))


def test_an_error_names_the_module_and_leaves_no_folder(tmp_path):
    dense = tiny_llama(tmp_path / "dense", hidden=64, intermediate=128, layers=1, dtype="float32")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e30
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    for target in ("gptq:group_size=32", "awq:group_size=32", "gptq:group_size=32,rounding=nearest",
                   "compressed-tensors:group_size=32"):  # fmt: skip
        (order,) = orders(tmp_path / "work", dense, target)
        with pytest.raises(RequantError, match=r"^model\.layers\.0\.mlp\.(gate_proj|up_proj|down_proj): "):
            engine.write([order])
        assert not order.out.exists()


def test_a_parent_that_holds_a_number_that_is_none_is_refused_before_the_pass(tmp_path, dense):
    broken = tmp_path / "broken"
    tiny_llama(broken, hidden=64, intermediate=128, layers=1)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFinite, match=r"^model\.layers\.0\.mlp\.up_proj\.weight: holds NaN"):
        engine.write(orders(tmp_path / "work", broken, "gptq:group_size=32"))


@pytest.mark.slow
def test_asymmetric_and_ordered_groups_reload_and_agree(together, dense):
    order = together[0][TOGETHER.index("gptq:group_size=32,desc_act=true,symmetric=false,name=ordered")]
    found, right = (child.run("tests.quantization.reloading:logits", path, "float32") for path in (order.out, dense))
    assert not any(found["report"].values()), found["report"]
    found, right = (torch.tensor(one["logits"]) for one in (found, right))
    assert 0 < float((found - right).std() / right.std()) < 0.2


def test_writers_clear_away_what_the_engine_needed(tmp_path, dense):
    given = orders(tmp_path, dense, "gptq:group_size=32", "awq:group_size=32")
    assert [[order for order, _ in made] for made in writers.write(given)] == [given]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["awq-4bit", "gptq-4bit"]
