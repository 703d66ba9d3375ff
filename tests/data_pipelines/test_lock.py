"""Who holds a folder, and when the next one may."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from data_pipelines import lock
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.run import curate
from data_pipelines.errors import RunFailed
from data_pipelines.lock import LOCK_FILE, hold

FIX = "give another --workdir"
HOLD = """
import pathlib, sys, time
from data_pipelines.lock import hold
with hold(pathlib.Path(sys.argv[1]), fix="stop"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_held_folder_is_refused_by_its_holders_name_and_untouched(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_S", 0.3)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(RunFailed, match=rf"in use by process {holder.pid} on .* since 20.*give another --workdir"):
        with hold(tmp_path, fix=FIX):
            pass
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_run_that_ends_a_little_later_is_waited_for(tmp_path, holder, monkeypatch):
    """As one that a scheduler has stopped, and that still saves."""
    monkeypatch.setattr(lock, "PATIENCE_S", 600.0)
    threading.Timer(0.5, holder.kill).start()
    with hold(tmp_path, fix=FIX):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert holder.wait() < 0


def test_a_curation_called_from_python_takes_the_lock_too(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_S", 0.3)
    (tmp_path / "a.tar").touch()
    with LocalEngine(1) as engine, pytest.raises(RunFailed, match=f"in use by process {holder.pid} "):
        curate(str(tmp_path / "a.tar"), tmp_path, config=CurateConfig(), engine=engine)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", LOCK_FILE}


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "WATCH_S", 600.0)
    holder.kill()
    holder.wait()
    with hold(tmp_path, fix=FIX):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_what_was_made_for_nothing_is_removed_and_what_holds_something_stays(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path / "a" / "b", fix=FIX):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "a" / "b", fix=FIX):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def left_by_another_machine(folder, *, touched_s_ago=0.0):
    path = folder / LOCK_FILE
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "then", "machine": "another"}))
    os.utime(path, (time.time() - touched_s_ago,) * 2)
    return path


@pytest.mark.parametrize("supported", [True, False])
def test_another_machine_that_touches_its_lock_is_alive(tmp_path, monkeypatch, supported):
    path, done = left_by_another_machine(tmp_path), threading.Event()
    monkeypatch.setattr(lock, "WATCH_S", 60.0)
    if not supported:
        monkeypatch.setattr(lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))

    def touch():
        while not done.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(RunFailed, match="in use by process 7 on elsewhere since then"), hold(tmp_path, fix=FIX):
            pass
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("watch_s, touched_s_ago", [(0.3, 0.0), (600.0, 3600.0)])
def test_the_lock_of_another_machine_that_is_gone_is_taken_over(tmp_path, monkeypatch, watch_s, touched_s_ago):
    left_by_another_machine(tmp_path, touched_s_ago=touched_s_ago)
    monkeypatch.setattr(lock, "WATCH_S", watch_s)
    with hold(tmp_path, fix=FIX):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": 1}', "\ud800"])
def test_a_damaged_lock_of_nobody_is_taken_over(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "WATCH_S", 0.3)
    (tmp_path / LOCK_FILE).write_bytes(content.encode(errors="surrogatepass"))
    with hold(tmp_path, fix=FIX):
        pass


def test_the_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    with hold(tmp_path, fix=FIX):
        path = tmp_path / LOCK_FILE
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
