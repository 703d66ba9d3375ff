"""Rows grouped by another key, through files: a map stage scatters its rows over buckets, a reduce stage gathers one bucket.

A map task writes one file: the schema, the rows of every bucket that has any as an Arrow message, then where each bucket
starts (uint64s). A reduce task reads its two places and its rows out of every file. So there are as many files as map tasks,
whatever the number of buckets, and a task reads and holds its own bucket only.

The trap: the order of rows in a bucket must not depend on who finished first: files are read in the order of their tasks.
And an Arrow file would not do: whoever opens one reads its list of batches, 24 bytes a bucket, for the few rows of one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines.atomic import new_file

_PLACE_BYTES = 8
_SORTED_BYTES = 1 << 29
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Exchange:
    """A folder of scattered rows. sources: map tasks; buckets: reduce tasks."""

    folder: Path
    sources: int
    buckets: int

    def scatter(self, source: int, table: pa.Table, buckets: np.ndarray) -> None:
        """Writes the rows of one map task. buckets: int [n], the bucket of each row."""
        assert len(buckets) == len(table) and (len(buckets) == 0 or int(buckets.max()) < self.buckets)
        order = np.argsort(buckets, kind="stable")
        ends = np.searchsorted(buckets[order], np.arange(self.buckets), side="right")
        with new_file(self._file(source)) as partial, pa.OSFile(str(partial), "wb") as file:
            with pa.ipc.new_stream(file, table.schema, options=_OPTIONS) as stream:
                stream.write_batch(_one_batch(table.slice(0, 0)))  # the schema is written with the first batch
                places = [file.tell()]
                for rows in _by_bucket(table, order, ends):
                    if len(rows):
                        stream.write_batch(rows)
                    places.append(file.tell())
            file.write(np.array(places, "<u8").tobytes())

    def gather(self, bucket: int) -> pa.Table:
        """All rows of a bucket, in the order of their map tasks."""
        with pa.OSFile(str(self._file(0))) as file:
            schema = pa.ipc.read_schema(file)
        batches = []
        for source in range(self.sources):
            with pa.OSFile(str(self._file(source))) as file:
                file.seek(file.size() - _PLACE_BYTES * (self.buckets + 1 - bucket))
                start, end = np.frombuffer(file.read(2 * _PLACE_BYTES), "<u8").tolist()
                if end > start:
                    file.seek(start)
                    batches.append(pa.ipc.read_record_batch(file.read_buffer(end - start), schema))
        return pa.Table.from_batches(batches, schema)

    def _file(self, source: int) -> Path:
        return self.folder / f"{source:06d}.arrow"


def _by_bucket(table: pa.Table, order: np.ndarray, ends: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The rows of each bucket, sorted for some buckets at a time: an Arrow array of bytes ends at 2 GiB."""
    at_once, wide = len(table), table
    if table.nbytes > _SORTED_BYTES:
        at_once, wide = _SORTED_BYTES * len(table) // table.nbytes, table.cast(_wide(table.schema)).combine_chunks()
    rows, first, start = _one_batch(table.slice(0, 0)), 0, 0
    for end in ends.tolist():
        if end > first + len(rows):
            first = start
            rows = _one_batch(wide.take(pa.array(order[first : max(end, first + at_once)])).cast(table.schema))
        yield rows.slice(start - first, end - start)
        start = end


def _wide(schema: pa.Schema) -> pa.Schema:
    """With 64-bit offsets where columns may hold more than 2 GiB."""
    wide = {pa.binary(): pa.large_binary(), pa.string(): pa.large_string()}
    return pa.schema([field.with_type(wide.get(field.type, field.type)) for field in schema])


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    assert len(batches) < 2, f"{table.nbytes} bytes are too many for one bucket"
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
