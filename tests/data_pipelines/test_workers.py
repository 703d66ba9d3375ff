"""Batches from worker processes: in order, none lost and none twice, even when workers die or hang."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import workers
from data_pipelines.sources import blocks, remote
from data_pipelines.workers import WorkerLost, WorkerPool


@dataclass(frozen=True)
class Numbered:
    """Batch n is full of n. fate: what befalls batch 5, `times` times: "dies", "hangs" or "raises"."""

    total: int
    folder: Path
    fate: str = ""
    times: int = 1

    def __len__(self):
        return self.total

    def __getitem__(self, index):
        if index == 5 and self.fate and self._still():
            if self.fate == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fate == "hangs":
                time.sleep(3600)
            raise ValueError("no such pair; fetch it again")
        return {
            "image": np.full((3, index % 4, 5), index, np.uint8),
            "index": index,
            "keys": [str(index)],
            "none": np.empty(0),
        }

    def _still(self):
        for time_ in range(self.times):
            try:
                (self.folder / f"{self.fate}-{time_}").touch(exist_ok=False)
                return True
            except FileExistsError:
                pass
        return False


def take(batches, *, count=2, threads=1, prefetch=2, first=None):
    pool = WorkerPool(batches, workers=count, threads=threads, prefetch=prefetch)
    try:
        return list(itertools.islice(pool, first))
    finally:
        pool.close()


def assert_numbered(taken, total):
    assert [batch["index"] for batch in taken] == list(range(total))
    for index, batch in enumerate(taken):
        assert batch["image"].shape == (3, index % 4, 5) and (batch["image"] == index).all()
        assert batch["keys"] == [str(index)] and batch["none"].size == 0
        batch["image"][...] = 0  # It is ours to write on.


@pytest.mark.parametrize("count, threads, prefetch", [(1, 1, 1), (2, 1, 3), (3, 2, 2)])
def test_batches_come_in_order(tmp_path, count, threads, prefetch):
    assert_numbered(take(Numbered(20, tmp_path), count=count, threads=threads, prefetch=prefetch), 20)


def test_there_may_be_fewer_batches_than_workers(tmp_path):
    assert_numbered(take(Numbered(1, tmp_path), count=3), 1)
    assert take(Numbered(0, tmp_path)) == []


@pytest.mark.parametrize(
    "fate, told", [("dies", "exit code -9: killed, for want of memory"), ("hangs", "silent for 10 s")]
)
def test_a_lost_worker_is_replaced(tmp_path, monkeypatch, fate, told):
    if fate == "hangs":  # longer than a worker takes to start on a busy machine
        monkeypatch.setattr(workers, "SILENCE_S", 10.0)
    with pytest.warns(UserWarning, match=f"a data worker .*{told}.* at batch 5 of this run"):
        taken = take(Numbered(12, tmp_path, fate, times=1 if fate == "hangs" else 2))
    assert_numbered(taken, 12)


def test_storage_that_stalls_is_no_silence():
    waits_s = sum(min(remote.LONGEST_WAIT_S, remote.FIRST_WAIT_S * 2**number) for number in range(remote.TRIES - 1))
    read_s = remote.TRIES * (remote.STALL_S + blocks.PIECE_BYTES / remote.SLOWEST_BYTES_PER_S) + waits_s
    assert workers.SILENCE_S > 2 * read_s  # of a row group: long, and once more for its pair


def test_workers_killed_from_outside_lose_nothing(tmp_path):
    pool = WorkerPool(Numbered(40, tmp_path), workers=2, threads=1, prefetch=2)
    taken = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in pool:
            taken.append(batch)
            if len(taken) in (3, 20, 21):
                for pid in pool.pids:
                    with contextlib.suppress(ProcessLookupError):  # killed a batch ago, not yet missed
                        os.kill(pid, signal.SIGKILL)
    assert_numbered(taken, 40)


@pytest.mark.filterwarnings("ignore:a data worker")
def test_a_batch_that_kills_every_worker_is_named(tmp_path):
    pool = WorkerPool(Numbered(12, tmp_path, "dies", times=100), workers=2, threads=1, prefetch=2)
    assert [next(pool)["index"] for _ in range(5)] == list(range(5))
    with pytest.raises(WorkerLost, match="3 data workers in a row were lost at batch 5 .*exit code -9"):
        next(pool)
    pool.close()


def test_what_a_batch_raises_is_raised_here(tmp_path):
    pool = WorkerPool(Numbered(12, tmp_path, "raises", times=100), workers=2, threads=1, prefetch=2)
    assert len(list(itertools.islice(pool, 5))) == 5
    with pytest.raises(ValueError, match="no such pair; fetch it again"):
        next(pool)
    pool.close()


@dataclass(frozen=True)
class Vanishing(Numbered):
    """Cannot be opened in a worker."""

    def __setstate__(self, state):
        raise FileNotFoundError("no shard at 'a.tar'; it was there a moment ago")


def test_a_source_that_a_worker_cannot_open_is_an_error_of_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no shard at 'a.tar'"):
        take(Vanishing(12, tmp_path))


def test_close_leaves_no_process_and_no_descriptor(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    pool = WorkerPool(Numbered(12, tmp_path), workers=2, threads=1, prefetch=2)
    next(pool)
    pids = pool.pids
    pool.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # The resource tracker of multiprocessing stays.
    assert list(pool) == []


def test_workers_follow_a_parent_that_was_killed(tmp_path):
    script = (
        "import os, pathlib, signal\n"
        "from tests.data_pipelines.test_workers import Numbered, WorkerPool\n"
        "if __name__ == '__main__':\n"
        f"    pool = WorkerPool(Numbered(1000, pathlib.Path({str(tmp_path)!r})), workers=2, threads=1, prefetch=2)\n"
        "    next(pool)\n"
        "    print(*pool.pids, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "parent.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=240)
    pids = done.stdout.split()
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 120  # it takes as long as the machine takes, but not for ever
    while any(_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
