"""Several shards with their indexes as one sequence of pairs: what every source but its format has in common.

    pair index -> (shard, row)     bisection over the shards' first pairs

The trap: a source goes to worker processes by pickle. What it opened (descriptors, maps, caches) stays behind; what it
found out (sizes, indexes) goes along, so that a worker neither asks a server about each shard again nor reads an index.
"""

import abc
import bisect
import contextlib
import functools
import hashlib
import itertools
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.records import Pair, ShardLost
from data_pipelines.sources import blocks, files, index_file
from data_pipelines.sources.blocks import Block, BlockCache
from data_pipelines.sources.columns import check_image
from data_pipelines.sources.index_file import Contents, Index
from data_pipelines.sources.remote import FileStat
from data_pipelines.workers import usable_cores

_OPEN_TABLES = 128
_PLANNED_BLOCKS = 1024
_OPENING_THREADS = 16
_SHARDS_PER_PROCESS = 16


class ShardedSource(abc.ABC):
    """Base of the sources.

    A format adds `kind`, `build`, `_pair`, `_extents` if it reads by ranges, and `_prepare` for what it opens.

    Attributes:
      paths: of the shards, as strings; local or URLs.
      truncated_shards: those of `paths` that are cut; what is whole of them is used.
      fingerprint: see `records.Source`.
      pair_bytes: of shards, on average.
      is_remote: whether any shard is.
    """

    kind: str
    stat = staticmethod(files.stat)
    _carried: tuple[str, ...] = ("paths", "_indexes")  # what goes to another process

    def __init__(self, shards: str | os.PathLike | Sequence[str | os.PathLike]):
        self.paths = files.expand_shards(shards)
        self._indexes = open_indexes(self.paths, self.kind, self.build, self.stat)
        self._open()
        for fault in self.faults():
            warnings.warn(fault, stacklevel=3)

    def faults(self) -> list[str]:
        """What is not read of the shards: those that are cut, and members that belong to no pair."""
        faults, unused = [], []
        for path, index in zip(self.paths, self._indexes, strict=True):
            notes, pairs = index.header.notes, index.header.pairs
            if notes.get("truncated"):
                due = notes.get("pairs_due")
                told = f" of the {due} that its statistics count" if due else ""
                faults.append(f"shard {path!r} is cut off: its {pairs} whole pairs are used{told}; fetch it again")
            if "unused" in notes:
                unused.append((path, *notes["unused"]))
        if unused:
            path, _, name = unused[0]
            count = sum(count for _, count, _ in unused)
            faults.append(f"members of no pair are not read: {count}, such as {name!r} of shard {path!r}")
        return faults

    def _open(self) -> None:
        paths, headers = self.paths, [index.header for index in self._indexes]
        self.truncated_shards = [
            path for path, header in zip(paths, headers, strict=True) if header.notes.get("truncated")
        ]
        self._starts = list(itertools.accumulate((header.pairs for header in headers), initial=0))
        self.pair_bytes = sum(header.shard_bytes for header in headers) / self._starts[-1]
        self.is_remote = any(map(files.is_remote, paths))
        names = [f"{os.path.basename(path)}\t{header.digest}\n" for path, header in zip(paths, headers, strict=True)]
        self.fingerprint = hashlib.sha256("".join(names).encode("utf-8", "surrogateescape")).hexdigest()
        versions = [header.shard_version for header in headers]
        self._files = files.Reader(paths, [header.shard_bytes for header in headers], versions)
        self._tables = functools.lru_cache(_OPEN_TABLES)(self._load_tables)
        self._pieces = functools.lru_cache(_PLANNED_BLOCKS)(self._find_pieces)
        self._prepare()

    def _prepare(self) -> None:  # noqa: B027  most formats have nothing to open
        """Called once the shards are known, here and again in every process that the source goes to."""

    @staticmethod
    @abc.abstractmethod
    def build(shard: str, stat: FileStat) -> Contents:
        """The index of a shard. Raises UserError if it is cut, empty or of another format."""

    @abc.abstractmethod
    def _pair(self, shard: int, row: int, read: Callable[[int, int], bytes]) -> Pair:
        """A pair of a shard. read(offset, size): bytes of that. Raises ShardLost, OSError."""

    def _load_tables(self, shard: int) -> Mapping[str, np.ndarray]:
        """The tables of a shard's index, made again if someone deleted it. Raises ShardLost, OSError."""
        path, index = self.paths[shard], self._indexes[shard]
        tables = index.load()
        if tables is not None:
            return tables
        try:
            again = index_file.open_index(path, self.kind, self.build, self.stat)
        except (FileNotFoundError, PermissionError, UserError) as error:
            raise ShardLost(f"shard {path!r} cannot be read any more: {error}") from error
        tables = again.load()
        if again.header.digest != index.header.digest or tables is None:
            raise ShardLost(f"shard {path!r} was replaced while it was in use; start again")
        return tables

    def __getstate__(self) -> dict:
        return {name: getattr(self, name) for name in self._carried}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __iter__(self) -> Iterator[Pair]:
        return map(blocks.InOrder(self).__getitem__, range(len(self)))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Pair:
        """The pair at `index`. Raises IndexError outside the source, OSError when storage fails, ShardLost."""
        shard, row = self.locate(index)
        return self._pair(shard, row, functools.partial(self._files.read, shard))

    def block(self, first: int, end: int, *, until: int) -> Block:
        """The pairs first … end - 1 as a block, see there."""
        return Block(first, end, until)

    def in_block(self, index: int, block: Block, kept: BlockCache) -> Pair:
        """The same as `self[index]`, read with the block that it lies in where the shard is remote. Raises as that does."""
        shard, row = self.locate(index)
        read = functools.partial(self._files.read, shard)
        if files.is_remote(self.paths[shard]):
            read = functools.partial(self._read_in_block, shard, block, kept)
        return self._pair(shard, row, read)

    def fetch_ahead(self, block: Block, kept: BlockCache) -> None:
        """Begins to read what a block needs of remote shards."""
        for shard in self._remote_shards(block):
            for start, end in self._pieces(shard, block).tolist():
                kept.fetch_ahead(until=block.until, **self._piece_read(shard, start, end))

    def _read_in_block(self, shard: int, block: Block, kept: BlockCache, offset: int, size: int) -> bytes:
        piece = blocks.piece_of(self._pieces(shard, block), offset, size)
        if piece is not None:
            start, end = piece
            data = kept.get(until=block.until, **self._piece_read(shard, start, end))
            if data is not None:
                return data[offset - start : offset - start + size]
        return self._files.read(shard, offset, size)

    def _piece_read(self, shard: int, start: int, end: int) -> dict:
        """A piece as a `BlockCache` wants it."""
        fetch = functools.partial(self._files.read, shard, start, end - start)
        return {"key": (shard, start, end), "fetch": fetch, "nbytes": end - start}

    def _remote_shards(self, block: Block) -> list[int]:
        """Those that pairs of a block lie in."""
        first, last = self.locate(block.first)[0], self.locate(block.end - 1)[0]
        return [shard for shard in range(first, last + 1) if files.is_remote(self.paths[shard])]

    def _rows_in(self, shard: int, block: Block) -> np.ndarray:
        """The rows of a shard that belong to a block. -> int64 [n]"""
        start, end = self._starts[shard], self._starts[shard + 1]
        rows = np.arange(max(block.first, start), min(block.end, end)) if block.rows is None else block.rows
        return rows[(start <= rows) & (rows < end)] - start

    def _find_pieces(self, shard: int, block: Block) -> np.ndarray:
        """What to read of a shard for the pairs of a block. -> int64 [k, 2], (start, end)"""
        return blocks.pieces(self._extents(shard, self._rows_in(shard, block)))

    def _extents(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """Where the bytes of rows of a shard lie, int64 [m, 2], (offset, bytes); none in formats that are not read by ranges."""
        return np.zeros((0, 2), np.int64)

    def locate(self, index: int) -> tuple[int, int]:
        """The shard (an index of `paths`) and the row in it of a pair. Raises IndexError outside the source."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def member_extents(self, index: int) -> dict[str, tuple[int, int]]:
        """Where the files of a pair lie in its shard, {"image": (offset, bytes), …}; {} in formats that are not archives."""
        self.locate(index)
        return {}

    def notes(self, shard: int) -> Mapping[str, object]:
        """What the index tells of a shard beside its pairs."""
        return self._indexes[shard].header.notes

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The names that the fields of all pairs are among, image included; None where only the pairs tell."""
        told = [index.header.notes.get("columns") for index in self._indexes]
        return None if None in told else tuple(dict.fromkeys(itertools.chain.from_iterable(told)))


class ColumnSource(ShardedSource):
    """A source whose shards have named columns or features, one of which is the image.

    Args:
      shards: a pattern or several, as for `files.expand_shards`.
      image: the name of the column; None finds it.

    Raises:
      FileNotFoundError, PermissionError, UserError: a shard is missing, unreadable, cut, empty, of another format, or has
        no such column.
      OSError: a server does not answer.
    """

    _carried = (*ShardedSource._carried, "_image")

    def __init__(self, shards: str | os.PathLike | Sequence[str | os.PathLike], *, image: str | None = None):
        self._image = image
        super().__init__(shards)

    def _prepare(self) -> None:
        self._images = [check_image(path, self.notes(shard), self._image) for shard, path in enumerate(self.paths)]


def open_indexes(
    paths: Sequence[str],
    kind: str,
    build: Callable[[str, FileStat], Contents],
    stat: Callable[[str], FileStat] = files.stat,
) -> list[Index]:
    """The indexes of shards, several at a time: servers answer side by side, and many local shards are read on all cores.

    Raises:
      FileNotFoundError, PermissionError, ValueError, OSError: of the first shard that cannot be opened.
    """
    unindexed = [path for path in paths if not files.is_remote(path) and not os.path.exists(f"{path}.idx")]
    if len(unindexed) >= _SHARDS_PER_PROCESS * 2:
        _index_in_processes(unindexed, kind, build, stat)
    with ThreadPoolExecutor(min(_OPENING_THREADS, len(paths))) as pool:
        futures = [pool.submit(index_file.open_index, path, kind, build, stat) for path in paths]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _index_in_processes(
    paths: Sequence[str], kind: str, build: Callable[[str, FileStat], Contents], stat: Callable[[str], FileStat]
) -> None:
    """Leaves the indexes on disk; what fails there fails here again, with its message.

    Not a multiprocessing pool: that imports the user's script again, and worker processes may not have one.
    """
    workers = min(usable_cores(), len(paths) // _SHARDS_PER_PROCESS)
    if workers < 2:
        return
    command = [sys.executable, "-c", "from data_pipelines.sources import shards; shards.index_from_stdin()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) for _ in range(workers)]
    try:
        for number, process in enumerate(processes):
            with contextlib.suppress(OSError):  # it was killed
                pickle.dump((paths[number::workers], kind, build, stat), process.stdin)
                process.stdin.flush()
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()


def index_from_stdin() -> None:
    """In a process of `open_indexes`: builds what it is told to."""
    paths, kind, build, stat = pickle.load(sys.stdin.buffer)  # from our own parent
    # The pipe stays open for as long as the parent lives, however it ends.
    threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
    for path in paths:
        with contextlib.suppress(Exception):  # the parent builds what is missing itself, and tells why it cannot
            index_file.open_index(path, kind, build, stat)


def join_offsets(offsets: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """Rows (offset, bytes) of an index. -> structured [n]"""
    rows = np.empty(len(offsets), [("offset", "<i8"), ("bytes", "<i8")])
    rows["offset"], rows["bytes"] = offsets, sizes
    return rows
