"""Batches on all cores, chunk by chunk: by Grain's threads in this process, or by worker processes of our own.

    batch n -> items, one a row -> chunks of a few items -> each chunk writes its rows into the batch's memory

All threads and workers work on one batch before they begin the next, so the first batch is there as soon as possible. At most
`prefetch` batches are made ahead of the one handed out; a handed-out batch owns its memory, which is never written again.

    threads     Grain:  range -> map(fill a chunk) -> threads and prefetch -> batch
    workers     parent --(batch number, descriptor of its memory)--> worker --(what is not an array)--> parent

A worker makes its share of every batch. The parent keeps the list of what it ordered and has not received: a worker that
dies (kill -9, out of memory) or falls silent is replaced by a new one, which gets the same orders. That is exact because
a share is a pure function of the batch number.

Workers are spawned, not forked: threads of jax and of the parent's libraries do not survive a fork. They import numpy, Pillow
and what the source needs, neither jax nor tensorflow nor grain, and are ready in a fraction of a second.

The trap: a shared-memory name outlives a process that was killed. The memory here has none: it is a descriptor, sent to the
workers, and vanishes with the last process that holds it.
"""

import collections
import ctypes
import math
import mmap
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from data_pipelines.errors import RunFailed

MAX_DEATHS = 3
SILENCE_S = 1200.0  # Longer than a pair takes whose storage stalls in every retry, of a long read and then of its own.
MAX_PREFETCHED_BYTES = 1 << 34
MAX_PREFETCHED_BATCHES = 64  # orders to a worker and its answers must fit into the pipes between them
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 8, 64
_ALIVE_S, _KILLED_S = 60.0, 2.0
_ALIGNMENT_BYTES = 64
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[tuple[int, ...], Any]]


class Batches(Protocol):
    """Batches as a pure function of their number; picklable, safe to call from several threads.

    Attributes:
      rows: of the arrays of a batch; the last rows may stay empty.
      shapes: name -> (shape, dtype) of the arrays of a batch.
    """

    rows: int
    shapes: Shapes

    def __len__(self) -> int: ...

    def items(self, batch: int, part: int, parts: int) -> Sequence[Any]:
        """What is to be done for one of `parts` shares of a batch, one item a row."""

    def fill(self, items: Sequence[Any], arrays: Arrays) -> Any:
        """Writes the rows of some items of a batch, and returns what is not an array."""

    def finish(self, batch: int, arrays: Arrays, notes: list[Any]) -> dict:
        """The batch. notes: all that `fill` returned for it, in any order."""


class WorkerLost(RunFailed):
    """Workers die or fall silent at one and the same batch."""


