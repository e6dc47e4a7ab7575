"""Tensors go to their place, in any order and by rows, and what is whole outlives whoever wrote it."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint import INDEX, Checkpoint
from pipeline.errors import NoSpace
from pipeline.shard_writer import ShardWriter
from pipeline.shards import DTYPE_NAMES, ShardReader


def shapes(tensors):
    return {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_is_written_as_safetensors_reads_it(tmp_path, dtype):
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "one": torch.ones((), dtype=torch.float32).to(dtype)}
    with ShardWriter(tmp_path, shapes(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in ("a",))
    assert shapes(found) == shapes(tensors)


def test_tensors_may_be_empty_transposed_and_written_in_any_order(tmp_path):
    tensors = {"empty": torch.zeros(0, 3), "t": torch.arange(6.0).reshape(2, 3).T, "z": torch.tensor([9.0])}
    with ShardWriter(tmp_path, shapes(tensors)) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_exceeds_a_shard_goes_to_the_next_and_an_index_says_so(tmp_path):
    """40 + 40 bytes fit a shard of 100, the next 40 do not; 400 bytes have a shard of their own."""
    tensors = {
        name: torch.full((n,), float(n)) for name, n in (("a", 10), ("b", 10), ("c", 10), ("big", 100), ("d", 1))
    }
    (tmp_path / "config.json").write_text("{}")
    with ShardWriter(tmp_path, shapes(tensors), max_shard_bytes=100) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    written = Checkpoint.open(tmp_path)
    assert {name: int(shard[6:11]) for name, shard in written.weight_map.items()} == {
        "a": 1,
        "b": 1,
        "c": 2,
        "big": 3,
        "d": 4,
    }
    assert set(written.shards) == {f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)}
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": 524}
    with ShardReader(written) as reader:
        assert all(torch.equal(reader[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_never_written_or_written_otherwise_than_announced_is_a_bug(tmp_path):
    announced = {"a": ("F32", (2,))}
    with pytest.raises(AssertionError, match=r"never written: \['a'\]"), ShardWriter(tmp_path, announced):
        pass
    assert not list(tmp_path.iterdir())
    with ShardWriter(tmp_path, announced) as writer:
        with pytest.raises(AssertionError):
            writer.write("a", torch.zeros(2, dtype=torch.float16))
        with pytest.raises(AssertionError):
            writer.write("a", torch.zeros(3))
        writer.write("a", torch.zeros(2))
        with pytest.raises(AssertionError, match="written twice"):
            writer.write("a", torch.zeros(2))


def test_an_error_inside_the_block_comes_through_and_leaves_no_index(tmp_path):
    announced = {"a": ("F32", (20,)), "b": ("F32", (20,))}
    with pytest.raises(KeyError), ShardWriter(tmp_path, announced, max_shard_bytes=100) as writer:
        writer.write("gone", torch.zeros(2))
    assert not (tmp_path / INDEX).exists()


def test_a_full_disk_says_so_before_the_first_tensor(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(NoSpace, match=r"cannot hold the 4\.00 GB"), ShardWriter(tmp_path, {"a": ("F32", (10**9,))}):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


class TestByRows:
    """Blocks of rows come in any order, from any thread."""

    def test_they_make_the_tensor(self, tmp_path):
        tensors = {"a": torch.arange(30.0).reshape(10, 3), "e": torch.arange(24).reshape(4, 3, 2), "v": torch.ones(5)}
        with ShardWriter(tmp_path, shapes(tensors)) as writer:
            assert not writer.write("a", tensors["a"][4:], first=4)
            assert not writer.write("e", tensors["e"][1:2], first=1)
            assert writer.write("a", tensors["a"][:4])
            assert not writer.write("e", tensors["e"][2:], first=2)
            assert writer.write("e", tensors["e"][:1])
            assert writer.write("v", tensors["v"])
        found = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

    def test_rows_beyond_the_tensor_and_too_many_of_them_are_a_bug(self, tmp_path):
        with pytest.raises(AssertionError), ShardWriter(tmp_path, {"a": ("F32", (4, 2))}) as writer:
            writer.write("a", torch.zeros(2, 2), first=3)
        with pytest.raises(AssertionError, match="twice"), ShardWriter(tmp_path, {"a": ("F32", (4, 2))}) as writer:
            for _ in range(3):
                writer.write("a", torch.zeros(2, 2))

    def test_threads_may_write_at_once(self, tmp_path):
        tensors = {f"t{i}": torch.randn(64, 32) for i in range(8)}
        with ShardWriter(tmp_path, shapes(tensors), max_shard_bytes=20_000) as writer:

            def work(part):
                for name, tensor in tensors.items():
                    writer.write(name, tensor[part::4].contiguous()[:1], first=part)
                    for row in range(part + 4, 64, 4):
                        writer.write(name, tensor[row : row + 1], first=row)

            threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        (tmp_path / "config.json").write_text("{}")
        with ShardReader(Checkpoint.open(tmp_path)) as reader:
            assert all(torch.equal(reader[name], tensor) for name, tensor in tensors.items())


class TestResume:
    """A shard under its own name is whole; a writer of the same shapes keeps it."""

    TENSORS = {"a": torch.arange(20.0), "b": torch.arange(20.0) + 100, "c": torch.arange(20.0) + 200}  # noqa: RUF012

    def interrupted(self, folder, *names):
        with pytest.raises(KeyboardInterrupt), self.writer(folder) as writer:
            for name in names:
                writer.write(name, self.TENSORS[name])
            writer.write("c", self.TENSORS["c"][:7])
            raise KeyboardInterrupt

    def writer(self, folder, *, resume=True):
        return ShardWriter(folder, shapes(self.TENSORS), max_shard_bytes=100, resume=resume)

    def test_only_whole_shards_have_their_names(self, tmp_path):
        self.interrupted(tmp_path, "b")
        assert [path.name for path in tmp_path.iterdir()] == ["model-00002-of-00003.safetensors"]

    def test_what_is_whole_is_kept_and_the_rest_is_written(self, tmp_path):
        self.interrupted(tmp_path, "a", "b")
        kept = tmp_path / "model-00001-of-00003.safetensors"
        inode = kept.stat().st_ino
        with self.writer(tmp_path) as writer:
            assert writer.finished == {"a", "b"}
            writer.write("c", self.TENSORS["c"])
        assert kept.stat().st_ino == inode
        (tmp_path / "config.json").write_text("{}")
        with ShardReader(Checkpoint.open(tmp_path)) as reader:
            assert all(torch.equal(reader[name], tensor) for name, tensor in self.TENSORS.items())

    def test_another_header_or_size_is_written_anew(self, tmp_path):
        self.interrupted(tmp_path, "a", "b")
        (tmp_path / "model-00001-of-00003.safetensors").write_bytes(b"half")
        second = tmp_path / "model-00002-of-00003.safetensors"
        second.write_bytes(second.read_bytes().replace(b"F32", b"I32"))
        with pytest.raises(KeyError), self.writer(tmp_path) as writer:
            assert not writer.finished
            raise KeyError

    def test_nothing_is_kept_unless_asked(self, tmp_path):
        self.interrupted(tmp_path, "a")
        with pytest.raises(KeyError), self.writer(tmp_path, resume=False) as writer:
            assert not writer.finished
            raise KeyError

    def test_a_disk_that_fills_up_halfway_leaves_only_what_is_whole(self, tmp_path, monkeypatch):
        write, tensors = os.pwrite, iter(range(2))

        def full(handle, data, position):
            if len(data) == 80 and next(tensors, None) is None:  # headers are longer
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(handle, data, position)

        monkeypatch.setattr(os, "pwrite", full)
        said = r"cannot hold .* \(No space left on device\); free space"
        with pytest.raises(NoSpace, match=said), self.writer(tmp_path) as writer:
            for name, tensor in self.TENSORS.items():
                writer.write(name, tensor)
        assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())
        monkeypatch.undo()
        with self.writer(tmp_path) as writer:
            for name in self.TENSORS.keys() - writer.finished:
                writer.write(name, self.TENSORS[name])
        assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
