"""A model folder is opened only where it is whole and stays inside itself."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoint import INDEX, Checkpoint, inside, read_json
from pipeline.errors import CheckpointError, CorruptShard, MissingTensor, UnexpectedTensor, UnsafePath
from pipeline.quantization_config import Quantization
from pipeline.sources import open_source
from tests.checkpoints import tiny_llama


def sharded(folder, weight_map=None, config=None):
    """Two shards, `a` in the first and `b` in the second, with an index."""
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"} if weight_map is None else weight_map
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"), layers=1)


def test_a_folder_that_transformers_wrote_is_opened(llama):
    checkpoint = Checkpoint.open(llama)
    assert checkpoint.model_type == "llama"
    assert checkpoint.quantization is None
    assert checkpoint.shards == ("model.safetensors",)
    assert checkpoint.tensors["model.norm.weight"].shape == (128,)
    assert checkpoint.companions == ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    assert checkpoint.files[0] == "config.json"
    assert checkpoint.nbytes == 2 * sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())


def test_a_tied_weight_is_stored_once(tmp_path):
    checkpoint = Checkpoint.open(tiny_llama(tmp_path, layers=1, tied=True))
    assert "lm_head.weight" not in checkpoint.tensors
    assert "model.embed_tokens.weight" in checkpoint.tensors


def test_shards_are_found_through_the_index(tmp_path):
    checkpoint = Checkpoint.open(sharded(tmp_path))
    assert checkpoint.weight_map == {"a": "one.safetensors", "b": "two.safetensors"}
    assert checkpoint.shards == ("one.safetensors", "two.safetensors")
    assert checkpoint.nbytes == 20


def test_what_goes_with_the_weights_is_found_and_what_is_written_anew_is_not(tmp_path):
    sharded(tmp_path)
    (tmp_path / "chat_templates").mkdir()
    for name in (
        "merges.txt",
        "modeling_own.py",
        "chat_templates/tool.jinja",
        "LICENSE",
        "quantize_config.json",
        "x.bin",
    ):
        (tmp_path / name).write_text("{}")
    found = Checkpoint.open(tmp_path).companions
    assert found == ("LICENSE", "chat_templates/tool.jinja", "merges.txt", "modeling_own.py")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(("text", "said"), [("{", "cannot be read as JSON"), ("[]", "holds list"), ("\xff", "JSON")])
def test_a_config_that_is_no_object_is_refused(tmp_path, text, said):
    sharded(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        read_json(tmp_path / "config.json")


def test_a_shard_cut_short_is_refused(tmp_path):
    sharded(tmp_path)
    raw = (tmp_path / "two.safetensors").read_bytes()
    (tmp_path / "two.safetensors").write_bytes(raw[:-1])
    with pytest.raises(CorruptShard, match=r"two\.safetensors: has \d+ bytes, its header accounts for \d+"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_refused(tmp_path):
    sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CorruptShard, match=r"two\.safetensors is named by .* but missing"):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    sharded(tmp_path)
    save_file({"b": torch.zeros(3), "a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(UnexpectedTensor, match=r"a: is in both one\.safetensors and two\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"},
        {"a": "two.safetensors", "b": "one.safetensors"},
    ],
)
def test_an_index_that_places_a_tensor_where_it_is_not_is_refused(tmp_path, weight_map):
    with pytest.raises(MissingTensor, match=r"places it in .*, which does not hold it"):
        Checkpoint.open(sharded(tmp_path, weight_map))


@pytest.mark.parametrize("weight_map", [{}, [], "one.safetensors", {"a": 1}])
def test_an_index_without_a_weight_map_is_refused(tmp_path, weight_map):
    with pytest.raises(CheckpointError, match="has no weight_map"):
        Checkpoint.open(sharded(tmp_path, weight_map))


@pytest.mark.parametrize("name", ["../two.safetensors", "/etc/passwd", "x/../../two.safetensors", "a\\b", "a\0b", ""])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(UnsafePath, match="leaves the folder"):
        Checkpoint.open(sharded(folder, {"a": name}))


@pytest.mark.parametrize("name", ["two.safetensors", "config.json", "vocab.txt", INDEX])
def test_a_link_out_of_the_folder_is_refused(tmp_path, name):
    folder = sharded(tmp_path / "model")
    (folder / "vocab.txt").write_text("")
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafePath, match="is a link that leaves the folder"):
        Checkpoint.open(folder)


def test_a_link_inside_the_folder_is_followed(tmp_path):
    folder = sharded(tmp_path)
    (folder / "two.safetensors").rename(folder / "real.safetensors")
    (folder / "two.safetensors").symlink_to("real.safetensors")
    assert "b" in Checkpoint.open(folder).tensors
    assert inside(folder, "two.safetensors") == folder / "two.safetensors"


def test_a_pickle_is_never_opened(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="found none"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin, a pickle, which is never opened"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False}, ("gptq", 4, 128, False, ())),
        ({"quant_method": "gptq", "bits": "8"}, ("gptq", 8, -1, True, ())),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, ("awq", 4, 64, False, ())),
        (
            {"quant_method": "awq", "bits": 4, "zero_point": False, "modules_to_not_convert": ["gate"]},
            ("awq", 4, 128, True, ("gate",)),
        ),
        ({"load_in_4bit": True, "load_in_8bit": False}, ("bitsandbytes", 4, 64, True, ())),
        ({"load_in_8bit": True}, ("bitsandbytes", 8, -1, True, ())),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]},
            ("bitsandbytes", 8, -1, True, ("lm_head",)),
        ),
    ],
)
def test_a_quantization_config_is_parsed(raw, expected):
    found = Quantization.parse(raw)
    assert (found.method, found.bits, found.group_size, found.symmetric, found.ignored) == expected
    assert found.raw == raw


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"bits": 4}, "names no quant_method"),
        ({"quant_method": "gptq", "bits": "four"}, "unreadable value"),
        ({"quant_method": "gptq", "bits": None}, "unreadable value"),
        ({"quant_method": "gptq", "bits": 4, "group_size": float("inf")}, "unreadable value"),
        ({"quant_method": "gptq", "bits": 4, "modules_to_not_convert": 3}, "unreadable value"),
        ([4], "quantization_config is list"),
    ],
)
def test_a_quantization_config_that_cannot_be_read_is_refused(tmp_path, raw, said):
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(sharded(tmp_path, config={"quantization_config": raw}))


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "loop"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UnsafePath, match="which cannot be opened"):
        inside(tmp_path, name)


def test_json_with_half_a_character_is_refused(tmp_path):
    """No file could be written with it again."""
    (tmp_path / "config.json").write_text('{"hidden_act": "\\ud800"}')
    with pytest.raises(CheckpointError, match="surrogates not allowed"):
        read_json(tmp_path / "config.json")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub cache, offline, with two revisions of org/tiny: main, and the older branch old."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--tiny"
    for commit, branch, hidden in (("a" * 40, "main", 128), ("b" * 40, "old", 64)):
        built = tiny_llama(tmp_path / branch, layers=1, hidden=hidden)
        snapshot = repository / "snapshots" / commit
        for folder in (repository / "blobs", repository / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        for path in built.iterdir():
            path.rename(repository / "blobs" / f"{branch}-{path.name}")
            (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", f"{branch}-{path.name}"))  # noqa: PTH118
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


@pytest.mark.parametrize(
    ("source", "hidden"),
    [("org/tiny", 128), ("org/tiny@main", 128), ("org/tiny@old", 64), (f"org/tiny@{'b' * 40}", 64)],
)
def test_a_hub_id_is_taken_from_the_local_cache(hub, source, hidden):
    """The cache's links into its own blobs are followed."""
    checkpoint = open_source(source)
    assert checkpoint.config["hidden_size"] == hidden
    assert checkpoint.path.parent == hub / "snapshots"
    assert "tokenizer.json" in checkpoint.companions


def test_a_link_out_of_the_hub_cache_is_refused(hub, tmp_path):
    shard = hub / "snapshots" / ("a" * 40) / "model.safetensors"
    shard.resolve().rename(tmp_path / "outside")
    shard.unlink()
    shard.symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafePath, match="leaves the folder"):
        open_source("org/tiny")


@pytest.mark.parametrize("source", ["org/gone", "org/tiny@gone"])
def test_a_hub_id_that_the_cache_lacks_is_a_sentence(hub, source):
    with pytest.raises(CheckpointError, match=f"{source}: no such folder, and the hub did not give it") as caught:
        open_source(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["./gone", "/gone", "~/gone", "gone", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(source):
    with pytest.raises(CheckpointError, match=r"no such folder; name a folder, a hub id"):
        open_source(source)


def test_a_folder_wins_over_a_hub_id(llama):
    assert open_source(str(llama)).path == llama
