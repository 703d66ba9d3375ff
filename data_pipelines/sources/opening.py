"""Shards of any format: the reader is chosen by the files' names, and by their first bytes where a name says nothing.

The trap: a caption field that the files do not have is found out here, not as a hundred thousand pairs without a text. Of
tars only the pairs tell what fields there are, so some of them are looked at.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Collection, Sequence
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.records import Pair, Source
from data_pipelines.sources import annotations, files, index_file, layouts
from data_pipelines.sources.arrayrecord import ArrayRecordSource
from data_pipelines.sources.columns import check_image, did_you_mean
from data_pipelines.sources.folder import FolderSource
from data_pipelines.sources.listing import ListSource, read_columns
from data_pipelines.sources.parquet import ParquetSource
from data_pipelines.sources.shards import ShardedSource
from data_pipelines.sources.tfrecord import TFRecordSource
from data_pipelines.sources.webdataset import TarSource

_KINDS = {
    "tar": re.compile(r"\.tar$"),
    "parquet": re.compile(r"\.(?:parquet|pq)$"),
    "arrayrecord": re.compile(r"\.(?:array_?record|riegeli)(?:-\d+-of-\d+)?$"),
    "tfrecord": re.compile(r"\.tfrecords?(?:-\d+-of-\d+)?$|\.tfrec$"),
    "list": re.compile(r"\.(?:csv|tsv|jsonl)$"),
    "folder": re.compile(r"\.(?:json|txt|token)$"),
}
_MAGIC = {"parquet": (0, b"PAR1"), "arrayrecord": (0, b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f"), "tar": (257, b"ustar")}
_PAIRS_LOOKED_AT = 100
_KNOWN = "tar, parquet, array_record, tfrecord, csv, tsv, jsonl, json, txt, and folders of images"


def open_source(
    shards: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    image: str | None = None,
    fields: Collection[str] | None = None,
    required: bool = True,
) -> ShardedSource:
    """The pairs of shards of one format, local or at URLs.

    Args:
      shards: a pattern or several, see `files.expand_shards`; folders of a known layout, see `layouts`; or annotation files, see
        `annotations`.
      image: the column or feature that holds the image, where the files have such; None finds it.
      fields: the fields that will be asked for, such as "captions" of "captions.en"; None for all of them. Other columns are
        not converted, so what is wrong with them does not matter.
      required: whether there must be all of these fields.

    Raises:
      FileNotFoundError, PermissionError: a shard is missing or not to be read.
      UserError: a shard is damaged, of an unknown or another format, or lacks a column.
      OSError: a server does not answer.
    """
    paths = [path for named in files.expand_shards(shards) for path in layouts.expand(named)]
    kinds = {path: _kind(path) for path in paths}
    kind, other = kinds[paths[0]], next((path for path in paths if kinds[path] != kinds[paths[0]]), None)
    if other is not None:
        raise UserError(f"shards {paths[0]!r} and {other!r} are of two formats; make them two sources")
    if kind == "list" and image is not None:  # a list is scanned when it is opened
        check_columns(paths[0], image=image)
    source = _open(paths, kind, image, fields)
    if not required:
        return source
    columns = source.columns
    roots = {column.partition(".")[0] for column in columns or ()}  # the name of a column may have a dot itself
    for name in fields or ():
        if columns is not None and name not in roots:
            raise UserError(f"shard {paths[0]!r} has no field {name!r}{did_you_mean(name, columns)}")
    if columns is None and fields:
        _check_some_pairs(source, fields)
    return source


def open_with_any_column(shards: str, *, image: str | None, **options: Any) -> ShardedSource:
    """As `open_source`; files that have no column `image`, such as tars, are read as if none was named."""
    try:
        return open_source(shards, image=image, **options)
    except UserError:
        if image is None:
            raise
        return open_source(shards, **options)


def check_columns(
    shards: str | os.PathLike | Sequence[str | os.PathLike], *, image: str | None = None, fields: Collection[str] = ()
) -> None:
    """Looks for named columns in the header of the first list or Parquet file, before anything is scanned; tars have none.

    Raises:
      FileNotFoundError: there is no shard.
      UserError: it has no column `image`, or none of `fields`.
    """
    if image is None and not fields:
        return
    paths = [path for named in files.expand_shards(shards) for path in layouts.expand(named)]
    columns = _columns_of(paths[0])
    if columns is None:
        return
    if image is not None:
        check_image(paths[0], {"columns": columns, "image": None}, image)
    if fields and {name.partition(".")[0] for name in fields}.isdisjoint({name.partition(".")[0] for name in columns}):
        raise UserError(f"shard {paths[0]!r} has no field {min(fields)!r}{did_you_mean(min(fields), columns)}")


def _columns_of(path: str) -> list[str] | None:
    """What the header of a list or a Parquet file names; None where there is none, or it is damaged, which reading it tells."""
    kind = _kind(path)
    try:
        if kind == "list":
            return read_columns(path)
        if kind != "parquet":
            return None
        return list(index_file.open_index(path, kind, ParquetSource.build).header.notes["columns"])
    except UserError:
        return None


def _check_some_pairs(source: ShardedSource, fields: Collection[str]) -> None:
    """Raises UserError when none of some pairs spread over the source has one of the fields; the first usually has."""
    there: set[str] = set()
    for index in range(0, len(source), -(-len(source) // _PAIRS_LOOKED_AT)):
        with contextlib.suppress(OSError):  # storage fails for a pair now and then
            there |= source[index].fields.keys()
        if not {name.partition(".")[0] for name in there}.isdisjoint(fields):
            return
    name = min(fields)
    raise UserError(
        f"no pair of {source.paths[0]!r} that was looked at has a field {name!r}{did_you_mean(name, there)}"
    )


def _open(paths: list[str], kind: str, image: str | None, fields: Collection[str] | None) -> ShardedSource:
    if kind == "parquet":
        return ParquetSource(paths, image=image, fields=fields)
    if kind in ("tar", "folder") and image is not None:
        told = "a tar has no columns; its images are its members KEY.jpg, KEY.png, …"
        raise UserError(f"image={image!r}: {told if kind == 'tar' else f'{paths[0]!r} has no columns; leave it out'}")
    if kind in ("tar", "folder"):
        return TarSource(paths) if kind == "tar" else FolderSource(paths)
    return {"arrayrecord": ArrayRecordSource, "tfrecord": TFRecordSource, "list": ListSource}[kind](paths, image=image)


def _kind(path: str) -> str:
    path, _ = annotations.split_name(path)
    if not files.is_remote(path) and os.path.isdir(path):
        return "folder"
    name = path.partition("?")[0] if path.startswith("http") else path
    for kind, pattern in _KINDS.items():
        if pattern.search(name.lower()):
            return kind
    stat = files.stat(path)
    head = files.Reader([path], [stat.size]).read(0, 0, min(stat.size, 512))
    for kind, (offset, magic) in _MAGIC.items():
        if head[offset : offset + len(magic)] == magic:
            return kind
    raise UserError(f"shard {path!r} is of no known format ({_KNOWN}); rename it if it is one of them")


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Some pairs of a source as a source."""

    source: Source
    rows: range

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint} {self.rows}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        return self.source[self.rows[index]]
