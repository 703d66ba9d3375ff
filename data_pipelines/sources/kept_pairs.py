"""The pairs of a source that a manifest keeps, as a source of their own.

    bits     one bit a pair of the source: kept or not
    counts   kept pairs before every 4096th pair
    n-th kept pair = the (n - counts[block])-th set bit of its block, block = the last with counts[block] <= n

That is 1/8 + 8/4096 bytes a row, 0.127: 10^7 rows are 1.3 MB, 10^9 rows 127 MB in each process that reads; a list of 64-bit
row numbers would be 8 bytes a row. The manifest is read once, some rows at a time, and forgotten.

The trap: a manifest names rows of shards. Of a shard that was written again, these are other pairs, and in another set the
names and the keys are the same (00000.tar, 000000000). The counts of all shards are compared, of some shards where images
lie, and of a few rows what the images are; a difference stops.
"""

import bisect
import collections
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from data_pipelines.errors import UserError
from data_pipelines.records import Pair
from data_pipelines.sources.blocks import Block, BlockCache
from data_pipelines.sources.columns import repeated_name
from data_pipelines.sources.parquet import read_batches
from data_pipelines.sources.shards import ShardedSource


def _is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


_BLOCK_PAIRS = 4096
_ROWS_AT_ONCE = 1 << 17
_COMPARED_SHARDS, _COMPARED_PAIRS = 64, 16
_COLUMNS = {
    "shard": (_is_text, "strings"),
    "index": (pyarrow.types.is_integer, "integers"),
    "key": (_is_text, "strings"),
    "keep": (pyarrow.types.is_boolean, "booleans"),
}
_COMPARED_COLUMNS = ["key", "image_offset", "image_bytes", "sha256"]