def iterate(batches: Batches, *, workers: int, threads: int, prefetch: int) -> "ThreadedBatches | WorkerPool":
    """All batches in order; `close` stops the threads or processes.

    Args:
      batches: see there.
      workers: processes; 0 for threads of this one.
      threads: in each process.
      prefetch: batches made ahead by all of them together, within MAX_PREFETCHED_BATCHES and MAX_PREFETCHED_BYTES; at least one.
    """
    keep_freed_memory()
    batch_bytes = sum(_nbytes(*shape) for shape in batches.shapes.values())
    prefetch = max(1, min(prefetch, MAX_PREFETCHED_BATCHES, MAX_PREFETCHED_BYTES // max(1, batch_bytes)))
    chunk_rows = batches.rows // (4 * max(1, workers) * threads)
    options = {"threads": threads, "prefetch": prefetch}
    options["chunk_rows"] = min(MAX_CHUNK_ROWS, max(MIN_CHUNK_ROWS, chunk_rows))
    return WorkerPool(batches, workers=workers, **options) if workers else ThreadedBatches(batches, **options)


class ThreadedBatches:
    """An iterator over all batches, made by Grain's threads."""

    def __init__(self, batches: Batches, *, threads: int, prefetch: int, chunk_rows: int):
        import grain

        self._batches, self._prefetch, self._chunk_rows = batches, prefetch, chunk_rows
        self._chunks = max(1, -(-batches.rows // chunk_rows))
        self._open: dict[int, Arrays] = {}
        self._handed_out, self._closed, self._changed = 0, False, threading.Condition()
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch * self._chunks))
        chunks = grain.MapDataset.range(len(batches) * self._chunks).map(self._fill)
        self._iterator = iter(chunks.to_iter_dataset(options).batch(self._chunks, batch_fn=self._finish))

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        return next(self._iterator)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._iterator.close()

    def _fill(self, number: int) -> tuple[int, Any]:
        batch, chunk = divmod(number, self._chunks)
        with self._changed:
            # Grain refills its buffer with every chunk: without this, batches would begin before there is room for them.
            self._changed.wait_for(lambda: self._closed or batch < self._handed_out + self._prefetch)
            if self._closed:
                return batch, None
            if batch not in self._open:
                self._open[batch] = {name: np.empty(*shape) for name, shape in self._batches.shapes.items()}
            arrays = self._open[batch]
        items = self._batches.items(batch, 0, 1)[chunk * self._chunk_rows : (chunk + 1) * self._chunk_rows]
        return batch, self._batches.fill(items, arrays)

    def _finish(self, filled: Sequence[tuple[int, Any]]) -> dict:
        batch = filled[0][0]
        with self._changed:
            arrays = self._open.pop(batch)
            self._handed_out = batch + 1
            self._changed.notify_all()
        return self._batches.finish(batch, arrays, [notes for _, notes in filled])


class WorkerPool:
    """An iterator over all batches, made by worker processes; `close` stops them."""

    def __init__(self, batches: Batches, *, workers: int, threads: int, prefetch: int, chunk_rows: int):
        self._batches, self._prefetch = batches, prefetch
        self._total, self._next, self._ordered = len(batches), 0, 0
        self._memory: collections.deque[int] = collections.deque()
        setup, options = _anonymous_file(pickle.dumps(batches)), (dict(batches.shapes), threads, chunk_rows)
        self._workers = [_Worker(setup, (*options, part, workers)) for part in range(workers)]
        # At the latest before multiprocessing waits, at exit, for children that ignore its signals.
        self._stop = weakref.finalize(self, _stop, self._workers, self._memory, setup)
        self._order()

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        """Raises what the batch raised in its worker; WorkerLost when no worker survives it."""
        if self._next >= self._total:
            self.close()
            raise StopIteration
        try:
            notes = [note for worker in self._workers for note in worker.receive()]
        except BaseException:  # an interrupt too: no process stays behind
            self.close()
            raise
        arrays = _map(self._memory[0], self._batches.shapes)
        os.close(self._memory.popleft())
        self._next += 1
        self._order()
        return self._batches.finish(self._next - 1, arrays, notes)

    def _order(self) -> None:
        while self._ordered < min(self._total, self._next + self._prefetch):
            file = _anonymous_file()
            self._memory.append(file)
            os.ftruncate(file, max(1, sum(_nbytes(*shape) for shape in self._batches.shapes.values())))
            for worker in self._workers:
                worker.order(self._ordered, file)
            self._ordered += 1

    def close(self) -> None:
        self._stop()
        self._next = self._total

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]


def _stop(workers: list["_Worker"], memory: collections.deque[int], setup: int) -> None:
    for worker in workers:
        worker.end()
    for file in (setup, *memory):
        os.close(file)
    memory.clear()


class _Worker:
    """One place among the workers: its process, replaced when lost, and its orders, which outlive that."""

    def __init__(self, setup: int, options: tuple):
        self._orders: collections.deque[tuple[int, int]] = collections.deque()
        self._setup, self._options, self._deaths = setup, options, 0
        self._start()

    def order(self, batch: int, file: int) -> None:
        """Its share of a batch. file: descriptor of the batch's memory, open until the share is received."""
        self._orders.append((batch, file))
        self._send(batch, file)

    def receive(self) -> list[Any]:
        """What `Batches.fill` returned for the share that was ordered first."""
        answer = None
        while answer is None:
            if not multiprocessing.connection.wait([self._connection, self.process.sentinel], SILENCE_S):
                self._replace(silent=True)
                continue
            try:
                answer = self._connection.recv()  # None: it is still at it
            except (EOFError, OSError):
                self._replace(silent=False)
        self._orders.popleft()
        if self._deaths:
            self._deaths = 0
            for order in self._orders:
                self._send(*order)
        notes, failure = answer
        if failure is not None:
            raise failure
        return notes

    def end(self) -> int | None:
        """Kills the process, unless it is dead; its exit code, None when that was told before."""
        if self._connection.closed:
            return None
        self._connection.close()
        self.process.join(0)
        self.process.kill()
        self.process.join(_KILLED_S)  # One that waits for a disk ends later.
        if (code := self.process.exitcode) is not None:
            self.process.close()
        return code

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *self._options), daemon=True)
        self.process.start()
        theirs.close()
        # Not as an argument: if the process is killed while it starts, `start` waits for ever for it to read a long one.
        self._send(len(self._orders), self._setup)

    def _send(self, batch: int, file: int) -> None:
        try:
            self._connection.send(batch)
            with socket.fromfd(self._connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as pipe:
                socket.send_fds(pipe, [b"f"], [file])
        except OSError:
            pass  # It is dead: `receive` notices, and its successor gets all the orders.

    def _replace(self, *, silent: bool) -> None:
        code, batch = self.end(), self._orders[0][0]
        self._deaths += 1
        meaning = ": killed, for want of memory?" if code == -signal.SIGKILL else ""
        what = f"was silent for {SILENCE_S:g} s" if silent else f"ended with exit code {code}{meaning}"
        if self._deaths == MAX_DEATHS:
            raise WorkerLost(
                f"{MAX_DEATHS} data workers in a row were lost at batch {batch} of this run, the last {what}; "
                "lower data.workers, data.prefetch or data.cache_bytes if memory is short"
            )
        warnings.warn(f"a data worker {what} at batch {batch} of this run; another goes on there", stacklevel=2)
        self._start()
        self._send(*self._orders[0])  # Alone, so that a batch which kills its worker is known.


def _serve(connection, shapes: Shapes, threads: int, chunk_rows: int, part: int, parts: int) -> None:
    """In the worker process: answers orders in turn until the parent hangs up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Terminals and schedulers signal it too, but the parent still needs its batches to stop in order.
        signal.signal(number, signal.SIG_IGN)
    follow_parent()
    keep_freed_memory()
    pending: collections.deque[list[Future]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            connection.recv()
            batches = _load(_receive_file(connection))
            while True:
                while not pending or connection.poll():
                    batch, arrays = connection.recv(), _map(_receive_file(connection), shapes, close=True)
                    try:
                        if isinstance(batches, Exception):
                            raise batches
                        items = batches.items(batch, part, parts)
                        chunks = [items[start : start + chunk_rows] for start in range(0, len(items), chunk_rows)]
                        pending.append([pool.submit(batches.fill, chunk, arrays) for chunk in chunks])
                    except Exception as error:  # raised again in the process that asks
                        pending.append([failed := Future()])
                        failed.set_exception(error)
                    del arrays
                connection.send(_answer(pending.popleft(), connection))
        except (EOFError, OSError):
            os._exit(0)


def _answer(chunks: list[Future], connection) -> tuple[list[Any], Exception | None]:
    notes, told_s = [], time.monotonic()
    try:
        for chunk in chunks:
            notes.append(chunk.result())
            if time.monotonic() > told_s + _ALIVE_S:
                connection.send(None)
                told_s = time.monotonic()
        return notes, None
    except Exception as error:  # raised again in the process that asks
        return [], _picklable(error)


def _load(file: int) -> Batches | Exception:
    try:
        return pickle.loads(mmap.mmap(file, 0))
    except Exception as error:  # a shard is gone: told with the first batch, in the process that asks
        return error


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # exceptions with arguments of their own often cannot be pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def follow_parent() -> None:
    """In a worker process: a parent that ends, however it does, is followed at once."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _receive_file(connection) -> int:
    with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as pipe:
        _, files, _, _ = socket.recv_fds(pipe, 1, 1)
    if not files:
        raise EOFError("the parent is gone")
    return files[0]


def _anonymous_file(content: bytes = b"") -> int:
    memory = os.memfd_create("batch", os.MFD_CLOEXEC) if hasattr(os, "memfd_create") else None
    with tempfile.TemporaryFile() if memory is None else os.fdopen(memory, "wb") as file:
        file.write(content)
        file.flush()
        return os.dup(file.fileno())


def _map(file: int, shapes: Shapes, *, close: bool = False) -> Arrays:
    """The arrays in a batch's memory, which lives as long as one of them does."""
    memory, offset, arrays = mmap.mmap(file, 0), 0, {}
    if close:
        os.close(file)
    for name, (shape, dtype) in shapes.items():
        arrays[name] = np.ndarray(shape, dtype, memory, offset)
        offset += _nbytes(shape, dtype)
    return arrays


def _nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Of an array in a batch's memory, rounded up so that the next one is aligned."""
    return -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def usable_cores() -> int:
    """How many cores this process may use; where the system does not tell (macOS), how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Has glibc keep what images leave free. It hands every megabyte back to the kernel otherwise and faults it in again,
    page by page: a third of a JPEG's decoding time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 1 << 28)
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)
