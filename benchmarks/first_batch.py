"""How soon a large first batch is there, and how much memory all processes together take: `input_pipeline.py --only memory`.

    memory <= what the libraries take + (prefetched batches + 1) x a local batch + workers x a chunk

Each number of workers runs in processes of its own. The consumer holds one batch and waits until the next ones are ready, which
is when most memory is in use; it is sampled all the while. Shared memory is the machine's, less what it was before: nothing else
should be using any.
"""

import contextlib
import multiprocessing
import threading
import time

import numpy as np
from process_memory import family_mib

from data_pipelines.workers import MAX_CHUNK_ROWS

ROW = "{:>8}{:>10}{:>16}{:>12}{:>12}{:>12}{:>14}"
TEXT_LENGTH = 64


def measure(args, shards: list[str], spiece: str) -> list[dict]:
    """One row for each of 1 and 2 workers and for threads of the main process."""
    return [_in_process(args, shards, spiece, workers) for workers in (0, 1, 2)]


def _in_process(*task) -> dict:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, *task))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _run(connection, args, shards: list[str], spiece: str, workers: int) -> None:
    libraries_mib = _peak_mib(args, shards, spiece, workers, batch_size=8)["peak_mib"]
    row = _peak_mib(args, shards, spiece, workers, batch_size=args.batch_size)
    row_mib = (args.image_size**2 * 3 + 4 * TEXT_LENGTH) / 2**20
    batch_mib = args.batch_size * row_mib
    formula_mib = libraries_mib + (row["prefetch"] + 1) * batch_mib + max(1, workers) * MAX_CHUNK_ROWS * row_mib
    connection.send(
        row
        | {
            "workers": workers,
            "batch_size": args.batch_size,
            "batch_mib": batch_mib,
            "libraries_mib": libraries_mib,
            "formula_mib": formula_mib,
        }
    )


def _peak_mib(args, shards: list[str], spiece: str, workers: int, *, batch_size: int) -> dict:
    from data_pipelines.loader import DataConfig, make_loader
    from data_pipelines.order.mixture import SourceConfig

    sources = (SourceConfig(shards[0].replace("00000", "{00000..00003}")),)
    config = DataConfig(sources, spiece, workers=workers, threads=1, cache_bytes=0)
    size = (args.image_size,) * 2
    loader = make_loader(config, batch_size=batch_size, image_size=size, text_length=TEXT_LENGTH, seed=0)
    with contextlib.closing(loader), _sampled() as peak:
        begun = time.monotonic()
        batch = next(loader)
        first_s = time.monotonic() - begun
        time.sleep(1.2 * config.prefetch * first_s)  # the prefetched ones are made meanwhile
        for _ in range(2):
            batch = next(loader)
        assert batch["image"].dtype == np.uint8
    return {"first_s": first_s, "prefetch": config.prefetch, "peak_mib": peak[0]}


@contextlib.contextmanager
def _sampled():
    """The most memory that was in use within, as a list of one number."""
    peak, done = [family_mib()], threading.Event()

    def sample():
        while not done.wait(0.2):
            peak[0] = max(peak[0], family_mib())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def print_table(rows: list[dict]) -> None:
    print(ROW.format("workers", "first s", "pairs/s, first", "batch MiB", "libraries", "peak MiB", "formula MiB"))
    for row in rows:
        mib = (f"{row[name]:.0f}" for name in ("batch_mib", "libraries_mib", "peak_mib", "formula_mib"))
        print(ROW.format(row["workers"], f"{row['first_s']:.1f}", f"{row['batch_size'] / row['first_s']:.0f}", *mib))
