"""A GGUF file, or the parts of a split one, opens as a checkpoint; what does not belong together is refused."""

import json
import shutil

import pytest

from flows import cli
from pipeline.artifacts import Store
from pipeline.catalog import FORMATS, format_of
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, CorruptShard, DataError, UnexpectedTensor, UnsafePath
from pipeline.gguf_shards import GGUFReader
from pipeline.plan import make_plan
from pipeline.preflight import open_model
from pipeline.recipe import parse_recipe
from pipeline.sizes import dense_sizes
from pipeline.sources import open_source
from tests import gguf_models as models
from tests.checkpoints import tiny_llama


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return models.tiny_llama_gguf(tmp_path_factory.mktemp("one") / "tiny.gguf", kinds=("Q4_K", "Q6_K"))


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    return models.tiny_llama_gguf(folder / "m.gguf", split=8)


def test_a_file_opens_as_a_checkpoint_that_says_its_type(one):
    checkpoint = Checkpoint.open(one)
    assert (checkpoint.path, checkpoint.folder) == (one, one.parent)
    assert (checkpoint.model_type, checkpoint.files, checkpoint.companions) == ("llama", ("tiny.gguf",), ())
    found = checkpoint.quantization
    assert (found.method, found.bits, found.group_size, found.symmetric) == ("gguf", 4, 256, False)
    assert found.raw["metadata"]["llama.block_count"] == 2
    assert format_of(found) is FORMATS["gguf"]
    assert checkpoint.tensors["blk.1.ffn_down.weight"].shape == (256, 512)


def test_a_folder_with_one_gguf_model_opens_as_the_file_does(one, parts, tmp_path):
    assert Checkpoint.open(one.parent) == Checkpoint.open(one) == open_source(str(one))
    assert open_model(str(one), Store.open(str(tmp_path / "store"))) == Checkpoint.open(one)
    assert Checkpoint.open(parts.parent).path == parts


def test_any_part_opens_the_whole_model(parts):
    last = parts.with_name("m-00003-of-00003.gguf")
    assert Checkpoint.open(last) == Checkpoint.open(parts)
    assert len(Checkpoint.open(parts).tensors) == len(models.decoder())


def test_safetensors_beside_a_gguf_file_are_what_the_folder_means(one, tmp_path):
    shutil.copy(one, tiny_llama(tmp_path / "both") / "tiny.gguf")
    assert Checkpoint.open(tmp_path / "both").quantization is None
    assert Checkpoint.open(tmp_path / "both" / "tiny.gguf").is_gguf


def test_several_models_in_a_folder_are_named_and_one_asked_for(one, tmp_path):
    for name in ("q4.gguf", "q8.gguf"):
        shutil.copy(one, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several GGUF models \(q4\.gguf, q8\.gguf\); name the file of one"):
        Checkpoint.open(tmp_path)
    assert Checkpoint.open(tmp_path / "q8.gguf").files == ("q8.gguf",)


def test_a_missing_part_is_named(parts):
    parts.with_name("m-00002-of-00003.gguf").unlink()
    with pytest.raises(CorruptShard, match=r"m-00002-of-00003\.gguf: is part 2 of 3 of the model, but missing"):
        Checkpoint.open(parts)


def test_parts_that_do_not_agree_are_refused(parts, one):
    second, third = (parts.with_name(f"m-0000{i}-of-00003.gguf") for i in (2, 3))
    shutil.copy(third, second)
    with pytest.raises(CorruptShard, match=r"says it is part 2 \(from 0\) of 3, expected 1 of 3 by its name"):
        Checkpoint.open(parts)
    shutil.copy(one, second)
    with pytest.raises(CorruptShard, match=r"says it is part 1 \(from 0\) of 0, expected 1 of 3"):
        Checkpoint.open(parts)
    with pytest.raises(CorruptShard, match="keep the names that the parts were made with"):
        Checkpoint.open(parts.rename(parts.with_name("renamed.gguf")))


def test_a_tensor_in_two_parts_is_refused(parts):
    second = parts.with_name("m-00002-of-00003.gguf")
    raw, number = parts.read_bytes(), b"split.no\x02\x00\x00\x00"
    at = raw.index(number) + len(number)
    second.write_bytes(raw[:at] + b"\x01\x00" + raw[at + 2 :])
    with pytest.raises(UnexpectedTensor, match=r"token_embd\.weight: is in both m-00001"):
        Checkpoint.open(parts)


def test_a_link_that_leaves_the_folder_is_refused(one, tmp_path):
    (tmp_path / "m.gguf").symlink_to(one)
    with pytest.raises(UnsafePath, match=r"m\.gguf is a link that leaves the folder"):
        Checkpoint.open(tmp_path / "m.gguf")


def test_groups_are_the_files_own_bytes(one):
    checkpoint = Checkpoint.open(one)
    with GGUFReader(checkpoint) as reader:
        groups = {group.dense_name: group for group in reader.groups()}
        assert list(groups) == list(checkpoint.tensors)
        for name, info in checkpoint.tensors.items():
            (tensor,) = groups[name].tensors.values()
            raw = one.read_bytes()[info.start : info.end]
            assert tensor.numpy().tobytes() == raw
            assert tensor.data_ptr() % 32 == 0
        assert list(groups["blk.0.attn_q.weight"].tensors) in (["Q4_K"], ["Q6_K"])
        assert groups["blk.0.attn_norm.weight"].tensors["weight"].shape == (256,)
        assert not groups["blk.0.attn_norm.weight"].packed


def test_sizes_are_the_dense_shapes_with_an_entry_for_each_expert(tmp_path):
    shapes = models.decoder(without=models.DENSE_MLP, more=models.experts(768))
    checkpoint = Checkpoint.open(models.write(tmp_path / "m.gguf", "qwen3moe", {}, shapes))
    sizes = dense_sizes(checkpoint, format_of(checkpoint.quantization))
    linears = sizes.linears
    assert linears["blk.1.ffn_up_exps.3"] == (768, 256)
    assert len(linears) == 2 * (4 + 3 * 4)  # four of attention, three for each of four experts
    assert sizes.parameters == 2 * 256 * 256 + 256 + 2 * (2 * 256 + 196608 + 4 * 256 + 3 * 4 * 768 * 256)


def test_inspect_says_what_a_gguf_file_is_and_try_says_what_to_do_first(one, capsys):
    assert cli.run(["inspect", str(one), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["format"], said["bits"], said["shards"], said["problems"]) == ("GGUF", {"4": 8, "7": 8}, 1, [])
    assert cli.run(["try", str(one), "--prompt", "a"]) == 2
    assert "is a GGUF file; run requant upcast on it first" in " ".join(capsys.readouterr().err.split())


def test_a_recipe_takes_a_gguf_file_as_its_source(one, tmp_path, monkeypatch):
    monkeypatch.setenv("REQUANT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "t.jsonl").write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    train = f"{{method: lora, data: {tmp_path}/t.jsonl}}"
    recipe = f"{{schema: 1, name: bot, source: {one}, store: {tmp_path}/store, train: {train}}}"
    with pytest.raises(DataError, match="has no chat template"):
        make_plan(parse_recipe(recipe, where="r.yaml"))
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    plan = make_plan(parse_recipe(recipe, where="r.yaml"))
    assert (plan.format.name, plan.steps[0].stage) == ("gguf", "upcast")
    with one.open("ab") as file:
        file.write(b" ")
    assert make_plan(parse_recipe(recipe, where="r.yaml")).source_digest != plan.source_digest
