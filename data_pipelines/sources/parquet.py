"""Parquet files with encoded images in them: the Hugging Face layout, or any column of bytes.

    pair -> (file, row group, row);  a row group is read in one go, only its needed columns, and kept for its other rows

The image column is a struct {bytes, path} (Hugging Face's Image) or bytes; of several, the one named `image` or the like. All
other columns become fields.

The trap: the unit of reading is the row group, and an order that jumps between more groups than the cache holds reads a
whole group for every pair. Write small groups (100 images), or stream in blocks; `group_starts` has the boundaries.
"""

import bisect
import functools
import io
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from data_pipelines.errors import UserError
from data_pipelines.records import Pair, ShardLost
from data_pipelines.sources import files, index_file, parquet_headers
from data_pipelines.sources.arrow_values import check_lists, row_values
from data_pipelines.sources.blocks import Block, BlockCache, pieces
from data_pipelines.sources.columns import repeated_name
from data_pipelines.sources.index_file import Contents
from data_pipelines.sources.remote import FileStat
from data_pipelines.sources.shards import ColumnSource

CACHE_BYTES = 1 << 28
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "picture", "bytes", "content")
KEY_COLUMNS = ("key", "__key__")
_OPEN_FOOTERS = 64
_PLANNED_GROUPS = 1024
_JOIN_GAP_BYTES = 1 << 20
_FOOTER_GUESS_BYTES, _MAX_FOOTER_BYTES = 1 << 16, 1 << 30
# What a row group may take in memory: encoded images do not shrink in Parquet, texts to a fifth or so.
_MAX_EXPANSION, _SPARE_BYTES = 8, 1 << 29


