"""What is wrong with a source or a destination ends in one sentence, and leaves both as they were."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows import cli
from pipeline import child
from pipeline.checkpoint import INDEX
from pipeline.headers import MAX_HEADER
from tests.every_format import CONFIG, MODEL, good

Damage = Callable[[Path], None]
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A good checkpoint for each format that is damaged here."""
    folder = tmp_path_factory.mktemp("sources")
    return {name: good(folder / name, name) for name in ("dense", "gptq", "nf4")}


@pytest.fixture
def in_process(monkeypatch):
    """Have a command do its work in this process: a child costs more than all that it does to a tiny model."""

    def run(function, /, *arguments, **_):
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(module), name)(*arguments)

    monkeypatch.setattr(child, "run", run)


def digests(folder: Path) -> dict[str, str]:
    """Every path under a folder and what lies there, links followed."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def sentence(said: str) -> str:
    """The one sentence that a command said, after what it said of its progress."""
    lines = [line for line in said.splitlines() if line.startswith("requant: ")]
    assert len(lines) == 1, said
    assert said.endswith(lines[0] + "\n")
    assert "Traceback" not in said
    return lines[0]


def config(**keys: Any) -> Damage:
    """Set keys of config.json; None removes one."""

    def damage(folder: Path) -> None:
        kept = json.loads((folder / CONFIG).read_text()) | keys
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))

    return damage


def quantization(**keys: Any) -> Damage:
    """Set keys of quantization_config."""

    def damage(folder: Path) -> None:
        kept = json.loads((folder / CONFIG).read_text())
        config(quantization_config=kept["quantization_config"] | keys)(folder)

    return damage


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Damage:
    """Change one tensor of q_proj, or remove it."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / MODEL)
        old = tensors.pop(f"{Q_PROJ}.{name}")
        tensors |= {} if change is None else {f"{Q_PROJ}.{name}": change(old.clone())}
        save_file(tensors, folder / MODEL, metadata={"format": "pt"})

    return damage


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.fill_(value)


def cut_short(folder: Path) -> None:
    os.truncate(folder / MODEL, (folder / MODEL).stat().st_size - 100)


