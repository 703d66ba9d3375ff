"""Rows grouped by another key, through files: a map stage scatters its rows over buckets, a reduce stage gathers one bucket.

A map task writes one file: the schema, the rows of every bucket that has any as an Arrow message, then where each bucket
starts (uint64s). A reduce task reads its two places and its rows out of every file. So there are as many files as map tasks,
whatever the number of buckets, and a task reads and holds its own bucket only.

The trap: the order of rows in a bucket must not depend on who finished first: files are read in the order of their tasks.
And an Arrow file would not do: whoever opens one reads its list of batches, 24 bytes a bucket, for the few rows of one.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines.atomic import new_file

_PLACE_BYTES = 8
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
        batch = _one_batch(table.take(pa.array(order)))
        ends = np.searchsorted(buckets[order], np.arange(self.buckets), side="right")
        with new_file(self._file(source)) as partial, pa.OSFile(str(partial), "wb") as file:
            with pa.ipc.new_stream(file, batch.schema, options=_OPTIONS) as stream:
                stream.write_batch(batch.slice(0, 0))  # the schema is written with the first batch
                places, start = [file.tell()], 0
                for end in ends.tolist():
                    if end > start:
                        stream.write_batch(batch.slice(start, end - start))
                    places.append(file.tell())
                    start = end
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


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