class ParquetSource(ColumnSource):
    """The rows of Parquet files, in their order. Arguments and errors: see `ColumnSource`.

    Args:
      fields: the other columns to read; None for all.
    """

    kind = "parquet"
    _carried = (*ColumnSource._carried, "_fields")

    @staticmethod
    def build(shard: str, stat: FileStat) -> Contents:
        """The index of a shard. Raises UserError: it is cut, not a Parquet file, or has no rows."""
        read = functools.partial(files.Reader([shard], [stat.size]).read, 0)
        try:
            end = _file_end(read, stat.size)
            metadata = pq.read_metadata(_at_end(end, stat.size))
            schema, columns = metadata.schema.to_arrow_schema(), _read_columns(end, metadata, stat.size)
        except (pa.ArrowException, OSError, UnicodeDecodeError, parquet_headers.Damaged) as error:
            if isinstance(error, OSError) and not isinstance(error, pa.ArrowException) and files.is_remote(shard):
                raise
            detail = " ".join(str(error).split())
            raise UserError(f"shard {shard!r} is cut or not a Parquet file ({detail}); fetch it again") from error
        if not metadata.num_rows:
            raise UserError(f"shard {shard!r} holds no rows; leave it out")
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        groups = np.zeros(len(counts), [("first", "<i8")])
        groups["first"][1:] = np.cumsum(counts)[:-1]
        chunks = np.array([column[1:] for column in columns], parquet_headers.CHUNK)
        notes = {"columns": schema.names, "image": _image_column(schema)}
        identity = repr([((start, end), path, nbytes) for path, start, end, nbytes in columns]).encode()
        tables = {"groups": groups, "chunks": chunks}
        return Contents(sum(counts), tables, notes, index_file.digest(stat, groups, identity))

    def __init__(
        self,
        shards: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        image: str | None = None,
        fields: Collection[str] | None = None,
    ):
        self._fields = fields
        super().__init__(shards, image=image)

    def _prepare(self) -> None:
        super()._prepare()
        self._footer = functools.lru_cache(_OPEN_FOOTERS)(self._read_footer)
        self._group_read = functools.lru_cache(_PLANNED_GROUPS)(self._plan_group)
        self._groups = _GroupCache(CACHE_BYTES)
        for shard, path in enumerate(self.paths):
            if twice := repeated_name(self._names(shard)):
                raise UserError(f"shard {path!r} has two columns called {twice!r}; rename one of them")

    @property
    def group_starts(self) -> np.ndarray:
        """The first pair of each row group. -> int64 [groups]"""
        starts = [self._tables(shard)["groups"]["first"] + self._starts[shard] for shard in range(len(self.paths))]
        return np.concatenate(starts)

    @property
    def schema_metadata(self) -> dict[bytes, bytes]:
        """What the writer of the first shard noted in its schema."""
        return self._footer(0).metadata or {}

    def in_block(self, index: int, block: Block, kept: BlockCache) -> Pair:
        """The same as `self[index]`, but row groups are kept until the block is over. Raises what that raises."""
        shard, row = self.locate(index)
        group, row_in_group = self._group_of(shard, row)
        table = kept.get(until=block.until, **self._group_read(shard, group))
        return self._pair(shard, row, None) if table is None else self._to_pair(shard, row, table, row_in_group)

    def fetch_ahead(self, block: Block, kept: BlockCache) -> None:
        """Starts to fetch the remote row groups of a block."""
        for shard in self._remote_shards(block):
            firsts = self._tables(shard)["groups"]["first"]
            groups = np.searchsorted(firsts, self._rows_in(shard, block), "right") - 1
            for group in np.unique(groups).tolist():
                kept.fetch_ahead(until=block.until, **self._group_read(shard, group))

    def _pair(self, shard: int, row: int, read: Callable[[int, int], bytes] | None) -> Pair:
        group, row_in_group = self._group_of(shard, row)
        table = self._groups.get((shard, group), lambda: self._read_group(shard, group))
        return self._to_pair(shard, row, table, row_in_group)

    def _group_of(self, shard: int, row: int) -> tuple[int, int]:
        """The row group of a row, and the row's number in it."""
        firsts = self._tables(shard)["groups"]["first"]
        group = bisect.bisect_right(firsts, row) - 1
        return group, row - int(firsts[group])

    def _plan_group(self, shard: int, group: int) -> dict:
        """A row group as arguments of `BlockCache.get`."""
        nbytes = int(self._chunks(shard, group)[1]["uncompressed_bytes"].sum())
        fetch = functools.partial(self._read_group, shard, group)
        return {"key": (shard, group), "fetch": fetch, "nbytes": nbytes}

    def _to_pair(self, shard: int, row: int, table: pa.Table, row_in_group: int) -> Pair:
        values, problems = row_values(table, row_in_group, unchecked=(self._images[shard], *KEY_COLUMNS))
        image = values.pop(self._images[shard], None)  # a damaged group may have fewer rows than it says
        if isinstance(image, dict):
            image = image.get("bytes")
        key = next((values[name] for name in KEY_COLUMNS if values.get(name) is not None), None)
        values.pop("key", None)
        name = f"{os.path.basename(self.paths[shard])}/{row}" if key is None else str(key)
        fields = {name: value for name, value in values.items() if value is not None}
        return Pair(name, image, fields, problems)

    def _read_footer(self, shard: int) -> pq.FileMetaData:
        read, size = functools.partial(self._files.read, shard), self._indexes[shard].header.shard_bytes
        try:
            return pq.read_metadata(_at_end(_file_end(read, size), size))
        except pa.ArrowException as error:
            raise ShardLost(f"shard {self.paths[shard]!r} was replaced while it was in use; start again") from error

    def _read_group(self, shard: int, group: int) -> pa.Table:
        """Reads the needed columns of a row group; columns that lie close together take one read."""
        size, (numbers, chunks) = self._indexes[shard].header.shard_bytes, self._chunks(shard, group)
        places = np.stack([chunks["start"], chunks["end"] - chunks["start"]], 1)
        joined = pieces(places, gap_bytes=_JOIN_GAP_BYTES, limit_bytes=size).tolist()
        source = _Blocks([(start, self._files.read(shard, start, end - start)) for start, end in joined], size)
        about = f"row group {group} of shard {self.paths[shard]!r}"
        return _read_checked(source, self._footer(shard), [group], self._names(shard), numbers, chunks, about)

    def _names(self, shard: int) -> list[str]:
        """The needed columns."""
        columns, always = self.notes(shard)["columns"], {self._images[shard], *KEY_COLUMNS}
        return [
            name for name in columns if self._fields is None or name in always or name.partition(".")[0] in self._fields
        ]

    def _chunks(self, shard: int, group: int) -> tuple[list[int], np.ndarray]:
        """The needed leaf columns by number, and where a row group has them: `parquet_headers.CHUNK` [needed]."""
        schema = self._footer(shard).schema
        numbers = _leaves(schema, self._names(shard))
        return numbers, self._tables(shard)["chunks"].reshape(-1, len(schema))[group, numbers]


