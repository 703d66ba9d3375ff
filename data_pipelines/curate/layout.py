"""What the global stages share: which scans there are, how they are grouped, the thresholds, and the rows they exchange.

Consecutive shards form groups of at most about `MOST_PAIRS_PER_GROUP` pairs: the unit of a map or join task. Groups and
buckets are functions of the corpus alone, so the result does not depend on the number of workers. Every bucket is read
out of every group's file, so beyond `MOST_PAIRS` both grow with the square root of the corpus, in number and in size.

The trap: a task is pickled for every worker, and a corpus has a hundred thousand shards. A task names the folder; the
list is read there, once per process.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines.atomic import new_file
from data_pipelines.curate.config import MENDING, CurateConfig
from data_pipelines.curate.shuffle import Exchange

MOST_PAIRS_PER_GROUP, LEAST_GROUPS = 25_000, 64
ROWS_PER_BUCKET = 2_000_000
MOST_PAIRS = 25_000_000  # with groups and buckets of those sizes
LEAST_HASHED_PX = 8  # a perceptual hash of fewer pixels says nothing
_LEAST_BUCKETS = 16
_LAYOUT_FILE = "layout.json"

# A rule that applies to a pair for another one's sake: its better copy, or nothing (-1).
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
    """tables: the scans, in the order of the shards; groups: of each its group; pairs: of each how many."""

    shards: tuple[str, ...]
    tables: tuple[Path, ...]
    groups: tuple[int, ...]
    pairs: tuple[int, ...]

    def members(self, group: int) -> list[int]:
        return self._members[group]

    @functools.cached_property
    def _members(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for shard, group in enumerate(self.groups):
            found.setdefault(group, []).append(shard)
        return found


@dataclass(frozen=True)
class Work:
    """A folder in which a corpus is judged, and by which thresholds. scored: by a model, see `scores`."""

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

    def by_key(self, name: str, *, rows: int) -> Exchange:
        """From groups to buckets of some key. rows: in all, about."""
        per_bucket = round(ROWS_PER_BUCKET * _growth(self.pairs))
        return Exchange(self.folder / name, self.groups, max(_LEAST_BUCKETS, -(-rows // per_bucket)))

    def to_groups(self, name: str, *, sources: int) -> Exchange:
        """Back to groups."""
        return Exchange(self.folder / name, sources, self.groups)

    def group_of(self, shards: np.ndarray) -> np.ndarray:
        return np.asarray(self.layout.groups, np.int64)[shards]


def write_layout(work: Work, shards: list[str], tables: list[Path], pairs: list[int]) -> None:
    """Writes which shards there are, where their tables lie, how many pairs each has, and which group each belongs to."""
    before = np.concatenate([[0], np.cumsum(pairs)[:-1]])
    per_group = min(round(MOST_PAIRS_PER_GROUP * _growth(sum(pairs))), max(1, sum(pairs) // LEAST_GROUPS))
    _, groups = np.unique(before // per_group, return_inverse=True)
    content = {"shards": shards, "tables": [str(path) for path in tables], "groups": groups.tolist(), "pairs": pairs}
    with new_file(work.folder / _LAYOUT_FILE) as partial:
        partial.write_text(json.dumps(content))
    _read_layout.cache_clear()


def _growth(pairs: int) -> float:
    return max(1.0, (pairs / MOST_PAIRS) ** 0.5)


@functools.lru_cache(1)
def _read_layout(path: Path) -> Layout:
    content = json.loads(path.read_text())
    tables = tuple(Path(table) for table in content["tables"])
    return Layout(tuple(content["shards"]), tables, tuple(content["groups"]), tuple(content["pairs"]))


def read_pictures(path: Path, columns: list[str], *, least_side_px: int = 1) -> pa.Table:
    """Rows of a scan whose picture could be decoded and is not smaller, with their index."""
    columns = list(dict.fromkeys([*columns, "index", "pixel_hash", "width", "height"]))
    table = pq.read_table(path, columns=columns)
    shorter = pc.min_element_wise(table["width"], table["height"])
    wanted = pc.and_(pc.is_valid(table["pixel_hash"]), pc.greater_equal(shorter, least_side_px))
    return table.filter(wanted).replace_schema_metadata(None)


def ranks(table: pa.Table, scores: np.ndarray | None = None) -> np.ndarray:
    """Which of several copies is best, the highest: sound ones first, then larger, then better matched by their caption.

    table: reasons, width, height; scores: float [n] in [-1, 1] -> uint64 [n]
    """
    mending = frozenset(MENDING)
    sound = np.array([mending.issuperset(reasons) for reasons in table["reasons"].to_pylist()], bool)
    pixels = table["width"].to_numpy().astype(np.uint64) * table["height"].to_numpy().astype(np.uint64)
    rank = (sound.astype(np.uint64) << np.uint64(62)) | (pixels << np.uint64(16))
    if scores is not None:
        matched = np.nan_to_num(np.clip(scores, -1, 1), nan=-1.0) * 0.5 + 0.5
        rank |= np.round(matched * 65535).astype(np.uint64)
    return rank


def verdicts(columns: dict[str, np.ndarray], rule: str | list[str]) -> pa.Table:
    """A table of VERDICT. columns: shard, index and, where there is a better copy, of_shard, of_index, of_rank."""
    count = len(columns["shard"])
    nothing = {"of_shard": np.full(count, -1, np.int32), "of_index": np.full(count, -1, np.int32)}
    columns = nothing | {"of_rank": np.zeros(count, np.uint64)} | columns
    columns["rule"] = [rule] * count if isinstance(rule, str) else rule
    return pa.table({name: pa.array(columns[name], VERDICT.field(name).type) for name in VERDICT.names}, VERDICT)


def starts_of_runs(*keys: np.ndarray) -> np.ndarray:
    """bool [n]: whether a row differs from the one before in any of the keys (sorted by them)."""
    new = np.ones(len(keys[0]), bool)
    new[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return new