class KeptPairs:
    """A source without the pairs that a manifest drops.

    Args:
      source: all pairs of the shards.
      manifest: path of a Parquet file with the columns shard, index, key and keep, as `siglip data curate` writes it. Shards
        are recognized by their path, or by a file name that no other shard has. It may know of more shards.

    Raises:
      FileNotFoundError, PermissionError: there is no such file, or it must not be read.
      UserError: it is not a manifest, or one of other shards, or keeps nothing.
    """

    def __init__(self, source: ShardedSource, manifest: str | os.PathLike):
        self.source, self.paths = source, source.paths
        self.pair_bytes, self.is_remote = source.pair_bytes, source.is_remote
        every = range(len(source))
        starts = [bisect.bisect_left(every, s, key=lambda i: source.locate(i)[0]) for s in range(len(source.paths))]
        self._kept, some = read_manifest(manifest, source.paths, [*starts, len(source)])
        self._compare(os.fspath(manifest), some)
        digest = hashlib.sha256(source.fingerprint.encode())
        digest.update(self._kept.bits)
        self.fingerprint = digest.hexdigest()

    def _compare(self, manifest: str, some: Sequence[tuple[int, Mapping]]) -> None:
        """Raises UserError if rows are not what the manifest says of them."""
        stride = -(-len(some) // _COMPARED_PAIRS)
        for number, (row, told) in enumerate(some):
            shard = self.paths[self.source.locate(row)[0]]
            place = (told.get("image_offset"), told.get("image_bytes"))
            image = self.source.member_extents(row).get("image")
            if image is not None and None not in place and image != place:
                raise _other_shards(manifest, shard, f"image {told['key']!r} in another place")
            if number % stride:
                continue
            try:
                pair = self.source[row]
            except OSError:  # storage fails here and now; the stream will say so
                continue
            if pair.key != told["key"]:
                raise _other_shards(manifest, shard, f"{told['key']!r} in place of {pair.key!r}")
            if told.get("sha256") and told["sha256"] != hashlib.sha256(pair.image or b"").hexdigest():
                raise _other_shards(manifest, shard, f"another image {told['key']!r}")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Pair:
        """The pair at `index` of those that are kept. Raises as the source does."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return self.source[self._kept.select(index)]

    def block(self, first: int, end: int, *, until: int) -> Block:
        """The kept pairs first … end - 1 as a block of the source."""
        rows = self._kept.rows(first, end)
        return Block(int(rows[0]), int(rows[-1]) + 1, until, rows)

    def in_block(self, index: int, block: Block, kept: BlockCache) -> Pair:
        """The same as `self[index]`; see `ShardedSource.in_block`."""
        return self.source.in_block(self._kept.select(index), block, kept)

    def fetch_ahead(self, block: Block, kept: BlockCache) -> None:
        """See `ShardedSource.fetch_ahead`."""
        self.source.fetch_ahead(block, kept)


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

    def rows(self, first: int, end: int) -> np.ndarray:
        """The rows of the first-th to the one before the end-th that are kept. -> int64 [end - first]"""
        start = self.select(first) // 8
        stop = self.select(end - 1) // 8 + 1
        rows = np.flatnonzero(np.unpackbits(self.bits[start:stop])) + start * 8
        skipped = int(np.searchsorted(rows, self.select(first)))
        return rows[skipped : skipped + end - first]


def read_manifest(
    manifest: str | os.PathLike, shards: Sequence[str], starts: Sequence[int]
) -> tuple[Kept, list[tuple[int, dict]]]:
    """Which rows are kept, and (row, what is told of it) of a few of them.

    Args:
      manifest: see `KeptPairs`.
      shards: paths; a row here is a pair of all these shards in turn.
      starts: the first row of each shard, and the number of all rows.

    Raises:
      FileNotFoundError, PermissionError, UserError: see `KeptPairs`.
    """
    name, columns = os.fspath(manifest), _columns(manifest)
    bits = np.zeros(-(-starts[-1] // 8), np.uint8)
    counted, some, numbers = np.zeros(len(shards), np.int64), {}, _ShardNumbers(shards)
    for batch in _batches(name, columns):
        shard = batch["shard"].dictionary_encode()
        number = numbers.of(shard.dictionary.to_pylist())[shard.indices.to_numpy()]
        index, keep = batch["index"].to_numpy().astype(np.int64), batch["keep"].to_numpy(zero_copy_only=False)
        mine = np.flatnonzero(number >= 0)
        first, end = np.asarray(starts)[number[mine]], np.asarray(starts)[number[mine] + 1]
        rows = first + index[mine]
        if (outside := (rows >= end) | (rows < first)).any():
            raise _other_shards(name, shards[number[mine][outside][0]], "more pairs than the shard")
        kept = rows[keep[mine]]
        np.bitwise_or.at(bits, kept >> 3, (0x80 >> (kept & 7)).astype(np.uint8))
        counted += np.bincount(number[mine], minlength=len(shards))
        compared = mine[keep[mine] & (number[mine] % -(-len(shards) // _COMPARED_SHARDS) == 0)]
        some |= _first_and_middle(batch, number, compared, starts)
    for number, pairs in enumerate(np.diff(starts)):
        if counted[number] != pairs:
            what = f"{counted[number]} pairs where the shard has {pairs}" if counted[number] else "nothing"
            raise _other_shards(name, shards[number], what)
    if not bits.any():
        raise UserError(f"manifest {name!r} keeps none of the {starts[-1]} pairs; loosen its rules")
    return Kept.from_bits(bits), sorted(some.items())


def _batches(name: str, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
    """Raises UserError where the file is damaged, too large for memory, or lacks a value."""
    try:
        for batch in read_batches(name, columns, _ROWS_AT_ONCE):
            for column in _COLUMNS:
                if batch[column].null_count:
                    raise UserError(f"manifest {name!r} has rows without {column!r}; curate again")
            yield batch
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"manifest {name!r} cannot be read ({' '.join(str(error).split())}); curate again") from error


def _first_and_middle(
    batch: pyarrow.RecordBatch, number: np.ndarray, among: np.ndarray, starts: Sequence[int]
) -> dict[int, dict]:
    """Of each shard among some rows of a batch two of these rows, and what is told of them."""
    _, first, count = np.unique(number[among], return_index=True, return_counts=True)
    chosen = np.unique(among[np.concatenate([first, np.minimum(first + count // 2, len(among) - 1)])])
    names = [name for name in batch.schema.names if name in ("index", *_COMPARED_COLUMNS)]
    told = batch.select(names).take(pyarrow.array(chosen)).to_pylist()
    return {int(starts[number[at]]) + row["index"]: row for at, row in zip(chosen, told, strict=True)}


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
            raise UserError(
                f"the manifest has both {self._claimed[number]!r} and {path!r}; name shards by the paths that it has"
            )
        return number


def _columns(manifest: str | os.PathLike) -> list[str]:
    """Those that are read. Raises as `KeptPairs` does where one is missing or of another kind."""
    name = os.fspath(manifest)
    if not Path(name).is_file():
        raise FileNotFoundError(f"no manifest at {name!r}; make one: siglip data curate SHARDS --out DIR")
    try:
        schema = pyarrow.parquet.read_schema(name)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(
            f"manifest {name!r} is no Parquet file; give the manifest.parquet of siglip data curate"
        ) from error
    columns = list(dict.fromkeys([*_COLUMNS, *_COMPARED_COLUMNS]))
    twice = repeated_name([column for column in schema.names if column in columns])
    for column, (fits, what) in _COLUMNS.items():
        if twice:
            problem = f"two columns called {twice!r}"
        elif column not in schema.names:
            problem = f"no column {column!r}"
        elif not fits(schema.field(column).type):
            problem = f"a column {column!r} of {schema.field(column).type}, not of {what}"
        else:
            continue
        raise UserError(f"manifest {name!r} has {problem}; give the manifest.parquet of siglip data curate")
    return [column for column in columns if column in schema.names]


def _other_shards(manifest: str, shard: str, what: str) -> UserError:
    return UserError(f"manifest {manifest!r} is of other shards: for {shard!r} it has {what}; curate again")
