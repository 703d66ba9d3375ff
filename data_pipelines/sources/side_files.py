"""What img2dataset writes beside a shard 00000.tar: 00000.parquet (a row per URL, failures too) and 00000_stats.json.

The Parquet file repeats the json members, so it is read only for the columns that they lack: in shards made without json, or
for scores that someone added later. The statistics give the number of pairs that the shard should hold.

The trap: its rows are not those of the tar, since failed downloads have one as well; they are matched by key.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.records import ShardLost
from data_pipelines.sources import files
from data_pipelines.sources.arrow_values import row_values
from data_pipelines.sources.columns import parse_object
from data_pipelines.sources.parquet import read_table
from data_pipelines.sources.remote import FileStat

KEY = "key"
_TABLE, _STATISTICS = ".parquet", "_stats.json"


def stat(shard: str) -> FileStat:
    """Size and version of a shard, and of local ones the versions of their side files. Raises as `files.stat`."""
    found = files.stat(shard)
    if files.is_remote(shard):  # a server would be asked about each
        return found
    return dataclasses.replace(found, beside=" ".join(_version(_stem(shard) + end) for end in (_TABLE, _STATISTICS)))


def _version(path: str) -> str:
    try:
        return str(os.stat(path).st_mtime_ns)
    except OSError:  # there is none
        return ""


def successes(shard: str) -> int | None:
    """The number of pairs in the statistics beside a shard; None if they cannot be read."""
    path = _stem(shard) + _STATISTICS
    if not files.exists(path):
        return None
    try:
        count = json.loads(files.read_whole(path))["successes"]
        if count != int(count) or count < 0:
            raise ValueError(count)
        return int(count)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        warnings.warn(f"statistics {path!r} cannot be read and are not used", stacklevel=2)
        return None


def match(shard: str, rows: np.ndarray, first_json: bytes | None) -> tuple[np.ndarray, list[str]] | None:
    """Each pair's row in the side file (-1: none) and the columns that the file adds; None if it adds nothing.

    rows: as in `tar_index`; first_json: the json of one pair, an example of the fields that the shard has itself.
    """
    path = _stem(shard) + _TABLE
    if not files.exists(path):
        return None
    try:
        data, (own, _) = files.read_whole(path), parse_object(first_json or b"")
        names = pq.read_schema(pa.BufferReader(data)).names
        added = [name for name in names if name != KEY and name not in own]
        if KEY not in names or not added:
            return None
        # All that will be read is read now: what is wrong with it costs these columns, and no pair later.
        table = read_table(data, [*(name for name in names if name == KEY), *added], "the table")
        row_of = {str(key).encode(): row for row, key in enumerate(table[KEY].to_pylist())}
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a key that is not UTF-8, a damaged footer
        told = " ".join(str(error).split())
        warnings.warn(f"side file {path!r} cannot be read ({told}) and is not used", stacklevel=2)
        return None
    found = np.empty(len(rows), [("row", "<i8")])
    found["row"] = [row_of.get(key.rpartition(b"/")[2], -1) for key in rows["key"].tolist()]
    if (found["row"] >= 0).any():
        return found, added
    warnings.warn(f"side file {path!r} has none of its shard's keys and is not used", stacklevel=2)
    return None


class SideTable:
    """The added columns of one side file, in memory."""

    def __init__(self, shard: str, columns: Sequence[str]):
        self._path = _stem(shard) + _TABLE
        try:
            data = files.read_whole(self._path)
        except (FileNotFoundError, PermissionError) as error:
            raise self._lost(error) from error
        try:
            self._table = read_table(data, [KEY, *columns], "the table")
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._lost(error) from error
        if not {KEY, *columns} <= set(self._table.column_names):
            raise self._changed()

    def _changed(self) -> ShardLost:
        return ShardLost(f"side file {self._path!r} has changed since its shard was opened; start again")

    def _lost(self, error: Exception) -> ShardLost:
        return ShardLost(f"side file {self._path!r} can no longer be read: {' '.join(str(error).split())}")

    def fields(self, row: int, key: str) -> dict[str, object]:
        """The columns of a row that have a value. Raises ShardLost if the row has another key."""
        values, _ = row_values(self._table, row)
        if not values or str(values.pop(KEY)) != key.rpartition("/")[2]:
            raise self._changed()
        return {name: value for name, value in values.items() if value is not None}


def _stem(shard: str) -> str:
    return shard.removesuffix(".tar")
