"""Blocks go through threads and make what one thread makes; memory is bounded by the blocks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import synthetic
from pipeline.catalog import DENSE, FORMATS, format_of
from pipeline.checkpoint import Checkpoint
from pipeline.errors import NonFinite
from pipeline.pieces import Piece
from pipeline.shard_writer import ShardWriter
from pipeline.shards import ShardReader, TensorGroup
from pipeline.upcasting import stream
from pipeline.upcasting.layout import laid_out

SIZE = synthetic.Size(hidden=256, intermediate=512, vocabulary=512, layers=2)


def upcast(source, out, *, threads):
    out.mkdir()
    checkpoint = Checkpoint.open(source)
    row = format_of(checkpoint.quantization)
    with laid_out(checkpoint, row, dtype=torch.bfloat16, trust_remote_code=False) as layout:
        assert not layout.problems
        with ShardWriter(out, layout.shapes) as writer:
            done = list(stream.write(layout.pieces, writer, row, checkpoint.quantization, threads=threads))
    assert sorted(done) == sorted(piece.name for piece in layout.pieces)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["gptq desc_act", "awq", "fp8", "compressed-tensors int4", "int8"])
def test_how_many_threads_and_rows_there_are_changes_no_byte(name, tmp_path, monkeypatch):
    synthetic.write(tmp_path / "source", name, SIZE)
    whole = upcast(tmp_path / "source", tmp_path / "one", threads=1)
    monkeypatch.setattr(stream, "BLOCK", 1 << 10)  # the least that is taken is 128 rows
    assert upcast(tmp_path / "source", tmp_path / "many", threads=5) == whole


@pytest.mark.parametrize("name", list(synthetic.PACKERS))
def test_a_synthetic_checkpoint_becomes_what_plain_formulas_make_of_it(name, tmp_path):
    source = tmp_path / "source"
    synthetic.write(source, name, synthetic.TINY)
    upcast(source, tmp_path / "out", threads=2)
    written, stored = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    for linear, shape in synthetic.TINY.linears.items():
        module = f"model.layers.0.{linear}."
        parts = {key.removeprefix(module): tensor for key, tensor in stored.items() if key.startswith(module)}
        expected = synthetic.truth(name, parts).bfloat16()
        assert expected.shape == shape
        assert torch.equal(written[f"{module}weight"], expected), linear


def piece(tensor, *, finish=None, dtype=torch.float32):
    group = TensorGroup(module="a", dense_name="a.weight", tensors={"weight": tensor}, packed=False)
    shape = tuple(tensor.shape if finish is None else finish(tensor).shape)
    return Piece(name="a.weight", group=group, dtype=dtype, shape=shape, finish=finish)


def written(folder, one):
    with ShardWriter(folder, {one.name: ("F32", one.shape)}) as writer:
        list(stream.write([one], writer, DENSE, None))
    return load_file(folder / "model.safetensors")["a.weight"]


@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 4), (300, 5), (3, 2, 4), (2, 3, 4, 5)])
def test_tensors_of_every_rank_come_through(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 8)
    tensor = torch.randn(shape)
    assert torch.equal(written(tmp_path, piece(tensor)), tensor)


def test_a_piece_that_is_finished_is_taken_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 8)
    tensor = torch.randn(300, 5)
    assert torch.equal(written(tmp_path, piece(tensor, finish=torch.t)), tensor.T)


def test_the_scales_of_an_activation_are_divided_out_of_every_row(tmp_path):
    tensor, scales = torch.randn(300, 4), torch.tensor([1.0, 2.0, 4.0, 0.5])
    one = piece(tensor)
    folded = Piece(name=one.name, group=one.group, dtype=one.dtype, shape=one.shape, divided_by=scales)
    assert torch.equal(written(tmp_path, folded), tensor / scales)


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (torch.nan, torch.float32, "holds NaN or infinity"),
        (-torch.inf, torch.bfloat16, "holds NaN or infinity"),
        (1e5, torch.float16, "too large for F16"),
        (3.4e38, torch.bfloat16, "too large for BF16"),
    ],
)
def test_one_bad_value_stops_it_and_leaves_no_file(value, dtype, said, tmp_path):
    tensor = torch.zeros(300, 4)
    tensor[299, 3] = value
    one = piece(tensor, dtype=dtype)
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    with pytest.raises(NonFinite, match=said), ShardWriter(tmp_path, {one.name: (name, one.shape)}) as writer:
        list(stream.write([one], writer, DENSE, None))
    assert not list(tmp_path.iterdir())


def test_the_callers_threads_are_as_many_as_before(tmp_path):
    before = torch.get_num_threads()
    written(tmp_path, piece(torch.ones(3)))
    assert torch.get_num_threads() == before


def test_without_a_gpu_the_cores_compute(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stream.fastest([piece(torch.ones(3))], DENSE, None) == stream.CPU


def test_a_packed_module_has_one_digest_wherever_its_tensors_lie(tmp_path):
    synthetic.write(tmp_path / "source", "gptq", synthetic.TINY)
    checkpoint = Checkpoint.open(tmp_path / "source")
    digests = stream.packed_digests(checkpoint, FORMATS["gptq"])
    assert digests.keys() == {f"model.layers.0.{linear}" for linear in synthetic.TINY.linears}
    with ShardReader(checkpoint) as reader:
        tensors = {name: reader[name].clone() for name in checkpoint.tensors}
    (tmp_path / "two").mkdir()
    halves = list(tensors)[::2], list(tensors)[1::2]
    weight_map = {name: f"{i}.safetensors" for i, half in enumerate(halves) for name in half}
    for i, half in enumerate(halves):
        save_file({name: tensors[name] for name in half}, tmp_path / "two" / f"{i}.safetensors")
    (tmp_path / "two" / "config.json").write_bytes((tmp_path / "source" / "config.json").read_bytes())
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert stream.packed_digests(Checkpoint.open(tmp_path / "two"), FORMATS["gptq"]) == digests


PROGRAM = """
import resource, sys
from pathlib import Path
from pipeline.jobs import Job
from pipeline.stages import upcast
job = Job(inputs={"source": Path(sys.argv[1])}, options={"dtype": "bfloat16"}, workspace=Path(sys.argv[2]))
list(upcast.run(Job(inputs={"source": Path(sys.argv[3])}, options=job.options, workspace=job.workspace)))
def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024
import threading, time
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous() - before)
watcher = threading.Thread(target=watch)
watcher.start()
list(upcast.run(job))
done.set()
watcher.join()
print(peak[0])
"""


@pytest.mark.parametrize("name", ["nf4", "gptq desc_act"])
def test_anonymous_memory_is_bounded_by_the_largest_tensor(name, tmp_path):
    """A model of 240 MB in bf16, whose largest tensor has 8 MB: the bound of 4 x 8 + 300 MB is not approached."""
    large = synthetic.Size(hidden=1024, intermediate=4096, vocabulary=4096, layers=8)
    synthetic.write(tmp_path / "large", name, large)
    synthetic.write(tmp_path / "small", name, synthetic.TINY)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "large"), str(tmp_path), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout.split()[-1]) < 100e6
