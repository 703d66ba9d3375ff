"""Who computes: an engine maps a function over items and hands results on as they finish, in any order.

    engine.map(function, items) -> iterator of (item, result or exception)

Functions are at the top level of a module, items and results are picklable and small: what is large goes through files.

The trap: a worker that the kernel kills (out of memory, a codec's crash) takes every task of a process pool with it. The
tasks that were running are then tried once more, each alone in a process of its own; one that kills that too is a failed
task, and the others go on.
"""

import concurrent.futures
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any, Protocol, TypeVar

from data_pipelines.errors import RunFailed, UserError
from data_pipelines.workers import follow_parent, usable_cores

_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
Item = TypeVar("Item")


class WorkerDied(RunFailed):
    """The process that computed this item was killed, twice."""


class Engine(Protocol):
    """Such as `LocalEngine`, or `ray_engine.RayEngine` for many machines."""

    def map(self, function: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]: ...

    def map_with_model(self, function: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """The same for items that bring a model, which wants an accelerator or all cores of a machine to itself."""


class LocalEngine:
    """A pool of processes on this machine, kept from one map to the next until the `with` block ends.

    workers: 0 means every core; 1 computes in this process.
    """

    def __init__(self, workers: int = 0):
        if workers < 0:
            raise UserError(f"workers={workers} must be at least 0 (0: every core)")
        self.workers = workers or usable_cores()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, kind, *error) -> None:
        self._drop_pool(kill=kind is not None)

    def map(self, function: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """Yields (item, result), or (item, exception) of an item that failed."""
        waiting = deque(items)
        if self.workers == 1:
            for item in waiting:
                yield item, _outcome(lambda item=item: function(item))
            return
        while waiting:
            suspects: list[Item] = []
            yield from self._run_pool(function, waiting, suspects)
            for item in suspects:
                yield item, _run_alone(function, item)

    def map_with_model(self, function: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """In this process, where the model is loaded once and uses what the machine has."""
        for item in items:
            yield item, _outcome(lambda item=item: function(item))

    def _run_pool(self, function, waiting: deque, suspects: list) -> Iterator[tuple[Item, Any]]:
        """Until all is done, or the pool breaks: then `suspects` were running and `waiting` keeps the rest."""
        pool, running = self.open_pool(), {}
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    running[pool.submit(function, waiting[0])] = waiting[0]
                    waiting.popleft()
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    item = running.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        suspects.append(item)
                    else:
                        yield item, _outcome(future.result)
                if suspects:
                    raise BrokenProcessPool
        except BrokenProcessPool:  # found here, or by a submission
            suspects += running.values()
            self._drop_pool()

    def open_pool(self) -> ProcessPoolExecutor:
        """The pool, which is there until the `with` block ends or it breaks."""
        self._pool = self._pool or ProcessPoolExecutor(self.workers, mp_context=_context(), initializer=_begin_worker)
        return self._pool

    def _drop_pool(self, *, kill: bool = False) -> None:
        """kill: without waiting for what runs: nobody wants it any more."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()) if kill else ():
                process.kill()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _run_alone(function: Callable, item: Any) -> Any:
    with LocalEngine(1) as alone:
        pool = alone.open_pool()
        try:
            return _outcome(pool.submit(function, item).result)
        except BrokenProcessPool:
            return WorkerDied(f"its worker process was killed twice; the kernel's log may say why: {item!r:.200}")


def _outcome(compute: Callable[[], Any]) -> Any:
    """A result, or the exception in its place. That a pool broke is no outcome of an item."""
    try:
        return compute()
    except BrokenProcessPool:
        raise
    except Exception as error:  # whatever a task raises is its outcome; the caller tells which task
        return error


def _context() -> multiprocessing.context.BaseContext:
    """Workers are forked from a clean server process: forking one that has threads (jax, arrow) can hang.

    The server imports numpy with one thread: the pool is what uses the cores.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipelines.curate.run"])
    before = dict(os.environ)
    os.environ |= dict.fromkeys(_THREAD_VARIABLES, "1")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _begin_worker() -> None:
    """Ctrl-C in a terminal is for the parent to answer; how that ends decides. SIGTERM is how a broken pool is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()
    use_one_thread()


def use_one_thread() -> None:
    """In a worker: its engine is what uses the cores."""
    import pyarrow as pa

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
