"""Rows regrouped by another key through files, as in MapReduce: map tasks write rows into buckets, reduce tasks read a bucket.

A map task writes one file: the schema, an Arrow message for every bucket that has rows, then the byte offset at which each
bucket starts (uint64s). A reduce task reads two offsets and its own rows out of every file. So there is one file per map
task, whatever the number of buckets, and a reduce task holds only its own bucket.

Files are read in the order of their tasks, so the order of rows does not depend on which task finished first. The Arrow file
format would not do: whoever opens such a file reads its list of batches, 24 bytes a bucket, for the few rows of one bucket.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines.atomic import new_file

_OFFSET_BYTES = 8
_MAX_SORTED_BYTES = 1 << 29
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Shuffle:
    """A folder of rows in buckets, one file per map task and one bucket per reduce task."""

    folder: Path
    map_tasks: int
    buckets: int

    def write(self, task: int, table: pa.Table, buckets: np.ndarray) -> None:
        """Writes the rows of one map task. buckets: int [n], the bucket of each row."""
        assert len(buckets) == len(table) and (len(buckets) == 0 or int(buckets.max()) < self.buckets)
        order = np.argsort(buckets, kind="stable")
        ends = np.searchsorted(buckets[order], np.arange(self.buckets), side="right")
        with new_file(self._file(task)) as partial, pa.OSFile(str(partial), "wb") as file:
            with pa.ipc.new_stream(file, table.schema, options=_OPTIONS) as stream:
                stream.write_batch(_one_batch(table.slice(0, 0)))  # the schema is written with the first batch
                offsets = [file.tell()]
                for rows in _by_bucket(table, order, ends):
                    if len(rows):
                        stream.write_batch(rows)
                    offsets.append(file.tell())
            file.write(np.array(offsets, "<u8").tobytes())

    def write_by_key(self, task: int, table: pa.Table, key: str) -> None:
        """The same, each row into the bucket of its key. key: a column of uint64 hashes."""
        self.write(task, table, (table[key].to_numpy() % np.uint64(self.buckets)).astype(np.int64))

    def read(self, bucket: int) -> pa.Table:
        """All rows of a bucket, in the order of their map tasks."""
        with pa.OSFile(str(self._file(0))) as file:
            schema = pa.ipc.read_schema(file)
        batches = []
        for task in range(self.map_tasks):
            with pa.OSFile(str(self._file(task))) as file:
                file.seek(file.size() - _OFFSET_BYTES * (self.buckets + 1 - bucket))
                start, end = np.frombuffer(file.read(2 * _OFFSET_BYTES), "<u8").tolist()
                if end > start:
                    file.seek(start)
                    batches.append(pa.ipc.read_record_batch(file.read_buffer(end - start), schema))
        return pa.Table.from_batches(batches, schema)

    def _file(self, task: int) -> Path:
        return self.folder / f"{task:06d}.arrow"


def _by_bucket(table: pa.Table, order: np.ndarray, ends: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The rows of each bucket. Only some buckets are sorted at a time: an Arrow array of bytes holds at most 2 GiB."""
    at_once, wide = len(table), table
    if table.nbytes > _MAX_SORTED_BYTES:
        at_once, wide = _MAX_SORTED_BYTES * len(table) // table.nbytes, table.cast(_wide(table.schema)).combine_chunks()
    rows, first, start = _one_batch(table.slice(0, 0)), 0, 0
    for end in ends.tolist():
        if end > first + len(rows):
            first = start
            rows = _one_batch(wide.take(pa.array(order[first : max(end, first + at_once)])).cast(table.schema))
        yield rows.slice(start - first, end - start)
        start = end


def _wide(schema: pa.Schema) -> pa.Schema:
    """The schema with 64-bit offsets in columns that may hold more than 2 GiB."""
    wide = {pa.binary(): pa.large_binary(), pa.string(): pa.large_string()}
    return pa.schema([field.with_type(wide.get(field.type, field.type)) for field in schema])


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    assert len(batches) < 2, f"{table.nbytes} bytes are too many for one bucket"
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
