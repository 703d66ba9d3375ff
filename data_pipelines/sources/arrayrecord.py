"""ArrayRecord shards (Grain, TFDS) whose records are tf.train.Example, by random access.

The format has its own index and checksums. See `examples` for how a record becomes a pair; `writing` writes such shards.

The trap: the library reads only local files, and reading a record unpacks its whole group. So remote shards are copied whole
on first use (see `copies`), and shards should be written with group_size:1, as TFDS does.
"""

import functools
import os
from collections.abc import Callable

from data_pipelines.errors import UserError
from data_pipelines.records import Pair, ShardLost
from data_pipelines.sources import copies, examples, files, index_file
from data_pipelines.sources.files import Window
from data_pipelines.sources.index_file import Contents
from data_pipelines.sources.remote import FileStat
from data_pipelines.sources.shards import ColumnSource

_OPEN_READERS = 64
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_IDENTITY_BYTES = 1 << 16


class ArrayRecordSource(ColumnSource):
    """The records of ArrayRecord shards, in their order. Arguments and errors: see `ColumnSource`."""

    kind = "arrayrecord"

    @staticmethod
    def build(shard: str, stat: FileStat) -> Contents:
        """The index of a shard. Raises UserError: it is cut, or not an ArrayRecord file of tf.train.Example."""
        with copies.local_copy(shard, stat.size, stat.version) as copy:
            reader = _open_file(copy)
        count = reader.num_records()
        if not reader.ok() or not count:
            raise UserError(
                f"shard {shard!r} is cut, empty or not an ArrayRecord file: it has no index at its end; fetch it again"
            )
        try:
            first = examples.parse_first(lambda n: reader.read([n])[0], count)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"shard {shard!r} does not hold tf.train.Example records: {error}") from error
        finally:
            reader.close()
        notes = examples.notes(shard, first, count)
        # The index at the end has the position of every chunk, and a chunk's header has the hash of its data.
        end = Window(shard, stat.size).fetch(max(0, stat.size - _IDENTITY_BYTES), _IDENTITY_BYTES)
        return Contents(count, {}, notes, index_file.digest(stat, f"{count}\n".encode(), end[-_IDENTITY_BYTES:]))

    def _prepare(self) -> None:
        super()._prepare()
        self._reader = functools.lru_cache(_OPEN_READERS)(self._open_reader)

    def _open_reader(self, shard: int):
        path, header = self.paths[shard], self._indexes[shard].header
        try:
            with copies.local_copy(path, header.shard_bytes, header.shard_version) as copy:
                if not os.path.exists(copy):
                    raise ShardLost(f"shard {path!r} vanished while it was in use; put it back and resume")
                reader = _open_file(copy)
                # A copy has size and version in its name. A local file is checked once it is open: then it cannot be replaced.
                if copy == path and files.stat(path) != FileStat(header.shard_bytes, header.shard_version):
                    raise ShardLost(f"shard {path!r} was replaced while it was in use; start again")
                return reader
        except (FileNotFoundError, PermissionError, UserError) as error:
            raise ShardLost(f"shard {path!r} can no longer be read: {error}") from error

    def _pair(self, shard: int, row: int, read: Callable[[int, int], bytes]) -> Pair:
        reader = self._reader(shard)
        try:
            (record,) = reader.read([row])
            features = examples.parse(record)
        except (RuntimeError, ValueError) as error:
            detail = " ".join(str(error).split())
            raise OSError(f"record {row} of shard {self.paths[shard]!r} is damaged: {detail}") from error
        name = f"{os.path.basename(self.paths[shard])}/{row}"
        return examples.to_pair(features, image=self._images[shard], fallback_key=name)


def _open_file(path: str):
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(path, _RANDOM_ACCESS)
