"""pipeline.child: what comes back from a child, what it leaves behind, and what happens when anybody dies."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pipeline import child, progress
from pipeline.cgroup import memory_left, oom_kills
from pipeline.errors import OutOfMemory, RecipeError, StageDied, StageFailed

HERE = f"{__name__}:"


@pytest.fixture(autouse=True)
def _no_preload(monkeypatch):
    """The forkserver of these tests imports nothing in advance; what it would import is tested on its own."""
    monkeypatch.setattr(child, "PRELOAD", ())


# --- what the children do -------------------------------------------------------------------------------------------


class Unpicklable:
    """Refuses, as a lock or an open file does."""

    def __reduce__(self):
        raise TypeError("it holds a lock")


class UnreadableHere:
    """Pickles well and fails where it is read, which is what a class of a library that only the child has does."""

    def __reduce__(self):
        return os.stat, ("/no/such/file",)


def circumstances():
    return {"pid": os.getpid(), "folder": str(Path.cwd()), "environment": dict(os.environ)}


def talk():
    sys.stdout.write("to standard output\n")
    sys.stderr.write("to standard error\n")
    os.write(1, b"past the interpreter\n")
    progress.step("talk", done=1, total=2, unit="rows")
    progress.metric("talk", "loss", 0.5)
    progress.message("talk", "half way")
    return "said"


def flood():
    """More output than a pipe holds, none of it waited for."""
    os.write(1, b"x" * 300_000)
    sys.stdout.write("last words")
    return "done"


def refuse():
    raise RecipeError("recipe demo.yaml: unknown key sed; did you mean seed?")


def break_down():
    sys.stdout.write("about to divide")
    return 1 / 0


def leave(code):
    sys.exit(code)


def kill_itself(number):
    os.write(2, b"the last thing it said")
    os.kill(os.getpid(), number)
    time.sleep(60)


def emit_unpicklable():
    progress.emit(progress.Metric(stage="s", name="n", value=Unpicklable()))


def sleep_long(pids):
    """Note this process and one that it started, then sleep."""
    other = subprocess.Popen(["sleep", "600"])
    _note(pids, os.getpid(), other.pid)
    time.sleep(600)


def leave_something(pids):
    other = subprocess.Popen(["sleep", "600"])
    _note(pids, os.getpid(), other.pid)


def fork_and_die(pids):
    """Die while a forked worker holds every pipe that this process had."""
    worker = os.fork()
    if worker == 0:
        time.sleep(600)
    _note(pids, os.getpid(), worker)
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_middle_of_its_answer():
    """Write half a message, and leave a forked worker with every pipe that this process had."""
    (answers,) = [thing for thing in gc.get_objects() if isinstance(thing, Connection) and not thing.closed]
    if os.fork() == 0:
        time.sleep(600)
    os.write(answers.fileno(), b"\0\0\1\0half")
    os.kill(os.getpid(), signal.SIGKILL)


def nest(pids):
    """Start a grandchild that never lets go of the interpreter's lock."""
    _note(pids, os.getpid())
    return child.run(f"{HERE}busy_in_c", pids)


def busy_in_c(pids):
    other = subprocess.Popen(["sleep", "600"])
    _note(pids, os.getpid(), other.pid)
    import re

    re.match(r"(a+)+$", "a" * 40 + "b")  # 2^40 steps of C code


def nested_answer():
    return os.getpid(), child.run("os:getpid"), os.getppid(), child.run("os:getppid")


def grow(limit):
    held = []
    while len(held) < limit >> 20:
        held.append(b"\1" * (1 << 20))
    return len(held)


def loaded(*names):
    return [name in sys.modules for name in names]


def _note(pids, *numbers):
    with Path(pids).open("a") as file:
        file.writelines(f"{number}\n" for number in numbers)


# --- helpers --------------------------------------------------------------------------------------------------------


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _noted(pids, count):
    """The process ids in the file, once there are so many."""
    assert _until(lambda: pids.exists() and pids.read_text().count("\n") >= count, 60)
    return [int(line) for line in pids.read_text().split()]


