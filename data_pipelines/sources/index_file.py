"""The index of one shard on disk: what one pass over a shard found, so that no later run has to make it.

A file beside the shard, or in the user's cache folder when the shard is remote or its folder read-only:

    {"version": 6, "kind": "tar", "shard_bytes": …, "shard_version": …, "beside": …, "pairs": n, "tables": …, …}\\n
    tables of fixed-width rows, mapped into memory and so shared by processes
    CRC32 of all bytes before, 4 bytes

An index is used when its shard still has the size and version (modification time, entity tag) that it states, so have the files
beside it that tell of its pairs, and its checksum is right; otherwise it is built again. Writing goes through a temporary file
and a rename, so processes can race.

The trap: a memory map holds a file descriptor for as long as it lives, and a thousand shards exhaust what a process
may have. So an opened index is only a header; its tables are mapped on demand, see `shards`.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.atomic import new_file
from data_pipelines.sources import files
from data_pipelines.sources.remote import FileStat

_VERSION = 6
_HEADER_BYTES, _CHECKSUM_BYTES = 1 << 20, 4


@dataclass(frozen=True)
class Contents:
    """What a pass over a shard found. tables: structured arrays; notes: for json; digest: identifies the pairs."""

    pairs: int
    tables: Mapping[str, np.ndarray]
    notes: Mapping[str, object]
    digest: str


@dataclass(frozen=True)
class Header:
    """The first line of an index file. `digest` identifies the pairs, wherever and whenever they lie."""

    version: int
    kind: str
    shard_bytes: int
    shard_version: str
    beside: str
    pairs: int
    tables: tuple[tuple[str, list, int], ...]
    digest: str
    notes: Mapping[str, object]


@dataclass(frozen=True)
class Index:
    """An index, its tables on disk (`place`) or, where none could be written, in memory (`kept`)."""

    header: Header
    place: str | None
    kept: Mapping[str, np.ndarray] | None = field(repr=False, default=None)

    def load(self) -> Mapping[str, np.ndarray] | None:
        """The tables; None when the file is gone, or another by now."""
        if self.kept is not None:
            return self.kept
        found = _map(self.place)
        return found[1] if found and found[0] == self.header else None


def open_index(
    shard: str,
    kind: str,
    build: Callable[[str, FileStat], Contents],
    stat: Callable[[str], FileStat] = files.stat,
) -> Index:
    """The index of a shard: the one on disk if it fits the shard as it is now, else built and written.

    Raises:
      FileNotFoundError, PermissionError, ValueError, OSError: as `files.stat` and `build` raise.
    """
    found = stat(shard)
    current = (_VERSION, kind, found.size, found.version, found.beside)
    places = [files.cache_path(shard, ".idx")]
    if not files.is_remote(shard) and not os.path.isdir(shard):
        places.insert(0, f"{shard}.idx")
    for place in places:
        header, _ = _map(place, check=True) or (None, {})
        if header and astuple(header)[: len(current)] == current:
            return Index(header, place)
    contents = build(shard, found)
    tables = {name: np.ascontiguousarray(table) for name, table in contents.tables.items()}
    described = tuple((name, table.dtype.descr, len(table)) for name, table in tables.items())
    header = Header(*current, contents.pairs, described, contents.digest, contents.notes)
    line = json.dumps(asdict(header)).encode() + b"\n"
    header = Header(**json.loads(line))  # as it will be read: json has no tuples
    for place in places:
        if _write(Path(place), line, tables):
            return Index(header, place)
    return Index(header, None, tables)


def digest(stat: FileStat, *parts: bytes | np.ndarray) -> str:
    """Identifies the pairs of a shard by its size and these."""
    sha = hashlib.sha256(f"{stat.size}\n".encode())
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def _map(place: str, *, check: bool = False) -> tuple[Header, dict[str, np.ndarray]] | None:
    """The index at `place`, or None when there is none or it is damaged. check: compare the checksum, which reads all of it."""
    try:
        with open(place, "rb") as file:
            whole = np.memmap(file, np.uint8, mode="r")
            file.seek(0)
            whole, stated = whole[:-_CHECKSUM_BYTES], whole[-_CHECKSUM_BYTES:]
            if check and _to_bytes(zlib.crc32(whole)) != stated.tobytes():
                return None
            line = file.readline(_HEADER_BYTES)
            header = Header(**json.loads(line))
            tables, offset = {}, len(line)
            for name, columns, count in header.tables:
                dtype = np.dtype([tuple(column) for column in columns])
                tables[name] = whole[offset : offset + count * dtype.itemsize].view(dtype)
                offset += count * dtype.itemsize
            return (header, tables) if offset == len(whole) else None
    except Exception:  # whatever lies there, it is not an index of ours
        return None


def _to_bytes(crc: int) -> bytes:
    return crc.to_bytes(_CHECKSUM_BYTES, "little")


def _write(place: Path, line: bytes, tables: Mapping[str, np.ndarray]) -> bool:
    """Whether the index could be written; a folder that is read-only or full is no reason to stop."""
    try:
        with new_file(place) as partial, partial.open("wb") as file:
            crc = 0
            for part in (line, *tables.values()):
                file.write(part)
                crc = zlib.crc32(part, crc)
            file.write(_to_bytes(crc))
    except OSError:
        return False
    return True
