"""Only whole checkpoints are resumed from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from pipeline.training import resume
from pipeline.training.resume import MARKER, Resumable, last_complete, mark_complete


def checkpoint(folder, step, *, whole=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"x" * step)
    if whole:
        mark_complete(path)
    return path


def test_the_newest_whole_checkpoint_is_found_and_the_others_removed(tmp_path):
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, whole=False)
    assert last_complete(tmp_path) == newest
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_nothing_is_found_where_nothing_was_saved(tmp_path):
    assert last_complete(tmp_path / "never made") is None
    checkpoint(tmp_path, 3, whole=False)
    assert last_complete(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "marker"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    before = checkpoint(tmp_path, 2)
    damaged = checkpoint(tmp_path, 4)
    if damage == "cut":
        (damaged / "optimizer.pt").write_bytes(b"xx")
    elif damage == "changed":
        (damaged / "optimizer.pt").write_bytes(b"xxyx")
    elif damage == "missing":
        (damaged / "optimizer.pt").unlink()
    else:
        (damaged / MARKER).write_text('{"optimizer.pt": ')
    assert last_complete(tmp_path) == before


def test_the_marker_names_every_file_with_its_digest(tmp_path):
    path = checkpoint(tmp_path, 2, whole=False)
    (path / "more").mkdir()
    (path / "more" / "a.bin").write_bytes(b"")
    mark_complete(path)
    assert sorted(json.loads((path / MARKER).read_text())) == ["more/a.bin", "optimizer.pt"]


def test_the_clock_asks_for_a_save_after_a_while_and_less_often_when_saving_is_slow(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(resume.time, "monotonic", lambda: now)
    clock = Resumable(on_clock=True)
    clock.on_train_begin(None, None, None)
    checkpoint(tmp_path, 1, whole=False)

    def asked():
        control = SimpleNamespace(should_save=False)
        clock.on_step_end(None, SimpleNamespace(global_step=1), control)
        return control.should_save

    now += resume.EVERY - 1
    assert not asked()
    now += 1
    assert asked()
    now += 30.0  # what the save took
    clock.on_save(SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=1), None)
    assert (tmp_path / "checkpoint-1" / MARKER).is_file()
    now += 30.0 * resume.SHARE - 1
    assert not asked()
    now += 1
    assert asked()


def test_saving_by_steps_leaves_the_clock_out(monkeypatch):
    now = 0.0
    monkeypatch.setattr(resume.time, "monotonic", lambda: now)
    clock = Resumable(on_clock=False)
    now = 1e6
    control = SimpleNamespace(should_save=False)
    clock.on_step_end(None, SimpleNamespace(global_step=1), control)
    assert not control.should_save