def _marked(mark):
    """Every live process that was started with `mark` in its environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _alive(folder.name):
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def _script(body):
    return textwrap.dedent(f"""
        import json, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pipeline import child
        child.PRELOAD = ()
    """) + textwrap.dedent(body)


# --- what comes back ------------------------------------------------------------------------------------------------


def test_a_call_runs_in_another_process_that_is_gone_afterwards():
    seen = child.run(f"{HERE}circumstances")
    assert seen["pid"] != os.getpid()
    assert _until(lambda: not _alive(seen["pid"]))


def test_the_child_has_the_callers_folder_and_environment_of_the_moment(tmp_path, monkeypatch):
    """The forkserver was started elsewhere and earlier; only what travels with the call counts."""
    child.warm()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SET_AFTER_THE_FORKSERVER", "yes")
    monkeypatch.delenv("HOME", raising=False)
    seen = child.run(f"{HERE}circumstances", environment={"ONLY_FOR_THIS_CALL": "1"})
    assert seen["folder"] == str(tmp_path)
    assert seen["environment"] == {**os.environ, "ONLY_FOR_THIS_CALL": "1"}
    assert "ONLY_FOR_THIS_CALL" not in os.environ


def test_events_reach_the_parents_sinks_in_order():
    events = []
    with progress.shown_by(events.append):
        assert child.run(f"{HERE}talk") == "said"
    assert events == [
        progress.Step(stage="talk", done=1, total=2, unit="rows"),
        progress.Metric(stage="talk", name="loss", value=0.5),
        progress.Message(stage="talk", text="half way"),
    ]


def test_nothing_a_child_prints_reaches_the_parents_output(capfd):
    child.run(f"{HERE}talk")
    assert capfd.readouterr() == ("", "")


def test_a_child_that_prints_more_than_a_pipe_holds_is_not_held_up():
    assert child.run(f"{HERE}flood") == "done"


def test_calls_from_several_threads_do_not_meet():
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda n: child.run("operator:mul", n, n), range(6)))
    assert results == [0, 1, 4, 9, 16, 25]


def test_a_child_may_call_a_child_which_the_same_forkserver_makes():
    own, inner, forkserver, inners_forkserver = child.run(f"{HERE}nested_answer")
    assert len({own, inner, forkserver, os.getpid()}) == 4
    assert inners_forkserver == forkserver


# --- errors ---------------------------------------------------------------------------------------------------------


def test_a_requant_error_comes_back_as_what_it_was():
    with pytest.raises(RecipeError) as caught:
        child.run(f"{HERE}refuse")
    assert str(caught.value) == "recipe demo.yaml: unknown key sed; did you mean seed?"
    assert "in refuse" in "".join(caught.value.__notes__)


def test_any_other_exception_is_one_sentence_with_the_trace_and_the_output_beside_it():
    with pytest.raises(
        StageFailed, match="break_down: ZeroDivisionError: division by zero; run with --debug"
    ) as caught:
        child.run(f"{HERE}break_down")
    assert "in break_down" in caught.value.trace
    assert "about to divide" in "".join(caught.value.__notes__)


def test_a_function_that_does_not_exist_is_a_sentence():
    with pytest.raises(StageFailed, match="AttributeError: module 'os' has no attribute 'nothing'"):
        child.run("os:nothing")


def test_a_child_that_calls_exit_is_a_sentence():
    with pytest.raises(StageFailed, match="SystemExit: 3"):
        child.run(f"{HERE}leave", 3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_child_that_is_killed_is_named_with_its_signal_and_last_words(number):
    with pytest.raises(StageDied, match=rf"kill_itself: its process was ended by {number.name} before") as caught:
        child.run(f"{HERE}kill_itself", number)
    assert "the last thing it said" in "".join(caught.value.__notes__)


def test_a_child_that_ends_without_an_answer_is_named_with_its_exit_code():
    with pytest.raises(StageDied, match="ended with exit code 3 before it answered"):
        child.run("os:_exit", 3)


def test_a_worker_left_by_a_dead_child_neither_holds_up_the_parent_nor_lives_on(tmp_path):
    with pytest.raises(StageDied, match="SIGKILL"):
        child.run(f"{HERE}fork_and_die", tmp_path / "pids")
    assert _until(lambda: not any(map(_alive, _noted(tmp_path / "pids", 2))))


@pytest.mark.timeout(60)
def test_half_an_answer_is_a_death_and_no_endless_wait():
    with pytest.raises(StageDied, match="SIGKILL"):
        child.run(f"{HERE}die_in_the_middle_of_its_answer")


def test_what_cannot_be_pickled_is_a_sentence_whichever_way_it_goes():
    with pytest.raises(StageFailed, match=r"its arguments cannot cross between processes .*it holds a lock"):
        child.run("builtins:id", Unpicklable())
    with pytest.raises(StageFailed, match="its result Unpicklable cannot cross between processes"):
        child.run(f"{HERE}Unpicklable")
    with pytest.raises(StageFailed, match="its event Metric cannot cross between processes"):
        child.run(f"{HERE}emit_unpicklable")
    with pytest.raises(StageFailed, match=r"its answer cannot be read here .*No such file"):
        child.run(f"{HERE}UnreadableHere")


# --- memory ---------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_said_only_when_the_kernels_count_rose(monkeypatch):
    counts = iter([3, 4])
    monkeypatch.setattr(child, "oom_kills", lambda: next(counts))
    with pytest.raises(OutOfMemory, match="killed its process for memory"):
        child.run(f"{HERE}kill_itself", signal.SIGKILL)


def test_a_crash_is_not_blamed_on_memory_that_somebody_else_lacked(monkeypatch):
    counts = iter([3, 4])
    monkeypatch.setattr(child, "oom_kills", lambda: next(counts))
    with pytest.raises(StageDied, match="SIGSEGV"):
        child.run(f"{HERE}kill_itself", signal.SIGSEGV)


def test_kills_are_counted_in_either_version_of_cgroups_and_in_the_nearest_folder_there_is(tmp_path):
    accounts, mounts = tmp_path / "cgroup", tmp_path / "fs"
    (mounts / "a/b").mkdir(parents=True)
    (mounts / "memory").mkdir()
    (mounts / "a/b/memory.events").write_text("low 0\noom 9\noom_kill 2\noom_group_kill 7\n")
    (mounts / "memory/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    accounts.write_text("0::/a/b\n")
    assert oom_kills(accounts, mounts) == 2
    accounts.write_text("0::/a/b/c\n")
    assert oom_kills(accounts, mounts) == 2
    accounts.write_text("4:cpu,memory:/docker/0123\n1:cpu:/\n")
    assert oom_kills(accounts, mounts) == 5
    accounts.write_text("0::/elsewhere\n")
    assert oom_kills(accounts, mounts) == 0
    assert oom_kills(tmp_path / "none", mounts) == 0


def test_memory_that_is_left_is_the_cgroups_where_that_has_less_than_the_machine(tmp_path):
    accounts, mounts = tmp_path / "cgroup", tmp_path / "fs"
    (mounts / "a").mkdir(parents=True)
    (mounts / "memory").mkdir()
    (mounts / "a/memory.stat").write_text("anon 300\nfile 5000\n")
    (mounts / "memory/memory.stat").write_text("cache 5000\nrss 1\ntotal_rss 400\n")
    (mounts / "memory/memory.limit_in_bytes").write_text("1000\n")
    accounts.write_text("4:memory:/\n")
    assert memory_left(accounts, mounts) == 600
    accounts.write_text("0::/a/b\n")
    (mounts / "a/memory.max").write_text("2000\n")
    assert memory_left(accounts, mounts) == 1700
    (mounts / "a/memory.max").write_text("200\n")
    assert memory_left(accounts, mounts) == 0
    (mounts / "a/memory.max").write_text("max\n")
    assert memory_left(accounts, mounts) > 10**6
    assert memory_left(tmp_path / "none", mounts) > 10**6


def _limited_cgroup(mebibytes):
    """A cgroup with so much memory and no swap, or a skip where this user may not make one."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        one = "memory" in controllers.split(",")
        if not one and controllers:
            continue
        folder = Path("/sys/fs/cgroup", "memory" if one else "", place.lstrip("/"), f"requant-{uuid.uuid4().hex}")
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / ("memory.limit_in_bytes" if one else "memory.max")).write_text(str(mebibytes << 20))
            if not one:
                (folder / "memory.swap.max").write_text("0")
        except OSError:
            folder.rmdir()
            continue
        return folder
    return pytest.skip("this user may not make a memory cgroup")


