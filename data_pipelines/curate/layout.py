"""What the global stages share: the list of scans, how they are grouped, the thresholds, and the verdicts they pass on.

Consecutive shards form groups of at most about `MAX_PAIRS_PER_GROUP` pairs, the unit of a map or join task. Groups and
buckets depend on the corpus alone, so the result does not depend on the number of workers. Every bucket is read out of
every group's file, so above `MAX_UNSCALED_PAIRS` both grow with the square root of the corpus, in number and in size.

A task is pickled for every worker and a corpus may have a hundred thousand shards, so a task names only the folder; the
list of shards is read there, once per process.
"""

import bisect
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines.atomic import new_file
from data_pipelines.curate.config import REPAIRS, CurateConfig
from data_pipelines.curate.shuffle import Shuffle
from data_pipelines.curate.tables import SCAN_SCHEMA

MAX_PAIRS_PER_GROUP, MIN_GROUPS = 25_000, 64
ROWS_PER_BUCKET = 2_000_000
MAX_UNSCALED_PAIRS = 25_000_000  # larger corpora have larger groups and buckets
MIN_HASHED_PX = 8  # a perceptual hash of fewer pixels says nothing
_MIN_BUCKETS = 16
_LAYOUT_FILE = "layout.json"

# A rule that applies to a pair. of_shard, of_index, of_rank: the better duplicate or the evaluation image that it shows;
# -1, -1, 0 where the rule names no other pair.
VERDICT = pa.schema(
    [
        ("shard", pa.int32()),
        ("index", pa.int32()),
        ("rule", pa.string()),
        ("of_shard", pa.int32()),
        ("of_index", pa.int32()),
        ("of_rank", pa.uint64()),
    ]
)


@dataclass(frozen=True)
class Layout:
    """One entry per shard in each field: its name, its scan, its group, its number of pairs."""

    shards: tuple[str, ...]
    tables: tuple[Path, ...]
    groups: tuple[int, ...]
    pairs: tuple[int, ...]

    def members(self, group: int) -> list[int]:
        return list(range(bisect.bisect_left(self.groups, group), bisect.bisect_right(self.groups, group)))


