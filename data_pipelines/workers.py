"""Batches from worker processes, in order, none lost and none twice, whatever becomes of a worker.

    parent --(batch index, slot)--> worker --(arrays in the slot's shared memory, the rest through the pipe)--> parent

Batch n is ordered from worker n % workers. The parent keeps the list of what it ordered and has not received: a worker that
dies (kill -9, out of memory) or falls silent is replaced by a new one, which gets the same orders. That is exact because
batch n is a pure function of n.

Workers are spawned, not forked: threads of jax and of the parent's libraries do not survive a fork. They import numpy, Pillow
and what the source needs, neither jax nor tensorflow nor grain, and are ready in a fraction of a second.

The trap: a shared-memory name outlives a process that was killed. The slots here have none: they are descriptors, handed to
the worker when it starts, and vanish with the last process that holds them.
"""

import collections
import ctypes
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.reduction
import os
import pickle
import signal
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from data_pipelines.errors import RunFailed

MAX_DEATHS = 3
SILENCE_S = 1200.0  # Longer than a pair takes whose storage stalls in every retry, of a long read and then of its own.
_ALIGNMENT_BYTES = 64
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Batches(Protocol):
    """A pure function of the index, picklable, safe to call from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


class WorkerLost(RunFailed):
    """Workers die or fall silent at one and the same batch."""


class WorkerPool:
    """An iterator over all batches; `close` stops the processes.

    threads: in each worker; prefetch: batches in work or ready, in each worker.
    """

    def __init__(self, batches: Batches, *, workers: int, threads: int, prefetch: int):
        self._total, self._next = len(batches), 0
        pickled = pickle.dumps(batches)
        self._workers = [_Worker(pickled, threads, prefetch) for _ in range(min(workers, max(1, self._total)))]
        for index in range(min(self._total, len(self._workers) * prefetch)):
            worker = self._workers[index % len(self._workers)]
            worker.order(index, slot=index // len(self._workers))
        # At the latest before multiprocessing waits, at exit, for children that ignore its signals.
        self._stop = weakref.finalize(self, _stop, self._workers)

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        """Raises what the batch raised in its worker; WorkerLost when no worker survives it."""
        if self._next >= self._total:
            self.close()
            raise StopIteration
        worker = self._workers[self._next % len(self._workers)]
        ahead = self._next + len(worker.orders) * len(self._workers)
        try:
            batch, slot = worker.receive()
        except BaseException:  # an interrupt too: no process stays behind
            self.close()
            raise
        self._next += 1
        if ahead < self._total:
            worker.order(ahead, slot=slot)
        return batch

    def close(self) -> None:
        self._stop()
        self._next = self._total

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]


def _stop(workers: list["_Worker"]) -> None:
    for worker in workers:
        worker.stop()


class _Worker:
    """One place among the workers: its process, replaced when lost, and its orders, which outlive that."""

    def __init__(self, batches: bytes, threads: int, prefetch: int):
        self.orders: collections.deque[tuple[int, int]] = collections.deque()
        self._batches, self._threads = batches, threads
        self._slots = [_Slot(_anonymous_file()) for _ in range(prefetch)]
        self._deaths = 0
        self._start()

    def order(self, index: int, *, slot: int) -> None:
        self.orders.append((index, slot))
        self._send((index, slot))

    def receive(self) -> tuple[dict, int]:
        """The batch that was ordered first, and the slot that it leaves free."""
        while True:
            if not multiprocessing.connection.wait([self._connection, self.process.sentinel], SILENCE_S):
                self._replace(silent=True)
                continue
            try:
                answer = self._connection.recv()
                break
            except (EOFError, OSError):
                self._replace(silent=False)
        _, slot = self.orders.popleft()
        if self._deaths:
            self._deaths = 0
            for order in self.orders:
                self._send(order)
        header, sizes, failure = answer
        if failure is not None:
            raise failure
        return pickle.loads(header, buffers=self._slots[slot].read(sizes)), slot

    def stop(self) -> None:
        self._end()
        for slot in self._slots:
            slot.close()
        self._slots = []

    def _end(self) -> int | None:
        """Kills the process, unless it is dead; its exit code, None when that was told before."""
        if self._connection.closed:
            return None
        self._connection.close()
        self.process.join(0)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        self.process.close()
        return code

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, self._slots, self._batches, self._threads)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def _send(self, message: tuple[int, int]) -> None:
        try:
            self._connection.send(message)
        except OSError:
            pass  # It is dead: `receive` notices, and its successor gets all the orders.

    def _replace(self, *, silent: bool) -> None:
        code, index = self._end(), self.orders[0][0]
        self._deaths += 1
        what = f"was silent for {SILENCE_S:g} s" if silent else f"ended with exit code {code}{_meaning(code)}"
        if self._deaths == MAX_DEATHS:
            raise WorkerLost(
                f"{MAX_DEATHS} data workers in a row were lost at batch {index} of this run, the last {what}; "
                "lower data.workers, data.prefetch or data.cache_bytes if memory is short"
            )
        warnings.warn(f"a data worker {what} at batch {index} of this run; another goes on there", stacklevel=2)
        self._start()
        self._send(self.orders[0])  # Alone, so that a batch which kills its worker is known.


@dataclass
class _Slot:
    """Memory that two processes see, as large as the batch in it needs."""

    file: int
    memory: mmap.mmap | None = None

    def __reduce__(self):
        return _receive_slot, (multiprocessing.reduction.DupFd(self.file),)

    def write(self, parts: list[memoryview]) -> None:
        needed = sum(_aligned(part.nbytes) for part in parts)
        if os.fstat(self.file).st_size < needed:
            os.ftruncate(self.file, needed)
        offset, memory = 0, self._map(needed)
        for part in filter(len, parts):
            memory[offset : offset + part.nbytes] = part
            offset += _aligned(part.nbytes)

    def read(self, sizes: list[int]) -> list[bytearray]:
        """Copies: the slot is about to be written again."""
        offset, parts = 0, []
        view = memoryview(self._map(sum(map(_aligned, sizes))))
        for size in sizes:
            parts.append(bytearray(view[offset : offset + size]))
            offset += _aligned(size)
        view.release()
        return parts

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()
        os.close(self.file)

    def _map(self, needed: int):
        if needed and (self.memory is None or len(self.memory) < needed):
            if self.memory is not None:
                self.memory.close()
            self.memory = mmap.mmap(self.file, os.fstat(self.file).st_size)
        return self.memory if needed else b""


def _receive_slot(file) -> _Slot:
    return _Slot(file.detach())


def keep_freed_memory() -> None:
    """Has glibc keep what pictures leave free. It hands every megabyte back to the kernel otherwise and faults it in again,
    page by page: a third of a JPEG's decoding time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 1 << 28)
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)