def index_that_leaves(folder: Path) -> None:
    shutil.copy(folder / MODEL, folder.parent / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../outside.safetensors"}}))


def twice(folder: Path) -> None:
    shutil.copy(folder / MODEL, folder / "two.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {"model.norm.weight": MODEL, "lm_head.weight": "two.safetensors"}})
    )


def header_of(length: int, *, real: bool) -> Damage:
    def damage(folder: Path) -> None:
        (folder / MODEL).write_bytes(length.to_bytes(8, "little") + b"{}")
        if real:
            os.truncate(folder / MODEL, 8 + length)

    return damage


def linked_out(name: str) -> Damage:
    def damage(folder: Path) -> None:
        if not (folder / name).exists():
            (folder / name).write_text("{}")
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return damage


def pickled(folder: Path) -> None:
    (folder / MODEL).rename(folder / "pytorch_model.bin")


def listed(folder: Path) -> None:
    (folder / CONFIG).write_text("[1, 2]")


# What is wrong → the format, what does it, and the words in which it must be told.
DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "a quant_state that is no JSON": (
        "nf4", tensor("weight.quant_state.bitsandbytes__nf4", filled(123)), "JSON",
    ),
    "too few absmax": ("nf4", tensor("weight.absmax", lambda old: old[:-1].clone()), "weight.absmax has shape [255]"),
    "a g_idx out of range": ("gptq", tensor("g_idx", filled(7)), "q_proj: g_idx names groups 7 to 7, but there are 1"),
    "no qzeros": ("gptq", tensor("qzeros", None), "qzeros is in no shard"),
    "five bits": ("gptq", quantization(bits=5), "gptq with bits 5 cannot be read"),
    "a shard cut short": ("gptq", cut_short, "the file is damaged, download it again"),
    "an index that leaves the folder": ("dense", index_that_leaves, "which leaves the folder"),
    "a tensor in two shards": ("dense", twice, "is in both model.safetensors and two.safetensors"),
    "a header that claims 100 MB": ("dense", header_of(10**8, real=False), "says its header has 100000000 bytes"),
    "a header that is too large": ("dense", header_of(MAX_HEADER + 8, real=True), "has a header of 34 MB"),
    "a config.json from elsewhere": ("dense", linked_out(CONFIG), "config.json is a link that leaves the folder"),
    "a shard from elsewhere": ("dense", linked_out(MODEL), "model.safetensors is a link that leaves the folder"),
    "a tokenizer from elsewhere": ("dense", linked_out("tokenizer.json"), "tokenizer.json is a link that leaves"),
    "a pickle": ("dense", pickled, "found pytorch_model.bin, a pickle, which is never opened"),
    "an unknown method": ("gptq", quantization(quant_method="magic"), "quant_method magic cannot be read"),
    "too many layers": ("gptq", config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, more than any"),
    "layers that are not there": ("gptq", config(num_hidden_layers=90_000), "far more than the checkpoint holds"),
    "a config.json that is a list": ("dense", listed, "config.json: holds list, expected a JSON object"),
    "a pattern that hangs": (
        "gptq", quantization(dynamic={r"(?:(?:[a-z._0-9]{0,99}){0,99}){0,99}(?<=\s)": {}}), "takes too long to match",
    ),
    "half a character": ("gptq", config(hidden_act="\ud800"), "config.json: cannot be read as JSON"),
    "words for a terminal": (
        "gptq", quantization(quant_method="\033[2J\nrequant: all is well"), r"method \x1b[2J requant: all is well",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.usefixtures("in_process")
def test_a_damaged_source_is_told_of_in_one_sentence_by_upcast_and_by_inspect(sources, tmp_path, capsys, name):
    made_from, damage, said = DAMAGES[name]
    source = tmp_path / "source"
    shutil.copytree(sources[made_from], source)
    damage(source)
    before, around = digests(source), {path.name for path in tmp_path.iterdir()}
    assert cli.run(["upcast", str(source), str(tmp_path / "dense")]) == 2
    captured = capsys.readouterr()
    assert said in sentence(captured.err)
    assert captured.out == ""
    assert {path.name for path in tmp_path.iterdir()} == around, "neither DST nor a work folder is left"
    code = cli.run(["inspect", str(source), "--json"])
    captured = capsys.readouterr()
    facts = captured.out[captured.out.find('{\n  "path"') :]  # libraries greet when they are first imported
    told = [sentence(captured.err)] if code else json.loads(facts)["problems"]
    assert code in {0, 2}
    assert any(said in problem for problem in told), told
    assert digests(source) == before


@pytest.mark.usefixtures("in_process")
def test_weights_that_are_not_finite_fail_in_the_work(sources, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(sources["gptq"], source)
    tensor("scales", filled(torch.nan))(source)
    before = digests(source)
    assert cli.run(["upcast", str(source), str(tmp_path / "dense")]) == 1
    assert "q_proj: scales holds NaN or infinity" in sentence(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert digests(source) == before


def test_a_child_process_tells_it_in_the_same_words(sources, tmp_path, capfd):
    """The line from the other process, where a real command does its work, is the same."""
    source = tmp_path / "source"
    shutil.copytree(sources["nf4"], source)
    tensor("weight.absmax", lambda old: old[:-1].clone())(source)
    assert cli.run(["upcast", str(source), str(tmp_path / "dense")]) == 2
    assert "q_proj: weight.absmax has shape [255]" in sentence(capfd.readouterr().err)
    assert cli.run(["inspect", str(source), "--json"]) == 0
    assert "weight.absmax has shape [255]" in json.loads(capfd.readouterr().out)["problems"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def not_empty(root: Path) -> Path:
    (root / "dense").mkdir()
    (root / "dense" / "notes.txt").write_text("mine")
    return root / "dense"


def a_file(root: Path) -> Path:
    (root / "dense").write_text("mine")
    return root / "dense"


@pytest.mark.parametrize(
    ("destination", "said"),
    [
        (not_empty, "exists and is not empty"),
        (a_file, "exists and is not empty"),
        (lambda root: root / "source" / "dense", "lies inside its input"),
        (lambda root: root / "source" / ".." / "source" / "a" / "b", "lies inside its input"),
        (lambda root: root / "source", "exists and is not empty"),
        (lambda root: root / "file" / "dense", "Not a directory"),
    ],
    ids=["not empty", "a file", "inside SRC", "inside SRC by a detour", "SRC itself", "under a file"],
)
@pytest.mark.usefixtures("in_process")
def test_a_destination_that_cannot_be_is_told_of_before_anything_is_written(
    sources, tmp_path, capsys, destination, said
):
    shutil.copytree(sources["dense"], tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    where = destination(tmp_path)
    before = digests(tmp_path)
    code = cli.run(["upcast", str(tmp_path / "source"), str(where)])
    assert code == (1 if said == "Not a directory" else 2)
    assert said in sentence(capsys.readouterr().err)
    assert digests(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.usefixtures("in_process")
def test_a_parent_that_may_not_be_written_is_one_sentence(sources, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert cli.run(["upcast", str(sources["dense"]), str(tmp_path / "locked" / "dense")]) == 1
    assert "Permission denied" in sentence(capsys.readouterr().err)
