"""Tar shards in the WebDataset / img2dataset layout (KEY.jpg, KEY.txt, KEY.json), read by random access.

A tar with an offset index is as fast as ArrayRecord, so no conversion step is needed.

The trap: opening a shard that was cut must not fail the run, but must not go unseen either: what is whole is
used, a warning says how much, and `truncated_shards` lists them.
"""

import bisect
import functools
import glob
import hashlib
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.records import Pair
from data_pipelines.sources import tar_index

_OPEN_SHARDS = 128
_READ_GAP_BYTES = 1 << 14
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class TarSource:
    """The pairs of tar shards, in the order of the shards and of the members in them.

    Args:
      shards: a pattern or several, as for `expand_shards`.

    Raises:
      FileNotFoundError, PermissionError, ValueError: a shard is missing, unreadable, empty, or no tar.
    """

    def __init__(self, shards: str | os.PathLike | Sequence[str | os.PathLike]):
        self._open(expand_shards(shards))
        for path in self.truncated_shards:
            pairs = len(self._rows[self.paths.index(path)])
            message = f"shard {str(path)!r} is cut off: its {pairs} whole pairs are used; fetch it again"
            warnings.warn(message, stacklevel=2)

    def _open(self, paths: list[Path]) -> None:
        indexes = [tar_index.open_index(path) for path in paths]
        self.paths = paths
        self.truncated_shards = [path for path, index in zip(paths, indexes, strict=True) if index.truncated]
        self._rows = [index.rows for index in indexes]
        self._starts = list(itertools.accumulate((len(rows) for rows in self._rows), initial=0))
        contents = [f"{path.name}\t{index.digest}\n" for path, index in zip(paths, indexes, strict=True)]
        self.fingerprint = hashlib.sha256("".join(contents).encode("utf-8", "surrogateescape")).hexdigest()
        # A file that the cache drops is closed with its last reference, so never under a thread that reads it.
        self._file = functools.lru_cache(_OPEN_SHARDS)(lambda shard: open(paths[shard], "rb", buffering=0))

    def __getstate__(self) -> list[Path]:
        return self.paths

    def __setstate__(self, paths: list[Path]) -> None:
        self._open(paths)

    def __iter__(self) -> Iterator[Pair]:
        return map(self.__getitem__, range(len(self)))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Pair:
        """The pair at `index`. Raises IndexError outside the source, OSError when a shard fails."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        key, *places = self._rows[shard][index - self._starts[shard]].item()
        image, txt, meta, cls = self._read(shard, list(zip(places[::2], places[1::2], strict=True)))
        fields, problems = _parse_fields(txt, meta, cls)
        return Pair(key.decode("utf-8", "replace"), image, fields, problems)

    def _read(self, shard: int, places: list[tuple[int, int]]) -> list[bytes | None]:
        """The members at these (offset, bytes), in one read if they are neighbours; None for offset -1."""
        file = self._file(shard)  # Held by this name while its descriptor is used, see `_open`.
        fd = file.fileno()
        present = [place for place in places if place[0] >= 0]
        start, end = min(present)[0], max(offset + size for offset, size in present)
        if end - start - sum(size for _, size in present) > _READ_GAP_BYTES:
            return [os.pread(fd, size, offset) if offset >= 0 else None for offset, size in places]
        block = os.pread(fd, end - start, start)
        return [block[at - start : at - start + size] if at >= 0 else None for at, size in places]


def expand_shards(shards: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    """The files that patterns name, in the order of the patterns, sorted within a glob.

    A pattern is a path with `*`, `?`, `[…]`, `{00000..00003}` or `{a,b}` in it.

    Raises:
      FileNotFoundError: a pattern names no file.
      ValueError: there is no pattern.
    """
    patterns = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    if not patterns or not all(os.fspath(pattern) for pattern in patterns):
        raise ValueError(f"shards={shards!r} names nothing; give a path such as 'data/{{00000..00009}}.tar'")
    paths = []
    for pattern in patterns:
        for path in _expand_braces(os.path.expanduser(os.fspath(pattern))):
            found = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]
            if not found:
                raise FileNotFoundError(f"no shard matches {path!r}; check the path and the pattern")
            paths += [Path(name) for name in found]
    return list(dict.fromkeys(paths))


def _expand_braces(pattern: str) -> list[str]:
    matched = _BRACES.search(pattern)
    if not matched:
        return [pattern]
    if bounds := _RANGE.fullmatch(matched[1]):
        first, last = bounds.groups()
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        if not choices:
            raise ValueError(f"range {{{matched[1]}}} in {pattern!r} runs backwards; use {{{last}..{first}}}")
    else:
        choices = matched[1].split(",")
    head, tail = pattern[: matched.start()], pattern[matched.end() :]
    return [expanded for choice in choices for expanded in _expand_braces(head + choice + tail)]


def _parse_fields(txt: bytes | None, meta: bytes | None, cls: bytes | None) -> tuple[dict, tuple[str, ...]]:
    fields, problems = {}, []
    if meta is not None:
        try:
            parsed = json.loads(meta)
            fields = parsed if isinstance(parsed, dict) else problems.append("invalid_json") or {}
        except ValueError:
            problems.append("invalid_json")
    if txt is not None:
        try:
            fields["txt"] = txt.decode("utf-8")
        except UnicodeDecodeError:
            problems.append("invalid_utf8")
            fields.pop("txt", None)
    if cls is not None:
        label = cls.decode("utf-8", "replace").strip()
        fields["cls"] = int(label) if label.isdecimal() else label
    return fields, tuple(problems)
