"""Batches made by chunks: in order, none lost and none twice, in bounded memory, even when workers die or hang."""

import contextlib
import itertools
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import workers
from data_pipelines.sources import blocks, remote
from data_pipelines.workers import ThreadedBatches, WorkerLost, WorkerPool

ROWS = 7


@dataclass(frozen=True)
class Numbered:
    """Batch n is full of n. fate: what befalls row 3 of batch 5, `times` times: "dies", "hangs" or "raises"."""

    total: int
    folder: Path
    fate: str = ""
    times: int = 1
    rows = ROWS
    shapes = {"image": ((ROWS, 3, 5), np.uint8), "none": ((ROWS, 0), np.float64), "index": ((ROWS,), np.int64)}

    def __len__(self):
        return self.total

    def items(self, batch, part, parts):
        return [(batch, row) for row in range(part * ROWS // parts, (part + 1) * ROWS // parts)]

    def fill(self, items, arrays):
        if (5, 3) in items and self.fate and self._still():
            if self.fate == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fate == "hangs":
                time.sleep(3600)
            raise ValueError("no such pair; fetch it again")
        for batch, row in items:
            arrays["image"][row] = arrays["index"][row] = batch
        return [(row, str(batch)) for batch, row in items]

    def finish(self, batch, arrays, notes):
        return arrays | {"keys": [key for _, key in sorted(sum(notes, []))]}

    def _still(self):
        for time_ in range(self.times):
            try:
                (self.folder / f"{self.fate}-{time_}").touch(exist_ok=False)
                return True
            except FileExistsError:
                pass
        return False


def pool_of(batches, *, workers=2, threads=1, prefetch=2, chunk_rows=2):
    return WorkerPool(batches, workers=workers, threads=threads, prefetch=prefetch, chunk_rows=chunk_rows)


def take(batches, *, first=None, **options):
    with contextlib.closing(pool_of(batches, **options)) as pool:
        return list(itertools.islice(pool, first))


def assert_numbered(taken, total):
    assert [batch["index"][0] for batch in taken] == list(range(total))
    for index, batch in enumerate(taken):
        assert (batch["image"] == index).all() and (batch["index"] == index).all()
        assert batch["keys"] == [str(index)] * ROWS and batch["none"].size == 0
        batch["image"][...] = 0  # It is ours to write on.


@pytest.mark.parametrize(
    "workers, threads, prefetch, chunk_rows", [(1, 1, 1, 7), (2, 1, 3, 1), (3, 2, 2, 2), (5, 1, 2, 4)]
)
def test_batches_come_in_order(tmp_path, workers, threads, prefetch, chunk_rows):
    options = {"workers": workers, "threads": threads, "prefetch": prefetch, "chunk_rows": chunk_rows}
    assert_numbered(take(Numbered(20, tmp_path), **options), 20)


@pytest.mark.parametrize("threads, prefetch, chunk_rows", [(1, 1, 7), (2, 1, 1), (3, 2, 2), (1, 3, 9)])
def test_threads_make_them_as_well(tmp_path, threads, prefetch, chunk_rows):
    made = ThreadedBatches(Numbered(20, tmp_path), threads=threads, prefetch=prefetch, chunk_rows=chunk_rows)
    assert_numbered(list(made), 20)
    made.close()


@dataclass(frozen=True)
class Watched(Numbered):
    """Leaves a file for every batch that is begun, with the thread or process that did each row."""

    def fill(self, items, arrays):
        time.sleep(0.02)
        for batch, row in items:
            (self.folder / f"{batch}-{row}-{os.getpid()}-{threading.get_native_id()}").touch()
        return super().fill(items, arrays)

    def begun(self):
        return {int(path.name.partition("-")[0]) for path in self.folder.iterdir()}

    def makers(self, batch):
        return {path.name.split("-", 2)[2] for path in self.folder.glob(f"{batch}-*")}


@pytest.mark.parametrize("workers", [0, 2])
def test_no_more_batches_are_begun_than_there_is_room_for_and_all_lanes_work_on_one(tmp_path, workers):
    watched, prefetch = Watched(1000, tmp_path), 2
    options = {"threads": 2, "prefetch": prefetch, "chunk_rows": 1}
    made = WorkerPool(watched, workers=workers, **options) if workers else ThreadedBatches(watched, **options)
    with contextlib.closing(made):
        for number in range(5):
            next(made)
            deadline = time.monotonic() + 10
            while len(watched.begun()) <= number + prefetch and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.1)
            assert watched.begun() == set(range(number + prefetch + 1))
    assert len(watched.makers(0)) == 2 * max(1, workers)


def test_prefetched_batches_are_bounded_in_number_and_bytes(tmp_path, monkeypatch):
    with contextlib.closing(workers.iterate(Numbered(200, tmp_path), workers=1, threads=1, prefetch=100)) as made:
        assert made._prefetch == 64 == len(made._memory)
        assert [next(made)["keys"] for _ in range(2)]  # no order waits in a full pipe
    batch_bytes = sum(workers._nbytes(*shape) for shape in Numbered.shapes.values())
    for limit, batches in ((10 * batch_bytes, 8), (3 * batch_bytes, 3), (1, 1)):
        monkeypatch.setattr(workers, "MAX_PREFETCHED_BYTES", limit)
        with contextlib.closing(workers.iterate(Numbered(9, tmp_path), workers=0, threads=1, prefetch=8)) as made:
            assert made._prefetch == batches


def test_a_batch_that_was_handed_out_is_never_written_again(tmp_path):
    for made in (
        pool_of(Numbered(30, tmp_path), prefetch=1),
        ThreadedBatches(Numbered(30, tmp_path), threads=2, prefetch=1, chunk_rows=2),
    ):
        with contextlib.closing(made):
            kept = list(made)
        assert_numbered(kept, 30)


def test_there_may_be_no_batch(tmp_path):
    assert_numbered(take(Numbered(1, tmp_path), workers=3), 1)
    assert take(Numbered(0, tmp_path)) == []
    assert list(ThreadedBatches(Numbered(0, tmp_path), threads=1, prefetch=1, chunk_rows=1)) == []


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
    pool = pool_of(Numbered(40, tmp_path))
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


@dataclass(frozen=True)
class Heavy(Numbered):
    """More than a pipe holds: who writes it waits for the reader."""

    ballast: bytes = bytes(1 << 20)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:a data worker")
def test_workers_killed_while_they_start_are_replaced(tmp_path, monkeypatch):
    multiprocessing.resource_tracker.ensure_running()
    spawn, killed = multiprocessing.util.spawnv_passfds, []

    def spawn_and_kill(*args):
        pid = spawn(*args)
        if len(killed) < 3:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return pid

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawn_and_kill)
    assert_numbered(take(Heavy(6, tmp_path)), 6)
    assert len(killed) == 3


@pytest.mark.filterwarnings("ignore:a data worker")
def test_a_batch_that_kills_every_worker_is_named(tmp_path):
    pool = pool_of(Numbered(12, tmp_path, "dies", times=100))
    assert [next(pool)["index"][0] for _ in range(5)] == list(range(5))
    with pytest.raises(WorkerLost, match="3 data workers in a row were lost at batch 5 .*exit code -9"):
        next(pool)
    pool.close()


def test_what_a_batch_raises_is_raised_here(tmp_path):
    pool = pool_of(Numbered(12, tmp_path, "raises", times=100))
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
    pool = pool_of(Numbered(12, tmp_path))
    next(pool)
    pids = pool.pids
    pool.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # The resource tracker of multiprocessing stays.
    assert list(pool) == []


def test_workers_follow_a_parent_that_was_killed(tmp_path):
    script = (
        "import os, pathlib, signal\n"
        "from tests.data_pipelines.test_workers import Numbered, pool_of\n"
        "if __name__ == '__main__':\n"
        f"    pool = pool_of(Numbered(1000, pathlib.Path({str(tmp_path)!r})))\n"
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
