"""Rows grouped by another key, through files: a map stage scatters its rows over buckets, a reduce stage gathers one bucket.

A map task writes one Arrow IPC file with one record batch per bucket; a reduce task reads its batch out of every file. So
there are as many files as map tasks, whatever the number of buckets, and a task needs the memory of one bucket.

The trap: the order of rows in a bucket must not depend on who finished first: files are read in the order of their tasks.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines.atomic import new_file

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
        with (
            new_file(self._file(source)) as partial,
            pa.ipc.new_file(partial, batch.schema, options=_OPTIONS) as file,
        ):
            start = 0
            for end in ends.tolist():
                file.write_batch(batch.slice(start, end - start))
                start = end

    def gather(self, bucket: int) -> pa.Table:
        """All rows of a bucket, in the order of their map tasks."""
        batches = []
        for source in range(self.sources):
            with pa.OSFile(str(self._file(source))) as raw, pa.ipc.open_file(raw) as file:
                batches.append(file.get_batch(bucket))
        return pa.Table.from_batches(batches)

    def _file(self, source: int) -> Path:
        return self.folder / f"{source:06d}.arrow"


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