def test_a_child_that_the_kernel_kills_for_memory_says_so():
    """The real killer, in a cgroup of 200 MiB."""
    group = _limited_cgroup(200)
    body = f"""
        from pathlib import Path
        import os
        Path({str(group)!r}, "cgroup.procs").write_text(str(os.getpid()))
        try:
            print(child.run("test_child:grow", 1 << 30))
        except Exception as error:
            print(type(error).__name__)
    """
    try:
        done = subprocess.run(
            [sys.executable, "-"], input=_script(body), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout == f"{OutOfMemory.__name__}\n", done.stderr
    finally:
        assert _until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


# --- who ends with whom ---------------------------------------------------------------------------------------------


def test_an_interrupt_kills_the_child_and_what_it_started_before_it_goes_on(tmp_path):
    pids = tmp_path / "pids"
    interrupted = threading.Timer(0, lambda: (_noted(pids, 2), os.kill(os.getpid(), signal.SIGINT)))
    interrupted.start()
    with pytest.raises(KeyboardInterrupt):
        child.run(f"{HERE}sleep_long", pids)
    interrupted.join()
    child_pid, other = _noted(pids, 2)
    assert not _alive(child_pid)
    assert _until(lambda: not _alive(other))


def test_a_sink_that_fails_ends_the_child():
    def fail(event):
        raise OSError("the screen is gone")

    with progress.shown_by(fail), pytest.raises(OSError, match="the screen is gone"):
        child.run(f"{HERE}talk")


def test_what_a_finished_child_left_running_is_ended(tmp_path):
    child.run(f"{HERE}leave_something", tmp_path / "pids")
    assert _until(lambda: not any(map(_alive, _noted(tmp_path / "pids", 2))))


def test_nobody_outlives_a_parent_that_was_killed(tmp_path):
    """SIGKILL takes the parent; its child, the busy grandchild, what that started, and every helper go within 10 s."""
    pids, mark = tmp_path / "pids", f"mark-{uuid.uuid4().hex}"
    parent = subprocess.Popen(
        [sys.executable, "-c", _script(f"child.run('test_child:nest', {str(pids)!r})")],
        env={**os.environ, "REQUANT_TEST_MARK": mark},
        stdin=subprocess.DEVNULL,
    )
    noted = _noted(pids, 3)
    assert len(_marked(mark)) >= 6  # parent, child, grandchild, its sleep, forkserver, resource tracker
    assert all(map(_alive, noted))
    parent.kill()
    parent.wait()
    try:
        assert _until(lambda: not _marked(mark)), _marked(mark)
    finally:
        for pid in _marked(mark):
            os.kill(pid, signal.SIGKILL)


def test_a_forkserver_that_still_imports_ends_with_a_parent_that_was_killed(tmp_path):
    """Imports take seconds, on a busy machine more than the ten that anybody may live on."""
    mark, began = f"mark-{uuid.uuid4().hex}", tmp_path / "began"
    (tmp_path / "slow_to_import.py").write_text(
        f"import pathlib, time\npathlib.Path({str(began)!r}).touch()\ntime.sleep(60)"
    )
    body = 'child.PRELOAD = ("slow_to_import",)\nchild.warm()\nsys.stdin.read()'
    parent = subprocess.Popen(
        [sys.executable, "-c", _script(f"import sys\n{body}")],
        env={**os.environ, "REQUANT_TEST_MARK": mark, "PYTHONPATH": str(tmp_path)}, stdin=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert _until(began.exists)
        parent.kill()
        parent.wait()
        assert _until(lambda: not _marked(mark)), _marked(mark)
    finally:
        for pid in _marked(mark):
            os.kill(pid, signal.SIGKILL)


# --- how the parent was started -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["file", "module", "command", "stdin"])
def test_the_parents_main_module_is_not_run_again(how, tmp_path):
    """Its standard output holds what it printed itself, once, and nothing of its children."""
    body = _script("""
        print("main ran", flush=True)
        print(json.dumps(child.run("test_child:talk")))
    """)
    (tmp_path / "started.py").write_text(body)
    command = {"file": ["started.py"], "module": ["-m", "started"], "command": ["-c", body], "stdin": ["-"]}[how]
    done = subprocess.run(
        [sys.executable, *command], input=body, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False
    )
    assert done.stdout == 'main ran\n"said"\n', done.stderr
    assert done.stderr == ""


def test_modules_in_the_users_folder_are_not_taken_for_libraries(tmp_path):
    """A user's own random.py beside the recipe is not what torch gets when it imports random."""
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    body = _script("""
        child.PRELOAD = ("random",)
        print(child.run("test_child:loaded", "random"))
    """)
    (tmp_path.parent / "aside.py").write_text(body)
    done = subprocess.run(
        [sys.executable, tmp_path.parent / "aside.py"],
        capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "[True]\n", done.stderr


def test_a_preloaded_module_that_breaks_is_named_in_the_error(tmp_path):
    (tmp_path / "broken_at_import.py").write_text("raise RuntimeError('no such device')")
    body = _script("""
        child.PRELOAD = ("broken_at_import",)
        try:
            child.run("os:getpid")
        except Exception as error:
            print(type(error).__name__, error, *error.__notes__)
    """)
    done = subprocess.run(
        [sys.executable, "-"], input=body, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.startswith("StageDied os:getpid: "), done.stderr
    assert "RuntimeError: no such device" in done.stdout


@pytest.mark.slow
def test_torch_transformers_and_the_named_modules_are_there_before_the_call():
    body = """
        import sys
        from pipeline import child
        model = "transformers.models.llama.modeling_llama"
        child.warm([model])
        print(child.run("test_child:loaded", "torch", "transformers", model), "torch" in sys.modules)
    """
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[True, True, True] False\n", done.stderr
