"""The offset index of one tar shard: where the members of each pair lie, found in one pass over the headers.

A file beside the shard, or in the cache folder when that is read-only:

    {"version": 1, "shard_bytes": …, "shard_mtime_ns": …, "pairs": n, …}\\n   one line of JSON
    n rows of fixed width (see `row_dtype`)                                  mapped into memory, shared by
    processes

An index is used when its shard still has the size and modification time that it states and its rows have the
stated checksum; otherwise it is built again. Writing goes through a temporary file and a rename, so processes
can race.

The trap: a tar that was cut reads like one that ends early: tarfile reports some cuts and is silent about
others. A shard counts as whole only when an end-of-archive block follows its last member.
"""

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

_VERSION = 1
_SLOTS = ("image", "txt", "json", "cls")
_IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "avif"))
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
_END_BLOCK = bytes(tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Header:
    """The first line of an index file. `digest` identifies the pairs, wherever and whenever they lie."""

    version: int
    shard_bytes: int
    shard_mtime_ns: int
    pairs: int
    key_bytes: int
    truncated: bool
    rows_crc32: int
    digest: str


@dataclass(frozen=True)
class TarIndex:
    """An index in memory. rows: structured [n], see `row_dtype`."""

    header: Header
    rows: np.ndarray = field(repr=False)

    @property
    def truncated(self) -> bool:
        return self.header.truncated

    @property
    def digest(self) -> str:
        return self.header.digest


def row_dtype(key_bytes: int) -> np.dtype:
    """A pair's row: its key, and offset (-1: no such member) and size of image, txt, json and cls."""
    columns = [("key", f"S{key_bytes}")]
    for slot in _SLOTS:
        columns += [(slot, "<i8"), (f"{slot}_bytes", "<i8")]
    return np.dtype(columns)


def open_index(shard: Path) -> TarIndex:
    """The index of a shard: the cached one if it fits the shard as it is now, else built and cached.

    Raises:
      FileNotFoundError, PermissionError: the shard cannot be opened.
      ValueError: the shard is no tar archive, or holds no pairs.
    """
    stat = _stat_shard(shard)
    places = (Path(f"{shard}.idx"), _cache_path(shard))
    for place in places:
        index = _read(place, stat)
        if index:
            return index
    index = _build(shard, stat)
    for place in places:
        if _write(place, index):
            break
    return index


def _stat_shard(shard: Path) -> os.stat_result:
    try:
        stat = shard.stat()
        with shard.open("rb"):
            pass
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no shard at {str(shard)!r}; check the path") from error
    except IsADirectoryError as error:
        raise ValueError(f"shard {str(shard)!r} is a folder; name its tar files, e.g. '{shard}/*.tar'") from error
    except PermissionError as error:
        raise PermissionError(f"no permission to read shard {str(shard)!r}; try chmod a+r on it") from error
    if stat.st_size == 0:
        raise ValueError(f"shard {str(shard)!r} is empty (0 bytes); fetch it again or leave it out")
    return stat


def _cache_path(shard: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(shard.absolute())).hexdigest()[:16]
    return root / "siglip" / "index" / f"{name}-{shard.name}.idx"


def _read(place: Path, stat: os.stat_result) -> TarIndex | None:
    """The index at `place`, or None when there is none, it is damaged, or the shard has changed since."""
    try:
        with place.open("rb") as file:
            line = file.readline(4096)
        header = Header(**json.loads(line))
        if (header.version, header.shard_bytes, header.shard_mtime_ns) != (
            _VERSION,
            stat.st_size,
            stat.st_mtime_ns,
        ):
            return None
        shape, dtype = (header.pairs,), row_dtype(header.key_bytes)
        rows = np.memmap(place, dtype, mode="r", offset=len(line), shape=shape)
    except (OSError, ValueError, TypeError):
        return None
    return TarIndex(header, rows) if zlib.crc32(rows) == header.rows_crc32 else None


def _write(place: Path, index: TarIndex) -> bool:
    """Whether the index could be written; a folder that is read-only or full is no reason to stop."""
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(json.dumps(asdict(index.header)).encode() + b"\n" + index.rows.tobytes())
        os.replace(partial, place)
    except OSError:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            pass
        return False
    return True


def _build(shard: Path, stat: os.stat_result) -> TarIndex:
    pairs, truncated = _scan(shard)
    if not pairs:
        raise ValueError(f"shard {str(shard)!r} holds no image-text pairs ({stat.st_size} bytes); leave it out")
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in pairs]
    key_bytes = max(map(len, keys))
    rows = np.empty(len(pairs), row_dtype(key_bytes))
    rows["key"] = keys
    for slot in _SLOTS:
        places = np.array([members.get(slot, (-1, 0)) for _, members in pairs], np.int64)
        rows[slot], rows[f"{slot}_bytes"] = places[:, 0], places[:, 1]
    digest = hashlib.sha256(f"{stat.st_size}\n".encode() + rows.tobytes()).hexdigest()
    header = Header(_VERSION, stat.st_size, stat.st_mtime_ns, len(rows), key_bytes, truncated, zlib.crc32(rows), digest)
    return TarIndex(header, rows)


def _scan(shard: Path) -> tuple[list[tuple[str, dict[str, tuple[int, int]]]], bool]:
    """The pairs of a shard, each (key, {slot: (offset, bytes)}), in order of their first member; and: is it
    cut?

    Members of a key may come in any order and apart from each other. Of several images of a key the first
    counts; the same file name once more begins a new pair. A pair that the cut went through is left out.
    """
    open_pairs: dict[str, dict[str, tuple[int, int]]] = {}
    names: dict[str, set[str]] = {}
    pairs = []
    members = _Members(shard)
    for name, key, slot, offset, size in members:
        if key not in open_pairs or name in names[key]:
            open_pairs[key], names[key] = {}, set()
            pairs.append((key, open_pairs[key]))
        names[key].add(name)
        open_pairs[key].setdefault(slot, (offset, size))
    if members.cut_key is not None:
        pairs = [(key, slots) for key, slots in pairs if slots is not open_pairs.get(members.cut_key)]
    return pairs, members.truncated


class _Members:
    """Iterates over the members of pairs; afterwards says whether the archive was cut, and in which pair."""

    def __init__(self, shard: Path):
        self._shard = shard
        self.truncated = False
        self.cut_key: str | None = None

    def __iter__(self) -> Iterator[tuple[str, str, str, int, int]]:
        with self._shard.open("rb") as file:
            shard_bytes = os.fstat(file.fileno()).st_size
            try:
                archive = tarfile.open(fileobj=file, mode="r:")
            except tarfile.ReadError as error:
                raise ValueError(f"shard {str(self._shard)!r} is not an uncompressed tar archive ({error})") from error
            while (member := self._next(archive)) is not None:
                archive.members.clear()
                matched = _MEMBER_NAME.fullmatch(member.name)
                if not member.isreg() or not matched:
                    continue
                key, extension = matched[1], matched[2].lower()
                slot = "image" if extension in _IMAGE_EXTENSIONS else extension
                if member.offset_data + member.size > shard_bytes:
                    self.truncated, self.cut_key = True, key
                elif slot in _SLOTS:
                    yield member.name, key, slot, member.offset_data, member.size
            file.seek(archive.offset)
            self.truncated |= file.read(tarfile.BLOCKSIZE) != _END_BLOCK

    def _next(self, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        try:
            return archive.next()
        except tarfile.TarError:
            self.truncated = True
            return None