@dataclass(frozen=True)
class Work:
    """One curation of a corpus: its working folder, the thresholds, and whether a model scored the pairs (see `scores`)."""

    folder: Path
    config: CurateConfig
    scored: bool = False

    @property
    def layout(self) -> Layout:
        return _read_layout(self.folder / _LAYOUT_FILE)

    @property
    def groups(self) -> int:
        return self.layout.groups[-1] + 1

    @property
    def pairs(self) -> int:
        return sum(self.layout.pairs)

    def to_buckets(self, name: str, *, rows: int) -> Shuffle:
        """A shuffle from groups to buckets of some key. rows: about how many there are in all."""
        per_bucket = round(ROWS_PER_BUCKET * _growth(self.pairs))
        return Shuffle(self.folder / name, self.groups, max(_MIN_BUCKETS, -(-rows // per_bucket)))

    def to_groups(self, name: str, *, map_tasks: int | None = None) -> Shuffle:
        """A shuffle back to groups. map_tasks: one per group unless given."""
        return Shuffle(self.folder / name, self.groups if map_tasks is None else map_tasks, self.groups)

    def group_of(self, shards: np.ndarray) -> np.ndarray:
        return np.asarray(self.layout.groups, np.int64)[shards]


class Stage(NamedTuple):
    """One pass over the corpus: `compute(work, n)` for every group n, or for every bucket n of a shuffle.

    Later stages read the files that it writes.
    """

    name: str
    compute: Callable[[Work, int], Any]
    reads: Callable[[Work], Shuffle] | None = None  # the shuffle whose buckets it reads

    def tasks(self, work: Work) -> list[tuple[Work, int]]:
        return [(work, n) for n in range(work.groups if self.reads is None else self.reads(work).buckets)]


def write_layout(work: Work, shards: list[str], tables: list[Path], pairs: list[int]) -> None:
    """Forms the groups and writes the layout. tables, pairs: the scan and the number of pairs of each shard."""
    before = np.concatenate([[0], np.cumsum(pairs)[:-1]])
    per_group = min(round(MAX_PAIRS_PER_GROUP * _growth(sum(pairs))), max(1, sum(pairs) // MIN_GROUPS))
    _, groups = np.unique(before // per_group, return_inverse=True)
    content = {"shards": shards, "tables": [str(path) for path in tables], "groups": groups.tolist(), "pairs": pairs}
    with new_file(work.folder / _LAYOUT_FILE) as partial:
        partial.write_text(json.dumps(content))
    _read_layout.cache_clear()


def _growth(pairs: int) -> float:
    return max(1.0, (pairs / MAX_UNSCALED_PAIRS) ** 0.5)


@functools.lru_cache(1)
def _read_layout(path: Path) -> Layout:
    content = json.loads(path.read_text())
    tables = tuple(Path(table) for table in content["tables"])
    return Layout(tuple(content["shards"]), tables, tuple(content["groups"]), tuple(content["pairs"]))


def read_images(path: Path, columns: list[str], *, min_side_px: int = 1) -> pa.Table:
    """The rows of a scan whose image could be decoded and has no shorter side than that, with their `index`."""
    columns = list(dict.fromkeys([*columns, "index", "pixel_hash", "width", "height"]))
    table = pq.read_table(path, columns=columns)
    shorter = pc.min_element_wise(table["width"], table["height"])
    wanted = pc.and_(pc.is_valid(table["pixel_hash"]), pc.greater_equal(shorter, min_side_px))
    return table.filter(wanted).replace_schema_metadata(None)


def read_rows(work: Work, shards: np.ndarray, indexes: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """Columns of the scans of pairs, in their order, after shard and index."""
    found: dict[str, list] = {name: [None] * len(shards) for name in columns}
    for shard in np.unique(shards).tolist():
        here = np.flatnonzero(shards == shard)
        table = pq.read_table(work.layout.tables[shard], columns=list(columns)).take(pa.array(indexes[here]))
        for name, values in found.items():
            for row, value in zip(here.tolist(), table[name].to_pylist(), strict=True):
                values[row] = value
    arrays = {name: pa.array(values, SCAN_SCHEMA.field(name).type) for name, values in found.items()}
    return pa.table({"shard": shards, "index": indexes} | arrays)


def ranks(table: pa.Table, scores: np.ndarray | None = None) -> np.ndarray:
    """Ranks pairs: of several duplicates the one with the highest rank is kept. -> uint64 [n]

    Sound pairs rank first, then larger images, then higher scores.

    Args:
      table: columns reasons, width, height.
      scores: float [n] in [-1, 1], NaN where there is none.
    """
    repairs = frozenset(REPAIRS)
    sound = np.array([repairs.issuperset(reasons) for reasons in table["reasons"].to_pylist()], bool)
    pixels = table["width"].to_numpy().astype(np.uint64) * table["height"].to_numpy().astype(np.uint64)
    rank = (sound.astype(np.uint64) << np.uint64(62)) | (pixels << np.uint64(16))
    if scores is not None:
        matched = np.nan_to_num(np.clip(scores, -1, 1), nan=-1.0) * 0.5 + 0.5
        rank |= np.round(matched * 65535).astype(np.uint64)
    return rank


def verdict_table(columns: dict[str, np.ndarray], rule: str | list[str]) -> pa.Table:
    """A table of VERDICT. columns: shard and index, and of_shard, of_index, of_rank where the rule names another pair."""
    count = len(columns["shard"])
    nothing = {"of_shard": np.full(count, -1, np.int32), "of_index": np.full(count, -1, np.int32)}
    columns = nothing | {"of_rank": np.zeros(count, np.uint64)} | columns
    columns["rule"] = [rule] * count if isinstance(rule, str) else rule
    return pa.table(columns, VERDICT)


def starts_of_runs(*keys: np.ndarray) -> np.ndarray:
    """Where runs of equal keys start, in rows sorted by them. -> bool [n]"""
    new = np.ones(len(keys[0]), bool)
    new[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return new


def number_in_run(first: np.ndarray) -> np.ndarray:
    """How many rows of its run come before each row, from where runs start. bool [n] -> int64 [n]"""
    return np.arange(len(first)) - np.flatnonzero(first)[np.cumsum(first) - 1]