def _serve(connection, slots: list[_Slot], batches: bytes, threads: int) -> None:
    """In the worker process: answers orders in turn until the parent hangs up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # Terminals and schedulers signal it too, but the parent still needs its batches to stop in order.
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    keep_freed_memory()
    make = _load(batches)
    pending: collections.deque[tuple[int, Future]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                while not pending or connection.poll():
                    index, slot = connection.recv()
                    pending.append((slot, pool.submit(make, index)))
                slot, future = pending.popleft()
                connection.send(_answer(future, slots[slot]))
        except (EOFError, OSError):
            os._exit(0)


def _load(batches: bytes) -> Callable[[int], dict]:
    """What makes batch n; when the source cannot be opened here (a shard is gone), what says so."""
    try:
        return pickle.loads(batches).__getitem__
    except Exception as error:  # it is told with the first batch, in the process that asks
        reason = error

    def fail(index: int) -> dict:
        raise reason

    return fail


def _answer(future: Future, slot: _Slot) -> tuple[bytes, list[int], Exception | None]:
    try:
        parts: list[pickle.PickleBuffer] = []
        header = pickle.dumps(future.result(), protocol=5, buffer_callback=parts.append)
        raw = [part.raw() for part in parts]
        slot.write(raw)
        return header, [part.nbytes for part in raw], None
    except Exception as error:  # raised again in the process that asks
        return b"", [], _picklable(error)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # exceptions with arguments of their own often cannot be pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _follow_parent() -> None:
    """A parent that was killed is followed at once."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batches", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _meaning(code: int | None) -> str:
    return ": killed, for want of memory?" if code == -signal.SIGKILL else ""