def read_table(data: bytes, names: Sequence[str], about: str) -> pa.Table:
    """Some columns of a whole file. about: what it is, for messages.

    Raises:
      OSError: they do not fit into memory, see `_check_expansion` and `check_lists`, or are damaged.
      ValueError: the footer is damaged, or two of the columns have one name.
    """
    if twice := repeated_name(names):
        raise ValueError(f"it has two columns called {twice!r}")
    metadata = pq.read_metadata(pa.BufferReader(data))
    columns = [column[1:] for column in _read_columns(data, metadata, len(data))]
    numbers = _leaves(metadata.schema, names)
    chunks = np.array(columns, parquet_headers.CHUNK).reshape(-1, len(metadata.schema))[:, numbers].ravel()
    source, groups = _Blocks([(0, data)], len(data)), list(range(metadata.num_row_groups))
    return _read_checked(source, metadata, groups, names, numbers, chunks, about)


def read_batches(path: str, names: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Some columns of a local file, some rows at a time. A text that repeats much may come as a dictionary.

    Raises:
      OSError: a row group does not fit into memory, see `_check_expansion`, or is damaged.
      ValueError: the footer is damaged.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        metadata = pq.read_metadata(path)
        numbers = _leaves(metadata.schema, names)
        found = np.array([column[1:] for column in _read_columns(data, metadata, len(data))], parquet_headers.CHUNK)
        columns = [metadata.schema.column(number) for number in numbers]
        for group, chunks in enumerate(found.reshape(-1, len(metadata.schema))[:, numbers]):
            about = f"row group {group}"
            repeated = _check_expansion(_Blocks([(0, data)], len(data)), chunks, columns, about)
            read = pq.ParquetFile(path, metadata=metadata, read_dictionary=repeated)
            yield from read.iter_batches(rows, row_groups=[group], columns=list(names))


def _leaves(schema: pq.ParquetSchema, names: Sequence[str]) -> list[int]:
    """The leaf columns, by number, of columns by name."""
    inside = tuple(f"{name}." for name in names)  # the name of a column may have dots itself
    return [number for number in range(len(schema)) if f"{schema.column(number).path}.".startswith(inside)]


def _read_checked(
    source: "_Blocks",
    metadata: pq.FileMetaData,
    groups: list[int],
    names: Sequence[str],
    numbers: Sequence[int],
    chunks: np.ndarray,
    about: str,
) -> pa.Table:
    """Columns of row groups, once it is known that they fit into memory.

    numbers, chunks: the leaf columns, and where each of the groups has them. Raises OSError: they do not fit, or are damaged.
    """
    columns = [metadata.schema.column(number) for number in numbers] * len(groups)
    repeated = _check_expansion(source, chunks, columns, about)
    try:
        file = pq.ParquetFile(pa.PythonFile(source, "r"), metadata=metadata, read_dictionary=repeated)
        # One by one: pyarrow does not join dictionaries inside lists.
        table = pa.concat_tables(file.read_row_group(n, columns=list(names), use_threads=False) for n in groups)
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"{about} is damaged: {' '.join(str(error).split())}") from error
    check_lists(table, about)
    return table


class _GroupCache:
    """The least recently used tables are dropped above a limit; a thread waits for a table that another is reading.

    Keys are (file, group). A table larger than the limit is kept until the next one comes.
    """

    def __init__(self, limit_bytes: int):
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()  # held for bookkeeping only, never while reading
        self._tables: OrderedDict[tuple[int, int], Future] = OrderedDict()

    def get(self, key: tuple[int, int], read):
        with self._lock:
            mine = key not in self._tables
            future = self._tables.setdefault(key, Future())
            self._tables.move_to_end(key)
        if mine:
            try:
                future.set_result(read())
            except BaseException as error:  # threads that wait for this table must not wait for ever
                with self._lock:
                    self._tables.pop(key, None)
                future.set_exception(error)
            with self._lock:
                self._shrink(key)
        return future.result()

    def _shrink(self, newest: tuple[int, int]) -> None:
        done = [key for key, future in self._tables.items() if future.done()]
        used_bytes = sum(self._tables[key].result().nbytes for key in done)
        for key in done:
            if used_bytes <= self._limit_bytes:
                return
            if key != newest:
                used_bytes -= self._tables.pop(key).result().nbytes


