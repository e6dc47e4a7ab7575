"""Digests say what bytes are, and the cache forgets a file that changed."""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import save_file

from pipeline.digests import DigestCache, content_digest, digest_file, digest_shard, digest_value


def test_a_value_has_one_digest_whatever_the_order_of_its_keys():
    assert digest_value({"a": 1, "b": [2]}) == digest_value({"b": [2], "a": 1})
    assert digest_value({"a": 1}) != digest_value({"a": 2})


def test_a_shard_is_hashed_whole_and_tensor_by_tensor_in_one_pass(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0), "c": torch.ones(2)}, path)
    whole, parts = digest_shard(path)
    assert whole == hashlib.sha256(path.read_bytes()).hexdigest() == digest_file(path)
    assert parts.keys() == {"a", "b", "c"}
    expected = hashlib.sha256(b"F32[2, 3]" + torch.arange(6.0).numpy().tobytes()).hexdigest()
    assert parts["a"] == expected


def test_tensors_with_the_same_bytes_and_another_shape_differ(tmp_path):
    save_file({"a": torch.ones(6), "b": torch.ones(2, 3)}, tmp_path / "m.safetensors")
    _, parts = digest_shard(tmp_path / "m.safetensors")
    assert parts["a"] != parts["b"]


def test_the_cache_reads_a_file_again_once_it_changed(tmp_path):
    file, memory = tmp_path / "f", tmp_path / "cache" / "digests.json"
    file.write_text("one")
    cache = DigestCache(memory)
    first = cache.file(file)
    cache.save()
    assert DigestCache(memory).file(file) == first
    file.write_text("other")
    assert DigestCache(memory).file(file) == digest_file(file) != first


def test_a_damaged_or_unwritable_cache_costs_time_only(tmp_path):
    file = tmp_path / "f"
    file.write_text("one")
    (tmp_path / "digests.json").write_text("{")
    assert DigestCache(tmp_path / "digests.json").file(file) == digest_file(file)
    below_a_file = DigestCache(file / "digests.json")
    below_a_file.file(file)
    below_a_file.save()


def test_a_folder_is_its_names_and_contents():
    assert content_digest({"a": "1", "b": "2"}) == content_digest({"b": "2", "a": "1"})
    assert content_digest({"a": "1"}) != content_digest({"b": "1"})


def test_several_files_are_their_contents_in_order_and_one_is_itself(tmp_path):
    for name, content in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / name).write_text(content)
    cache = DigestCache(tmp_path / "digests.json")
    a, b, c = (tmp_path / name for name in "abc")
    assert cache.sequence([a]) == cache.file(a)
    assert cache.sequence([a, b]) == cache.sequence([c, b])
    assert len({cache.sequence([a, b]), cache.sequence([b, a]), cache.sequence([a]), cache.sequence([a, c])}) == 4
