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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipelines.records import Pair, ShardLost
from data_pipelines.sources import files, index_file
from data_pipelines.sources.index_file import Contents, Index
from data_pipelines.sources.names import check_image
from data_pipelines.sources.remote import FileStat

_OPEN_TABLES = 128
_OPENING_THREADS = 16
_SHARDS_PER_PROCESS = 16


class ShardedSource(abc.ABC):
    """Base of the sources. A format adds `_pair(shard, row)`, and `_prepare` for what it opens.

    Attributes:
      paths: of the shards, as strings; local or URLs.
      truncated_shards: those of `paths` that are cut; what is whole of them is used.
      fingerprint: see `records.Source`.
    """

    def __init__(
        self,
        shards: str | os.PathLike | Sequence[str | os.PathLike],
        kind: str,
        build: Callable[[str, FileStat], Contents],
    ):
        paths = files.expand_shards(shards)
        self._open(paths, open_indexes(paths, kind, build), kind, build)
        for path, index in zip(self.paths, self._indexes, strict=True):
            if path in self.truncated_shards:
                pairs, due = index.header.pairs, index.header.notes.get("pairs_due")
                told = f" of the {due} that its statistics count" if due else ""
                message = f"shard {path!r} is cut off: its {pairs} whole pairs are used{told}; fetch it again"
                warnings.warn(message, stacklevel=3)

    def _open(
        self, paths: list[str], indexes: list[Index], kind: str, build: Callable[[str, FileStat], Contents]
    ) -> None:
        self.paths, self._indexes, self._kind, self._build = paths, indexes, kind, build
        headers = [index.header for index in indexes]
        self.truncated_shards = [
            path for path, header in zip(paths, headers, strict=True) if header.notes.get("truncated")
        ]
        self._starts = list(itertools.accumulate((header.pairs for header in headers), initial=0))
        names = [f"{os.path.basename(path)}\t{header.digest}\n" for path, header in zip(paths, headers, strict=True)]
        self.fingerprint = hashlib.sha256("".join(names).encode("utf-8", "surrogateescape")).hexdigest()
        self._files = files.Reader(paths, [header.shard_bytes for header in headers])
        self._tables = functools.lru_cache(_OPEN_TABLES)(self._load_tables)
        self._prepare()

    def _prepare(self) -> None:  # noqa: B027  most formats have nothing to open
        """Called once the shards are known, here and again in every process that the source goes to."""

    @abc.abstractmethod
    def _pair(self, shard: int, row: int) -> Pair:
        """A pair of a shard. Raises ShardLost, OSError."""

    def _load_tables(self, shard: int) -> Mapping[str, np.ndarray]:
        """The tables of a shard's index, made again if someone deleted it. Raises ShardLost, OSError."""
        path, index = self.paths[shard], self._indexes[shard]
        tables = index.load()
        if tables is not None:
            return tables
        try:
            again = index_file.open_index(path, self._kind, self._build)
        except (FileNotFoundError, PermissionError, ValueError) as error:
            raise ShardLost(f"shard {path!r} cannot be read any more: {error}") from error
        tables = again.load()
        if again.header.digest != index.header.digest or tables is None:
            raise ShardLost(f"shard {path!r} was replaced while it was in use; start again")
        return tables

    def __getstate__(self) -> tuple:
        return self.paths, self._indexes, self._kind, self._build

    def __setstate__(self, state: tuple) -> None:
        self._open(*state)

    def __iter__(self) -> Iterator[Pair]:
        return map(self.__getitem__, range(len(self)))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Pair:
        """The pair at `index`. Raises IndexError outside the source, OSError when storage fails, ShardLost."""
        return self._pair(*self.locate(index))

    def locate(self, index: int) -> tuple[int, int]:
        """The shard (an index of `paths`) and the row in it of a pair. Raises IndexError outside the source."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def places(self, index: int) -> dict[str, tuple[int, int]]:
        """Where the files of a pair lie in its shard, {"image": (offset, bytes), …}; {} in formats that are no archive."""
        self.locate(index)
        return {}

    def local_copy(self, shard: int) -> str:
        """The path of a whole shard on this machine, fetched if it is remote. Raises ShardLost, OSError."""
        path, header = self.paths[shard], self._indexes[shard].header
        try:
            return files.local_copy(path, header.shard_bytes, header.shard_version)
        except (FileNotFoundError, PermissionError, ValueError) as error:
            raise ShardLost(f"shard {path!r} cannot be read any more: {error}") from error

    def notes(self, shard: int) -> Mapping[str, object]:
        """What the index tells of a shard beside its pairs."""
        return self._indexes[shard].header.notes

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The names that the fields of all pairs are among, image included; None where only the pairs tell."""
        told = [index.header.notes.get("columns") for index in self._indexes]
        return None if None in told else tuple(dict.fromkeys(itertools.chain.from_iterable(told)))


class ColumnSource(ShardedSource):
    """A source whose shards have named columns or features, one of them the picture. image: its name; None finds it."""

    def __init__(
        self,
        shards: str | os.PathLike | Sequence[str | os.PathLike],
        kind: str,
        build: Callable[[str, FileStat], Contents],
        *,
        image: str | None,
    ):
        self._image = image
        super().__init__(shards, kind, build)

    def _prepare(self) -> None:
        self._images = [check_image(path, self.notes(shard), self._image) for shard, path in enumerate(self.paths)]

    def __getstate__(self) -> tuple:
        return self._image, super().__getstate__()

    def __setstate__(self, state: tuple) -> None:
        self._image, opened = state
        super().__setstate__(opened)


def open_indexes(paths: Sequence[str], kind: str, build: Callable[[str, FileStat], Contents]) -> list[Index]:
    """The indexes of shards, several at a time: servers answer side by side, and many local shards are read on all cores.

    Raises:
      FileNotFoundError, PermissionError, ValueError, OSError: of the first shard that cannot be opened.
    """
    unindexed = [path for path in paths if not files.is_remote(path) and not os.path.exists(f"{path}.idx")]
    if len(unindexed) >= _SHARDS_PER_PROCESS * 2:
        _index_in_processes(unindexed, kind, build)
    with ThreadPoolExecutor(min(_OPENING_THREADS, len(paths))) as pool:
        futures = [pool.submit(index_file.open_index, path, kind, build) for path in paths]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _index_in_processes(paths: Sequence[str], kind: str, build: Callable[[str, FileStat], Contents]) -> None:
    """Leaves the indexes on disk; what fails there fails here again, with its message.

    Not a multiprocessing pool: that imports the user's script again, and worker processes may not have one.
    """
    workers = min(len(os.sched_getaffinity(0)), len(paths) // _SHARDS_PER_PROCESS)
    if workers < 2:
        return
    command = [sys.executable, "-c", "from data_pipelines.sources import shards; shards.index_from_stdin()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) for _ in range(workers)]
    try:
        for number, process in enumerate(processes):
            with process.stdin as pipe:
                pickle.dump((paths[number::workers], kind, build), pipe)
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def index_from_stdin() -> None:
    """In a process of `open_indexes`: builds what it is told to."""
    paths, kind, build = pickle.load(sys.stdin.buffer)  # from our own parent
    for path in paths:
        with contextlib.suppress(Exception):  # the parent builds what is missing itself, and tells why it cannot
            index_file.open_index(path, kind, build)


def join_offsets(offsets: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """Rows (offset, bytes) of an index. -> structured [n]"""
    rows = np.empty(len(offsets), [("offset", "<i8"), ("bytes", "<i8")])
    rows["offset"], rows["bytes"] = offsets, sizes
    return rows
