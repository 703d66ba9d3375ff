"""TFRecord files of tf.train.Example (TFDS and others), by random access and without TensorFlow.

    record = length (uint64) | masked crc of length | data | masked crc of data       little endian
    masked = rotate_right(crc32c, 15) + 0xa282ead8

One pass over the lengths, from record to record, finds the offsets, which are kept as an index. See `examples` for how a
record becomes a pair.
"""

import os
import struct
from collections.abc import Callable

import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.records import Pair
from data_pipelines.sources import examples, files, index_file
from data_pipelines.sources.files import Window
from data_pipelines.sources.index_file import Contents
from data_pipelines.sources.remote import FileStat
from data_pipelines.sources.shards import ColumnSource, join_offsets

_HEADER_BYTES, _FOOTER_BYTES = 12, 4
_MAX_FIRST_BYTES = 1 << 28
_GZIP_MAGIC = b"\x1f\x8b"


class TFRecordSource(ColumnSource):
    """The records of TFRecord shards, in their order. Arguments and errors: see `ColumnSource`."""

    kind = "tfrecord"

    @staticmethod
    def build(shard: str, stat: FileStat) -> Contents:
        """The index of a shard. Raises UserError: it is not a TFRecord file of tf.train.Example."""
        window = Window(shard, stat.size)
        offsets, sizes, crcs, whole = _walk(shard, window)
        if not offsets:
            raise UserError(f"shard {shard!r} does not hold one whole record ({stat.size} bytes); fetch it again")
        rows = join_offsets(offsets, sizes)
        try:
            small = [
                (offset, size)
                for offset, size in rows[: examples.LOOKED_AT_RECORDS].tolist()
                if size <= _MAX_FIRST_BYTES
            ]
            first = examples.parse_first(lambda n: window.fetch(*small[n])[: small[n][1]], len(small))
        except ValueError as error:
            raise UserError(f"shard {shard!r} does not hold tf.train.Example records: {error}") from error
        notes = {"truncated": not whole} | examples.notes(shard, first, len(rows))
        digest = index_file.digest(stat, rows, b"".join(crcs))
        return Contents(len(rows), {"rows": rows}, notes, digest)

    def _pair(self, shard: int, row: int, read: Callable[[int, int], bytes]) -> Pair:
        offset, size = self._tables(shard)["rows"][row].item()
        files.check_fits(self.paths[shard], size)
        framed = read(offset, size + _FOOTER_BYTES)
        record = framed[:size]
        if _masked_crc(record) != framed[size:]:
            raise OSError(f"record {row} of shard {self.paths[shard]!r} is damaged: its checksum is wrong")
        try:
            features = examples.parse(record)
        except ValueError as error:
            raise OSError(f"record {row} of shard {self.paths[shard]!r}: {error}") from error
        name = f"{os.path.basename(self.paths[shard])}/{row}"
        return examples.to_pair(features, image=self._images[shard], fallback_key=name)

    def _extents(self, shard: int, rows: np.ndarray) -> np.ndarray:
        chosen = self._tables(shard)["rows"][rows]
        return np.stack([chosen["offset"], chosen["bytes"] + _FOOTER_BYTES], axis=1)


def _walk(shard: str, window: Window) -> tuple[list[int], list[int], list[bytes], bool]:
    """Offset, size and data checksum of each whole record, and whether the file ends with the last one."""
    offsets, sizes, crcs = [], [], []
    offset = base = 0
    data = b""
    while offset < window.size:
        at = offset - base
        header = data[at : at + _HEADER_BYTES]
        if len(header) < _HEADER_BYTES:
            base, data, at = offset, window.fetch(offset), 0
            header = data[:_HEADER_BYTES]
        if len(header) < _HEADER_BYTES or _masked_crc(header[:8]) != header[8:]:
            if not offsets and data.startswith(_GZIP_MAGIC):
                raise UserError(f"shard {shard!r} is packed with gzip, which has no random access; unpack it")
            if not offsets:
                raise UserError(f"shard {shard!r} is not a TFRecord file: its first record has no valid length")
            return offsets, sizes, crcs, False
        (size,) = struct.unpack("<Q", header[:8])
        end = offset + _HEADER_BYTES + size + _FOOTER_BYTES
        if end > window.size:
            return offsets, sizes, crcs, False
        crc = data[end - _FOOTER_BYTES - base : end - base]
        if len(crc) < _FOOTER_BYTES:
            base, data = end - _FOOTER_BYTES, window.fetch(end - _FOOTER_BYTES)
            crc = data[:_FOOTER_BYTES]
        offsets.append(offset + _HEADER_BYTES)
        sizes.append(size)
        crcs.append(crc)
        offset = end
    return offsets, sizes, crcs, True


def _masked_crc(data: bytes) -> bytes:
    import google_crc32c

    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