class _Blocks(io.RawIOBase):
    """A file of which only some blocks are in memory. blocks: (offset, bytes) of each."""

    def __init__(self, blocks: list[tuple[int, bytes]], size: int):
        self._blocks, self._size, self._at = blocks, size, 0

    def read(self, size: int = -1) -> bytes:
        size = self._size - self._at if size < 0 else size
        for start, block in self._blocks:
            if start <= self._at and self._at + size <= start + len(block):
                data = block[self._at - start : self._at - start + size]
                self._at += len(data)
                return data
        raise OSError(f"bytes {self._at} to {self._at + size} are outside the columns that were read")

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readable(self) -> bool:
        return True

    seekable = readable


def _read_columns(end: bytes, metadata: pq.FileMetaData, size: int) -> list[parquet_headers.Column]:
    """The columns of all row groups. end: of the file, the footer in it. Raises Damaged."""
    groups = parquet_headers.read_columns(end[-8 - int.from_bytes(end[-8:-4], "little") : -8], size)
    if [len(group) for group in groups] != [metadata.num_columns] * metadata.num_row_groups:
        raise parquet_headers.Damaged("a row group lacks columns")
    return [column for group in groups for column in group]


def _check_expansion(source: _Blocks, chunks: np.ndarray, columns: list[pq.ColumnSchema], about: str) -> list[str]:
    """Those of the columns that fit into memory only as dictionaries. Raises OSError: the row group does not fit at all."""
    disk_bytes = int((chunks["end"] - chunks["start"]).sum())
    limit_bytes = _MAX_EXPANSION * disk_bytes + _SPARE_BYTES
    expansions = []
    for start, end, _ in chunks.tolist():
        source.seek(start)
        expansions.append(parquet_headers.expansion(source.read(end - start)))
    pairs = list(zip(columns, expansions, strict=True))
    nbytes, repeated = sum(took.nbytes + took.values * max(0, column.length) for column, took in pairs), []
    if nbytes > limit_bytes:
        raise OSError(
            f"{about} takes {disk_bytes} bytes on disk and {nbytes} in memory, more than {_MAX_EXPANSION} times as many "
            f"and {_SPARE_BYTES >> 20} MiB; write smaller row groups"
        )
    for column, took in pairs:
        if column.physical_type == "BYTE_ARRAY" and nbytes + took.repeated_bytes > limit_bytes:
            repeated.append(column.path)
        else:
            nbytes += took.repeated_bytes
    return repeated


def _image_column(schema: pa.Schema) -> str | None:
    def is_bytes(kind: pa.DataType) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    structs = [
        field.name
        for field in schema
        if types.is_struct(field.type)
        and field.type.get_field_index("bytes") >= 0
        and is_bytes(field.type.field("bytes").type)
    ]
    plain = [field.name for field in schema if is_bytes(field.type)]
    for found in (structs, plain):
        named = [name for name in IMAGE_COLUMNS if name in found]
        if named or len(found) == 1:
            return (named or found)[0]
    return None


def _file_end(read, size: int) -> bytes:
    """The end of a file with all of its footer, in one read or two. read(offset, size) -> bytes"""
    end = read(max(0, size - _FOOTER_GUESS_BYTES), min(size, _FOOTER_GUESS_BYTES))
    needed = int.from_bytes(end[-8:-4], "little") + 8
    if len(end) < needed <= min(size, _MAX_FOOTER_BYTES) and end[-4:] == b"PAR1":
        end = read(size - needed, needed)
    return end


def _at_end(end: bytes, size: int) -> pa.PythonFile:
    return pa.PythonFile(_Blocks([(size - len(end), end)], size), "r")
