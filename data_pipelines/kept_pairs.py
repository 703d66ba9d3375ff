"""The pairs of a source that a manifest keeps, as a source of their own.

    bits     one bit a pair of the source: kept or not
    counts   kept pairs before every 4096th pair
    n-th kept pair = the (n - counts[block])-th set bit of its block, block = the last with counts[block] <= n

That is 1/8 + 8/4096 bytes a row, 0.127: 10^7 rows are 1.3 MB, 10^9 rows 127 MB in each process that reads; a list of 64-bit
row numbers would be 8 bytes a row. The manifest is read once, some rows at a time, and forgotten.

The trap: a manifest names rows of shards. Of a shard that was written again, these are other pairs: the counts of all shards
and the keys of a few rows are compared, and a difference stops.
"""

import bisect
import collections
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from data_pipelines.records import Pair
from data_pipelines.sources.shards import ShardedSource

_BLOCK_PAIRS = 4096
_ROWS_AT_ONCE = 1 << 17
_COMPARED_KEYS = 16
_COLUMNS = ["shard", "index", "key", "keep"]


class KeptPairs:
    """A source without the pairs that a manifest drops.

    Args:
      source: all pairs of the shards.
      manifest: path of a Parquet file with the columns shard, index, key and keep, as `siglip data curate` writes it. Shards
        are recognized by their path, or by a file name that no other shard has. It may know of more shards.

    Raises:
      FileNotFoundError, PermissionError: there is no such file, or it must not be read.
      ValueError: it is no manifest, or one of other shards, or keeps nothing.
    """

    def __init__(self, source: ShardedSource, manifest: str | os.PathLike):
        self.source, self.paths = source, source.paths
        every = range(len(source))
        starts = [bisect.bisect_left(every, s, key=lambda i: source.locate(i)[0]) for s in range(len(source.paths))]
        self._kept, some = read_manifest(manifest, source.paths, [*starts, len(source)])
        for record, key in some:
            found = source[record].key
            if found != key:
                shard = source.paths[source.locate(record)[0]]
                raise ValueError(
                    f"manifest {os.fspath(manifest)!r} has {key!r} where shard {shard!r} has {found!r}; curate it again"
                )
        digest = hashlib.sha256(source.fingerprint.encode())
        digest.update(self._kept.bits)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Pair:
        """The pair at `index` of those that are kept. Raises as the source does."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return self.source[self._kept.select(index)]


@dataclass(frozen=True)
class Kept:
    """Which rows of many: bits uint8 [rows / 8], the first row in the highest bit; counts int64 [blocks + 1]."""

    bits: np.ndarray
    counts: np.ndarray

    @classmethod
    def from_bits(cls, bits: np.ndarray) -> "Kept":
        whole = np.zeros(-(-len(bits) * 8 // _BLOCK_PAIRS) * _BLOCK_PAIRS // 8, np.uint8)
        whole[: len(bits)] = bits
        in_block = np.bitwise_count(whole.reshape(-1, _BLOCK_PAIRS // 8)).sum(1, dtype=np.int64)
        return cls(whole, np.concatenate(([0], np.cumsum(in_block))))

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.counts.nbytes

    def __len__(self) -> int:
        return int(self.counts[-1])

    def select(self, n: int) -> int:
        """The row of the n-th that is kept."""
        block = int(np.searchsorted(self.counts, n, "right")) - 1
        start = block * _BLOCK_PAIRS // 8
        within = np.flatnonzero(np.unpackbits(self.bits[start : start + _BLOCK_PAIRS // 8]))
        return block * _BLOCK_PAIRS + int(within[n - self.counts[block]])


def read_manifest(
    manifest: str | os.PathLike, shards: Sequence[str], starts: Sequence[int]
) -> tuple[Kept, list[tuple[int, str]]]:
    """Which rows are kept, and (row, key) of a few of them.

    Args:
      manifest: see `KeptPairs`.
      shards: paths; a row here is a pair of all these shards in turn.
      starts: the first row of each shard, and the number of all rows.

    Raises:
      FileNotFoundError, PermissionError, ValueError: see `KeptPairs`.
    """
    name, file = os.fspath(manifest), _open(manifest)
    bits = np.zeros(-(-starts[-1] // 8), np.uint8)
    counted, some, numbers = np.zeros(len(shards), np.int64), [], _ShardNumbers(shards)
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=_COLUMNS):
        shard = batch["shard"].dictionary_encode()
        number = numbers.of(shard.dictionary.to_pylist())[shard.indices.to_numpy()]
        index, keep = batch["index"].to_numpy(), batch["keep"].to_numpy(zero_copy_only=False)
        mine = np.flatnonzero(number >= 0)
        first, end = np.asarray(starts)[number[mine]], np.asarray(starts)[number[mine] + 1]
        rows = first + index[mine]
        if (outside := (rows >= end) | (rows < first)).any():
            raise _other_shards(name, shards[number[mine][outside][0]], "more pairs than the shard")
        kept = rows[keep[mine]]
        np.bitwise_or.at(bits, kept >> 3, (0x80 >> (kept & 7)).astype(np.uint8))
        counted += np.bincount(number[mine], minlength=len(shards))
        if len(some) < _COMPARED_KEYS and len(mine):
            some += [(int(rows[at]), batch["key"][int(mine[at])].as_py()) for at in {0, len(mine) // 2}]
    for number, pairs in enumerate(np.diff(starts)):
        if counted[number] != pairs:
            what = f"{counted[number]} pairs where the shard has {pairs}" if counted[number] else "nothing"
            raise _other_shards(name, shards[number], what)
    if not bits.any():
        raise ValueError(f"manifest {name!r} keeps none of the {starts[-1]} pairs; loosen its rules")
    return Kept.from_bits(bits), some


class _ShardNumbers:
    """The number of a shard by its path or, where no other has it, by its file name; -1 of unknown ones."""

    def __init__(self, shards: Sequence[str]):
        self._by_path = {path: number for number, path in enumerate(shards)}
        names = collections.Counter(map(os.path.basename, shards))
        self._by_name = {
            os.path.basename(path): n for path, n in self._by_path.items() if names[os.path.basename(path)] == 1
        }
        self._claimed: dict[int, str] = {}

    def of(self, paths: Sequence[str]) -> np.ndarray:
        return np.array([self._of(path) for path in paths], np.int64)

    def _of(self, path: str) -> int:
        number = self._by_path.get(path, self._by_name.get(os.path.basename(path), -1))
        # Two shards of the manifest with one name: only the one that lies where ours does is meant.
        if number >= 0 and self._claimed.setdefault(number, path) != path:
            raise ValueError(
                f"the manifest has both {self._claimed[number]!r} and {path!r}; name shards by the paths that it has"
            )
        return number


def _open(manifest: str | os.PathLike) -> pyarrow.parquet.ParquetFile:
    name = os.fspath(manifest)
    if not Path(name).is_file():
        raise FileNotFoundError(f"no manifest at {name!r}; make one: siglip data curate SHARDS --out DIR")
    try:
        file = pyarrow.parquet.ParquetFile(name)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"manifest {name!r} is no Parquet file; give the manifest.parquet of siglip data curate"
        ) from error
    lacking = [column for column in _COLUMNS if column not in file.schema_arrow.names]
    if lacking:
        raise ValueError(
            f"manifest {name!r} has no column {lacking[0]!r}; give the manifest.parquet of siglip data curate"
        )
    return file


def _other_shards(manifest: str, shard: str, what: str) -> ValueError:
    return ValueError(f"manifest {manifest!r} is of other shards: for {shard!r} it has {what}; curate again")
