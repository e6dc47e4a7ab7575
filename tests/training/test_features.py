"""Features are computed once, whatever asks for them, and depend on their row alone."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import child, progress
from pipeline.errors import DataError, NonFinite, NoSpace
from pipeline.training import feature_store
from pipeline.training import features as module
from pipeline.training.feature_store import INDEX, FeatureSet
from pipeline.training.features import Kept, padded_length
from tests.packed_models import pack
from tests.training.feature_runs import HIDDEN, arguments, backbone, cached, counted, loaded, toy_rows, trained_on
from tests.training.runs import Killed
from tests.training.uncached import compare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return backbone(tmp_path_factory.mktemp("backbone") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return loaded(folder)


def never():
    raise AssertionError("the backbone was asked for")


def vectors(found):
    return found.pooled(torch.arange(len(found)))


def only_set(root):
    [path] = [path for path in root.iterdir() if path.is_dir()]
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_backbone_trains_the_same_projector_to_the_last_bit_as_without_a_cache(folder, tmp_path, dtype):
    found = compare(folder, tmp_path, dtype)
    assert found["difference"] == 0.0
    assert found["moved"] > 1e-3


def test_so_does_nf4(folder, tmp_path):
    from transformers import BitsAndBytesConfig

    packed = tmp_path / "nf4"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    loaded(folder, "auto", quantization_config=config).save_pretrained(packed)
    found = compare(packed, tmp_path, "auto")
    assert (found["kind"], found["difference"]) == ("Linear4bit", 0.0)
    assert found["moved"] > 1e-3


@pytest.mark.slow
def test_so_does_gptq(tmp_path):
    folder = backbone(tmp_path / "gptq", dtype="float16")
    pack(folder, loaded(folder), dense="lm_head|embed")
    found = child.run("tests.training.uncached:compare", folder, tmp_path, "float32")
    assert found["kind"] not in {"Linear", "Linear4bit"}
    assert found["difference"] == 0.0
    assert found["moved"] > 1e-3


def test_int8_whose_rows_see_their_batchmates_comes_within_a_tenth_of_the_way(folder, tmp_path):
    from transformers import BitsAndBytesConfig

    found = compare(folder, tmp_path, "bfloat16", BitsAndBytesConfig(load_in_8bit=True))
    assert found["kind"] == "Linear8bitLt"
    assert found["difference"] <= 0.1 * found["moved"]


def test_a_feature_depends_on_its_row_alone(model, tmp_path):
    rows, _ = toy_rows(40, longest=150)
    options = {"sequence_length": 256}
    together = vectors(cached(model, rows, tmp_path / "a", **options))
    alone = torch.cat([vectors(cached(model, [row], tmp_path / str(i), **options)) for i, row in enumerate(rows[:6])])
    assert torch.equal(together[:6], alone)
    assert torch.equal(vectors(cached(model, rows[::-1], tmp_path / "b", **options)), together.flip(0))


def test_a_row_is_padded_by_its_own_length():
    assert [padded_length(n, 512) for n in (1, 64, 65, 500, 512)] == [64, 64, 128, 512, 512]
    assert [padded_length(n, 100) for n in (64, 65, 100)] == [64, 100, 100]


@pytest.mark.parametrize("pooling", ["last_token", "mean", "cls"])
def test_what_is_cached_is_the_pooled_hidden_state(model, tmp_path, pooling):
    rows, _ = toy_rows(5)
    found = vectors(cached(model, rows, tmp_path, pooling=pooling))
    for row, vector in zip(rows, found, strict=True):
        hidden = model.model(torch.tensor([row])).last_hidden_state[0]
        expected = {"last_token": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}[pooling]
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)


def test_another_learning_rate_and_other_labels_reuse_the_features_without_the_backbone(folder, tmp_path):
    rows, labels = toy_rows(32)
    fresh = loaded(folder)
    calls = counted(fresh)
    first = cached(fresh, rows, tmp_path / "features")
    trained_on(first, labels, arguments(tmp_path / "a"))
    assert len(calls) == 1  # 32 rows of 64 tokens at once, and no more for three epochs
    again = cached(never, rows, tmp_path / "features")
    assert again.computed == 0
    assert torch.equal(vectors(again), vectors(first))
    trained_on(again, labels[::-1], arguments(tmp_path / "b", learning_rate=0.5))
    assert len(calls) == 1


def test_new_rows_extend_the_set_and_old_ones_stay_as_they_are(folder, model, tmp_path):
    rows, _ = toy_rows(60)
    before = cached(model, rows[:40], tmp_path)
    kept = vectors(before).clone()
    fresh = loaded(folder)
    seen = []
    fresh.model.register_forward_pre_hook(lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    after = cached(fresh, rows, tmp_path)
    assert (before.computed, after.computed, sum(seen)) == (40, 20, 20)
    assert torch.equal(vectors(after)[:40], kept)
    assert torch.equal(vectors(before), kept)  # its mapping is as it was
    assert torch.equal(vectors(after), vectors(cached(model, rows, tmp_path / "anew")))


def test_equal_rows_are_computed_once(model, tmp_path):
    rows, _ = toy_rows(3)
    found = cached(model, rows * 5, tmp_path)
    assert (len(found), found.computed, len(found.vectors)) == (15, 3, 3)
    assert torch.equal(vectors(found)[:3], vectors(found)[12:])


@pytest.mark.parametrize("change", [{"backbone": "c"}, {"dtype": "bfloat16"}, {"pooling": "mean"}])
def test_another_backbone_dtype_or_pooling_has_a_set_of_its_own(model, tmp_path, change):
    rows, _ = toy_rows(4)
    cached(model, rows, tmp_path)
    assert cached(model, rows, tmp_path, **change).computed == 4
    assert cached(never, rows, tmp_path).computed == 0


def test_another_sequence_length_reuses_what_it_pads_alike(model, tmp_path):
    rows, _ = toy_rows(20, longest=60)
    cached(model, rows, tmp_path, sequence_length=64)
    assert cached(never, rows, tmp_path, sequence_length=512).computed == 0


def test_progress_is_told_in_rows(model, tmp_path):
    events = []
    rows, _ = toy_rows(130)
    with progress.shown_by(events.append):
        cached(model, rows, tmp_path)
        cached(never, rows, tmp_path)
    steps = [(event.done, event.total, event.unit) for event in events if isinstance(event, progress.Step)]
    assert steps == [(64, 130, "rows"), (128, 130, "rows"), (130, 130, "rows")]
    texts = [event.text for event in events if isinstance(event, progress.Message)]
    assert texts == [f"features of {n} of 130 rows are there already" for n in (0, 130)]


def test_a_row_without_tokens_and_a_feature_that_is_not_finite_are_refused(folder, model, tmp_path):
    with pytest.raises(DataError, match="1 of 2 rows have no tokens"):
        cached(never, [[5], []], tmp_path)
    broken = loaded(folder)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(NonFinite, match="hidden states hold NaN"):
        cached(broken, [[5]], tmp_path)
    assert cached(model, [[5]], tmp_path).computed == 1


def test_several_vectors_a_row_come_back_padded_with_their_mask(model, tmp_path):
    every = Kept(name="all", count=lambda n: n, select=lambda hidden, mask, _: hidden[mask.bool()])
    rows = [[5, 6, 7], [8], [9, 10]]
    found = cached(model, rows, tmp_path, kept=every)
    hidden, mask = found.ragged(torch.tensor([2, 0]))
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert hidden[0, 2].abs().max() == 0
    expected = model.model(torch.tensor([rows[0]])).last_hidden_state[0]
    torch.testing.assert_close(hidden[1], expected, rtol=1e-4, atol=1e-5)


# What a kill or a bad disk leaves.


def test_a_run_that_dies_keeps_what_it_appended_and_overwrites_the_half_of_an_append(model, tmp_path, monkeypatch):
    rows, _ = toy_rows(130)
    whole = vectors(cached(model, rows, tmp_path / "whole"))
    monkeypatch.setattr(module, "EVERY", 0.0)

    def dies(event):
        if isinstance(event, progress.Step) and event.done == 128:
            raise Killed

    with pytest.raises(Killed), progress.shown_by(dies):
        cached(model, rows, tmp_path / "cut")
    [path] = only_set(tmp_path / "cut").glob("*.f32")
    assert path.stat().st_size == 128 * HIDDEN * 4
    with path.open("ab") as file:
        file.write(b"\xff" * 1000)  # an append whose index never came
    found = cached(model, rows, tmp_path / "cut")
    assert found.computed == 2
    assert torch.equal(vectors(found), whole)
    assert path.stat().st_size == 130 * HIDDEN * 4


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path):
    path.write_bytes(b"")


def moved(path):
    tensors = load_file(path)
    tensors["places"] = tensors["places"].flip(0)
    save_file(tensors, path, metadata={"vectors": next(path.parent.glob("*.f32")).name, "digest": "of something else"})


def ahead(path):
    [vectors_] = path.parent.glob("*.f32")
    vectors_.write_bytes(vectors_.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [cut, emptied, moved, ahead])
def test_a_damaged_set_is_computed_again_and_whoever_reads_the_old_one_is_not_disturbed(model, tmp_path, damage):
    rows, _ = toy_rows(20)
    right = cached(model, rows, tmp_path)
    expected = vectors(right).clone()
    damage(only_set(tmp_path) / INDEX)
    found = cached(model, rows, tmp_path)
    assert found.computed == 20
    assert torch.equal(vectors(found), expected)
    if damage is not ahead:
        assert torch.equal(vectors(right), expected)
    assert cached(never, rows, tmp_path).computed == 0


def run_of(folder, root, rows, start, results):
    start.wait()
    found = cached(lambda: loaded(folder), rows, root)
    results.put((found.computed, vectors(found).tolist()))


@pytest.mark.slow
def test_two_runs_at_once_compute_each_row_once_between_them(folder, model, tmp_path):
    rows, _ = toy_rows(90)
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    parts = (rows[:60], rows[30:])
    runs = [context.Process(target=run_of, args=(folder, tmp_path / "both", part, start, results)) for part in parts]
    for run in runs:
        run.start()
    start.set()
    found = [results.get(timeout=120) for _ in runs]
    for run in runs:
        run.join()
    assert sorted(count for count, _ in found) == [30, 60]
    after = cached(never, rows, tmp_path / "both")
    assert torch.equal(vectors(after), vectors(cached(model, rows, tmp_path / "one")))


# The disk.


def test_more_than_the_limit_or_the_disk_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    rows, _ = toy_rows(50)
    need = 50 * HIDDEN * 4
    with pytest.raises(NoSpace, match=r"features: need 0\.0 MB, the limit is 0\.0 MB; raise the limit"):
        cached(never, rows, tmp_path, limit_bytes=need - 1)
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(
        feature_store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": need // 2, "total": usage.f_blocks})
    )
    with pytest.raises(NoSpace, match=r"MB free; free some"):
        cached(never, rows, tmp_path)


def test_sets_used_longest_ago_make_room_first(model, tmp_path):
    rows, _ = toy_rows(50)
    need = 50 * HIDDEN * 4
    for name in ("old", "older", "young"):
        cached(model, rows, tmp_path, backbone=name)
        time.sleep(0.01)
    cached(never, rows, tmp_path, backbone="old")  # used again
    cached(model, rows, tmp_path, backbone="new", limit_bytes=4 * need)
    with pytest.raises(AssertionError, match="asked for"):
        cached(never, rows, tmp_path, backbone="older")
    for name in ("old", "new"):
        assert cached(never, rows, tmp_path, backbone=name).computed == 0


def test_rows_of_other_data_make_room_for_this_runs_own(model, tmp_path):
    rows, _ = toy_rows(100)
    limit = 60 * (HIDDEN * 4 + 64)
    cached(model, rows[:50], tmp_path, limit_bytes=limit)
    assert cached(model, rows[50:], tmp_path, limit_bytes=limit).computed == 50
    assert cached(never, rows[50:], tmp_path, limit_bytes=limit).computed == 0
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.f32")) == 50 * HIDDEN * 4


def test_a_set_that_a_run_computes_is_not_removed(tmp_path):
    one = FeatureSet(tmp_path, {"backbone": "one"}, width=4)
    two = FeatureSet(tmp_path, {"backbone": "two"}, width=4)
    with one.computing(), two.computing():
        one.append([b"k" * 32], [1], torch.ones(1, 4))
        two.reserve(1, 1, whole=1, limit_bytes=20)
        assert one.index().end == 1
    with two.computing():
        two.reserve(1, 1, whole=1, limit_bytes=20)
    assert not one.folder.exists()
