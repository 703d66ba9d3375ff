"""Tar shards in the WebDataset / img2dataset layout (KEY.jpg, KEY.txt, KEY.json), read by random access.

A cut shard does not fail a run, and does not go unnoticed: its whole pairs are used, a warning says how many, and
`truncated_shards` lists it.
"""

import functools
import io
from collections.abc import Callable, Mapping

import numpy as np

from data_pipelines.records import Pair, ShardLost
from data_pipelines.sources import files, side_files, tar_index
from data_pipelines.sources.columns import parse_object
from data_pipelines.sources.shards import ShardedSource
from data_pipelines.sources.side_files import SideTable

_OPEN_SIDE_TABLES = 16
_READ_GAP_BYTES = 1 << 14
_MAX_LABEL_DIGITS = 18  # of a number that fits into 64 bits


class TarSource(ShardedSource):
    """The pairs of tar shards, in the order of the shards and of the members in them.

    Args:
      shards: a pattern or several, as for `files.expand_shards`.

    Raises:
      FileNotFoundError, PermissionError, UserError: a shard is missing, unreadable, empty, or not a tar.
      OSError: a server does not answer.
    """

    kind = "tar"
    stat = staticmethod(side_files.stat)
    build = staticmethod(tar_index.build)

    def _prepare(self) -> None:
        paths, notes = self.paths, self.notes
        self._side = functools.lru_cache(_OPEN_SIDE_TABLES)(
            lambda shard: SideTable(paths[shard], notes(shard)["side_columns"])
        )

    def _pair(self, shard: int, row: int, read: Callable[[int, int], bytes]) -> Pair:
        tables = self._tables(shard)
        key, *flat = tables["rows"][row].item()
        extents = list(zip(flat[::2], flat[1::2], strict=True))
        if len(tables["captions"]):
            first, last = np.searchsorted(tables["captions"]["pair"], (row, row + 1))
            extents += [(offset, size) for _, offset, size in tables["captions"][first:last].tolist()]
        captions = len(extents) - len(tar_index.SLOTS)
        if "arrays" in tables:
            first, last = np.searchsorted(tables["arrays"]["pair"], (row, row + 1))
            extents += [(offset, size) for _, offset, size in tables["arrays"][first : min(last, first + 1)].tolist()]
        files.check_fits(self.paths[shard], sum(size for _, size in extents))
        image, txt, meta, cls, *more = _read_members(extents, read)
        texts, arrays = [txt, *more[:captions]], more[captions:]
        fields, problems = _parse_fields([text for text in texts if text is not None], meta, cls)
        if arrays and (numbers := _parse_array(arrays[0])) is not None:
            fields["npy"] = numbers
        name = key.decode("utf-8", "replace")
        if "side_columns" in self.notes(shard) and (side_row := self._side_row(tables, shard, row)) >= 0:
            fields = self._side(shard).fields(side_row, name) | fields
        return Pair(name, image, fields, problems)

    def _side_row(self, tables: Mapping[str, np.ndarray], shard: int, row: int) -> int:
        if "side" not in tables:  # another program found none, and made the index again
            raise ShardLost(
                f"the side file of {self.paths[shard]!r} vanished while it was in use; put it back and resume"
            )
        return int(tables["side"]["row"][row])

    def member_extents(self, index: int) -> dict[str, tuple[int, int]]:
        """Where the members of a pair lie in its shard: {"image" | "txt" | "json" | "cls": (offset, bytes)}."""
        shard, row = self.locate(index)
        _, *flat = self._tables(shard)["rows"][row].item()
        found = zip(tar_index.SLOTS, flat[::2], flat[1::2], strict=True)
        return {slot: (offset, size) for slot, offset, size in found if offset >= 0}

    def _extents(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """One extent from the first to the last member of a pair if they are neighbours, else one per member."""
        tables = self._tables(shard)
        chosen, captions = tables["rows"][rows], tables["captions"]
        offsets = np.stack([chosen[slot] for slot in tar_index.SLOTS], axis=1)
        sizes = np.stack([chosen[f"{slot}_bytes"] for slot in tar_index.SLOTS], axis=1)
        there = offsets >= 0  # nowhere true in a pair that has only numbered captions
        start = np.where(there, offsets, np.iinfo(np.int64).max).min(1)
        whole = np.where(there, offsets + sizes, 0).max(1) - start
        close = there.any(1) & (whole - np.where(there, sizes, 0).sum(1) <= _READ_GAP_BYTES)
        apart = there & ~close[:, None]
        if "arrays" in tables:
            captions = np.concatenate([captions, tables["arrays"]])
        more = captions[np.isin(captions["pair"], rows)]
        found = [
            np.stack([start[close], whole[close]], axis=1),
            np.stack([offsets[apart], sizes[apart]], axis=1),
            np.stack([more["offset"], more["bytes"]], axis=1),
        ]
        return np.concatenate(found)


def _read_members(extents: list[tuple[int, int]], read: Callable[[int, int], bytes]) -> list[bytes | None]:
    """The members at these (offset, bytes), in one read if they are neighbours; None for offset -1."""
    present = [extent for extent in extents if extent[0] >= 0]
    start, end = min(present)[0], max(offset + size for offset, size in present)
    if end - start - sum(size for _, size in present) > _READ_GAP_BYTES:
        return [read(offset, size) if offset >= 0 else None for offset, size in extents]
    block = read(start, end - start)
    return [block[at - start : at - start + size] if at >= 0 else None for at, size in extents]


def _parse_array(data: bytes) -> list | None:
    """The numbers of a npy file; None if it holds anything else."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception:  # whatever numpy makes of damaged bytes
        return None
    return array.ravel().tolist() if isinstance(array, np.ndarray) and array.dtype.kind in "biuf" else None


def _parse_fields(texts: list[bytes], meta: bytes | None, cls: bytes | None) -> tuple[dict, tuple[str, ...]]:
    """The fields of a pair; `txt` is a list if there are several texts."""
    fields, problems = ({}, []) if meta is None else parse_object(meta)
    if texts:
        try:
            decoded = [text.decode("utf-8") for text in texts]
            fields["txt"] = decoded if len(decoded) > 1 else decoded[0]
        except UnicodeDecodeError:
            problems.append("invalid_utf8")
            fields.pop("txt", None)
    if cls is not None:
        label = cls.decode("utf-8", "replace").strip()
        if not label.isdecimal():
            fields["cls"] = label
        elif len(label) <= _MAX_LABEL_DIGITS:
            fields["cls"] = int(label)
        else:
            problems.append("invalid_cls")
    return fields, tuple(problems)
