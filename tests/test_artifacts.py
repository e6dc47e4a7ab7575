"""A commit is one rename: a version is whole or absent, and the same fingerprint is committed once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.artifacts import Artifact, Store
from pipeline.errors import NotInStore, RecipeError, StoreCorrupt
from pipeline.manifest import Origin, read_content
from pipeline.upkeep import collect, lineage, remove, verify


def origin(seed: int = 0, parents: dict[str, str] | None = None) -> Origin:
    return Origin(stage="upcast", stage_version=1, options={"seed": seed}, parents=parents or {}, data={})


def write_model(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a.weight": torch.full((4, 4), value), "b.weight": torch.ones(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def commit(
    store: Store, *, seed: int = 0, value: float = 1.0, variant: str = "dense", parent: Artifact | None = None
) -> Artifact:
    made_from = {"source": parent.manifest.fingerprint} if parent else {}
    told = (
        {
            "source": {
                "reference": parent.reference,
                "fingerprint": parent.manifest.fingerprint,
                "digest": parent.manifest.digest,
            }
        }
        if parent
        else {}
    )
    known = origin(seed, made_from)
    with store.workspace(known.fingerprint) as workspace:
        return store.commit(
            write_model(workspace / "out", value), name="bot", variant=variant, origin=known, parents=told,
            metrics={"seconds": 1.0}, notes={},
        )  # fmt: skip


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(str(tmp_path / "store"))


def test_a_version_is_a_plain_folder_with_its_manifest(store):
    artifact = commit(store)
    assert artifact.reference == "bot/dense@v0001"
    assert sorted(path.name for path in artifact.path.iterdir()) == [
        "artifact.json",
        "config.json",
        "model.safetensors",
    ]
    manifest = json.loads((artifact.path / "artifact.json").read_text())
    assert manifest["tensors"].keys() == {"a.weight", "b.weight"}
    assert manifest["options"] == {"seed": 0}
    assert manifest["software"]["torch"] == torch.__version__


def test_opening_and_reading_an_empty_store_writes_nothing(store):
    assert list(store.artifacts()) == []
    assert not store.root.exists()


def test_every_file_lies_once_in_the_blobs_and_cannot_be_written_through_a_version(store):
    first, second = commit(store, seed=0, value=1.0), commit(store, seed=1, value=2.0)
    one, two = (artifact.path / "config.json" for artifact in (first, second))
    assert one.stat().st_ino == two.stat().st_ino
    assert not one.stat().st_mode & stat.S_IWUSR
    assert (first.path / "model.safetensors").stat().st_ino != (second.path / "model.safetensors").stat().st_ino


def test_the_digest_covers_content_alone(store):
    first, second = commit(store, seed=0), commit(store, seed=1)
    assert first.manifest.fingerprint != second.manifest.fingerprint
    assert first.manifest.digest == second.manifest.digest


def test_the_same_fingerprint_committed_twice_gives_the_first(store):
    first = commit(store, seed=0, value=1.0)
    assert commit(store, seed=0, value=9.0) == first
    assert len(store.versions("bot", "dense")) == 1


def _commit_in_a_process(root: str, seed: int) -> None:
    commit(Store.open(root), seed=seed % 2, value=float(seed % 2))


def test_runs_may_commit_at_once(store):
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=_commit_in_a_process, args=(str(store.root), seed)) for seed in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0] * 4
    assert [path.name for path in store.versions("bot", "dense")] == ["v0001", "v0002"]
    for artifact in store.artifacts():
        verify(artifact)


def test_an_error_inside_a_workspace_keeps_it_for_the_next_run(store):
    with contextlib.suppress(RuntimeError), store.workspace("f" * 8) as workspace:
        (workspace / "checkpoint").write_text("half")
        raise RuntimeError
    with store.workspace("f" * 8) as workspace:
        assert (workspace / "checkpoint").read_text() == "half"
    assert list((store.private / "work").iterdir()) == []


def test_a_reference_is_resolved_by_version_alias_or_newest(store):
    first, second = commit(store, seed=0), commit(store, seed=1)
    store.set_alias(first, "production")
    assert store.resolve("bot/dense").version == second.version
    assert store.resolve("bot/dense@v0001").version == "v0001"
    assert store.resolve("bot/dense@production").version == "v0001"
    store.set_alias(second, "production")
    assert store.aliases("bot", "dense") == {"production": "v0002"}


@pytest.mark.parametrize(
    "reference", ["bot/dense@v0009", "bot/dense@staging", "bot/none", "bot", "../x/y", "bot/dense@"]
)
def test_what_the_store_does_not_hold_is_one_sentence(store, reference):
    commit(store)
    with pytest.raises(NotInStore):
        store.resolve(reference)


@pytest.mark.parametrize("alias", ["v0003", "../x", "A", ""])
def test_an_alias_is_a_word(store, alias):
    artifact = commit(store)
    with pytest.raises(NotInStore):
        store.set_alias(artifact, alias)


def test_a_url_is_no_store():
    with pytest.raises(RecipeError, match="hard links"):
        Store.open("s3://bucket/artifacts")


def test_verify_finds_a_changed_a_missing_and_an_added_file(store):
    artifact = commit(store)
    verify(artifact)
    config = artifact.path / "config.json"
    config.chmod(0o644)
    config.write_text('{"model_type": "gpt2"}')
    with pytest.raises(StoreCorrupt, match=r"config\.json has other bytes"):
        verify(artifact)
    config.unlink()
    with pytest.raises(StoreCorrupt, match=r"config\.json is missing"):
        verify(artifact)
    artifact = commit(store, seed=1)
    (artifact.path / "extra").write_text("x")
    with pytest.raises(StoreCorrupt, match="extra is not in the manifest"):
        verify(artifact)


def test_rm_refuses_what_an_alias_points_at_and_never_gives_a_number_again(store):
    first = commit(store, seed=0)
    store.set_alias(first, "production")
    with pytest.raises(NotInStore, match="alias production points at it"):
        remove(store, first)
    second = commit(store, seed=1)
    remove(store, second)
    assert commit(store, seed=2).version == "v0003"


def test_gc_removes_what_no_version_holds_and_gives_the_space_back(store):
    commit(store, seed=0, value=1.0)
    second = commit(store, seed=1, value=2.0)
    remove(store, second)
    done = collect(store, keep=None)
    assert done.versions == ()
    assert done.files == 2  # one shard and one manifest; the config is the first version's too
    assert collect(store, keep=None).files == 0
    verify(store.resolve("bot/dense@v0001"))


def test_gc_keeps_the_newest_the_aliased_and_their_ancestors(store):
    dense = [commit(store, seed=seed, value=seed) for seed in range(4)]
    tuned = commit(store, seed=9, value=9.0, variant="tuned", parent=dense[1])
    store.set_alias(dense[0], "production")
    done = collect(store, keep=1)
    assert done.versions == ("bot/dense@v0003",)
    kept = [artifact.reference for artifact in store.artifacts()]
    assert kept == ["bot/dense@v0001", "bot/dense@v0002", "bot/dense@v0004", tuned.reference]


def test_gc_with_nothing_to_keep_is_refused(store):
    with pytest.raises(NotInStore):
        collect(store, keep=0)


def test_gc_leaves_the_work_that_a_run_holds_and_the_work_that_may_be_resumed(store):
    with store.workspace("a" * 8) as held:
        os.utime(held, (0, 0))
        collect(store, keep=None)
        assert held.exists()
    with contextlib.suppress(RuntimeError), store.workspace("b" * 8) as fresh:
        (fresh / "checkpoint").write_text("half")
        raise RuntimeError
    collect(store, keep=None)
    assert fresh.exists()
    for path in (fresh / "checkpoint", fresh):
        os.utime(path, (0, 0))
    collect(store, keep=None)
    assert not fresh.exists()


def test_gc_removes_features_that_no_run_used_for_a_week(store):
    used, unused, computed = (store.private / "features" / name for name in ("used", "unused", "computed"))
    for folder in (used, unused, computed):
        folder.mkdir(parents=True)
        (folder / "identity.json").write_text("{}")
        (folder / "vectors.f32").write_bytes(b"\0" * 64)
    for folder in (unused, computed):
        os.utime(folder / "identity.json", (0, 0))
    with computed.with_suffix(".run").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = collect(store, keep=None)
    assert (done.files, done.nbytes) == (2, 66)
    assert (used.exists(), unused.exists(), computed.exists()) == (True, False, True)


def test_a_workspace_that_nothing_was_written_to_leaves_nothing(store):
    with contextlib.suppress(RuntimeError), store.workspace("c" * 8):
        raise RuntimeError
    assert list((store.private / "work").iterdir()) == []


def test_lineage_walks_back_to_what_is_outside_the_store(store):
    dense = commit(store, seed=0)
    tuned = commit(store, seed=1, variant="tuned", parent=dense)
    assert [row[2] for row in lineage(store, tuned)] == ["bot/tuned@v0001", "bot/dense@v0001"]


def test_a_quantized_module_has_a_digest_of_its_packed_tensors(tmp_path):
    packed = {
        "m.qweight": torch.ones(16, 8, dtype=torch.int32), "m.qzeros": torch.ones(1, 1, dtype=torch.int32),
        "m.scales": torch.ones(1, 8, dtype=torch.float16), "m.g_idx": torch.zeros(128, dtype=torch.int32),
        "norm.weight": torch.ones(8),
    }  # fmt: skip
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(packed, tmp_path / "model.safetensors")
    before = read_content(tmp_path).packed
    assert before.keys() == {"m"}
    save_file(packed | {"norm.weight": torch.zeros(8)}, tmp_path / "model.safetensors")
    assert read_content(tmp_path).packed == before
    save_file(packed | {"m.scales": torch.zeros(1, 8, dtype=torch.float16)}, tmp_path / "model.safetensors")
    assert read_content(tmp_path).packed != before
