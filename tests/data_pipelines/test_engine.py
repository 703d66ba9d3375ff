"""The pool of curation: how it ends, whatever ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.curate.engine import LocalEngine

HANG = """
import sys
from pathlib import Path
from data_pipelines.curate.engine import LocalEngine
from tests.data_pipelines.test_engine import hang
if __name__ == "__main__":
    with LocalEngine(2) as engine:
        list(engine.map(hang, [Path(sys.argv[1]) / "a", Path(sys.argv[1]) / "b"]))
"""


def hang(path: Path) -> None:
    """Says who it is, and hangs."""
    path.with_suffix(".part").write_text(str(os.getpid()))
    path.with_suffix(".part").rename(path)
    time.sleep(600)


def pids_in(folder: Path) -> list[int]:
    """Of the two that hang."""
    deadline = time.monotonic() + 120
    while not (folder / "a").exists() or not (folder / "b").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int((folder / name).read_text()) for name in "ab"]


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_workers_go_with_their_parent(tmp_path, signum):
    script = tmp_path / "script.py"
    script.write_text(HANG)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, script, tmp_path], env=environment, stderr=subprocess.PIPE, text=True)
    pids = pids_in(tmp_path)
    process.send_signal(signum)
    assert process.wait(10) and all_gone(pids)
    assert process.stderr.read().count("Traceback") == (signum == signal.SIGINT)  # Python's own, of the parent alone


def test_an_error_of_the_parent_does_not_wait_for_what_runs(tmp_path):
    with pytest.raises(KeyError), LocalEngine(3) as engine:
        results = engine.map(hang_or_not, [tmp_path / "quick", tmp_path / "a", tmp_path / "b"])
        next(results)
        pids = pids_in(tmp_path)
        raise KeyError
    assert all_gone(pids)


def hang_or_not(path: Path) -> None:
    """The first one does not."""
    if path.name != "quick":
        hang(path)
