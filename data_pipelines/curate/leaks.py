"""Pictures of evaluation sets within the corpus: rescaled, re-encoded or cropped, by hash and by embedding.

An evaluation set is small, so it is hashed under more crops (`EVAL_CROPS`), its windows are kept sorted on disk, mapped
into the memory of every worker, and each corpus picture looks itself up. Matches are confirmed on thumbnails as near
copies are, but with more tolerance: a leak that is missed spoils a number, a pair too many costs a pair. The reverse,
an evaluation picture that is a cut-out of the corpus picture, is looked up with the corpus picture's own crops. A model
that is given proposes the closest evaluation picture of each pair: what it takes for alike is left to the thumbnails too.

The trap: a cosine of 0.95 means the same picture to one model and the same kind of picture to another. And the
index grows with the evaluation sets, not with the corpus; a hundred thousand pictures take 0.8 GB.
"""

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.atomic import new_file
from data_pipelines.curate import pictures, pixel_match
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.duplicates import BANDS, decoded, window_bits, windows
from data_pipelines.curate.layout import LEAST_HASHED_PX, Work, read_pictures, starts_of_runs, verdicts
from data_pipelines.curate.scan import hashes_of
from data_pipelines.curate.scores import scores_path
from data_pipelines.curate.shuffle import Exchange

_QUERIES_AT_ONCE = 256
_CONFIRMED_AT_ONCE = 2048
_SPOT_SHARE = 0.03  # a watermark


def hash_leaks(work: Work) -> Exchange:
    """Pairs that look like a picture of an evaluation set, by group."""
    return work.to_groups("leaks", sources=work.groups)


def build_index(scans: list[Path], folder: Path) -> int:
    """Writes the index of evaluation sets and returns how many pictures it holds. scans: with `EVAL_CROPS`."""
    crops = len(pictures.EVAL_CROPS)
    hashes, places, thumbnails = [np.zeros((0, crops), np.uint64)], [np.zeros((0, 2), np.int32)], []
    for number, path in enumerate(scans):
        table = read_pictures(path, ["hashes", "thumbnail"], least_side_px=LEAST_HASHED_PX)
        hashes.append(hashes_of(table["hashes"], crops))
        index = table["index"].to_numpy()
        places.append(np.stack([np.full(len(index), number, np.int32), index], axis=1))
        thumbnails += table["thumbnail"].to_pylist()
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "places.npy", np.concatenate(places))
    pq.write_table(pa.table({"thumbnail": pa.array(thumbnails, pa.binary())}), folder / "thumbnails.parquet")
    every = np.concatenate(hashes)
    for name, keys in (("crops", every.ravel()), ("wholes", every[:, 0])):
        _save(folder / f"{name}.npy", keys)
        for band in range(BANDS):
            keyed = windows(keys, band, window_bits(len(keys)))
            order = np.argsort(keyed, kind="stable")
            _save(folder / f"{name}-{band}-order.npy", order)
            _save(folder / f"{name}-{band}-keys.npy", keyed[order])
    return len(every)


def find_leaks(task: tuple[Work, Path, int]) -> None:
    """The verdicts of one group by hash."""
    work, folder, group = task
    places = np.load(folder / "places.npy", mmap_mode="r")
    tables = []
    for shard in work.layout.members(group):
        table = read_pictures(work.layout.tables[shard], ["hashes", "thumbnail"], least_side_px=LEAST_HASHED_PX)
        rows, protected = _confirmed(work, folder, table)
        found = {"shard": np.full(len(rows), shard, np.int32), "index": table["index"].to_numpy()[rows]}
        found |= {"of_shard": places[protected, 0], "of_index": places[protected, 1]}
        tables.append(verdicts(found, "eval_leak"))
    table = pa.concat_tables(tables)
    hash_leaks(work).scatter(group, table, np.full(len(table), group))


def embedding_leaks(work: Work, shard: int, places: np.ndarray, thumbnails: pa.ChunkedArray) -> pa.Table:
    """The verdicts of one shard by embedding: the closest evaluation picture, if it is close and looks the same.

    places: [m, 2], shard and index of each embedded evaluation picture; thumbnails: of each.
    """
    table = pq.read_table(scores_path(work, shard), columns=["similarity", "closest"])
    rows = np.flatnonzero(np.nan_to_num(table["similarity"].to_numpy(), nan=-1.0) > work.config.leak_similarity)
    closest = table["closest"].to_numpy()[rows]
    same = np.zeros(len(rows), bool)
    every = pq.read_table(work.layout.tables[shard], columns=["thumbnail"])["thumbnail"] if len(rows) else None
    for start in range(0, len(rows), _CONFIRMED_AT_ONCE):
        some = slice(start, start + _CONFIRMED_AT_ONCE)
        ours, theirs = every.take(pa.array(rows[some])), thumbnails.take(pa.array(closest[some]))
        cut = np.zeros((len(ours), 4), np.float32)
        same[some] = pixel_match.same_picture(decoded(ours), decoded(theirs), cut, _tolerance(work.config))
    rows, shown = rows[same], places[closest[same]]
    found = {"shard": np.full(len(rows), shard, np.int32), "index": rows.astype(np.int32)}
    return verdicts(found | {"of_shard": shown[:, 0], "of_index": shown[:, 1]}, "eval_leak_embedding")


def _tolerance(config: CurateConfig) -> pixel_match.Tolerance:
    return pixel_match.Tolerance(config.leak_error, config.leak_spot, spot_share=_SPOT_SHARE, grey=True)


def _confirmed(work: Work, folder: Path, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a table and the evaluation picture that each shows: one of them, the first in order."""
    bits = work.config.duplicate_bits
    tolerance = _tolerance(work.config)
    boxes, eval_boxes = (np.array(crops, np.float32) for crops in (pictures.CROPS, pictures.EVAL_CROPS))
    hashes = hashes_of(table["hashes"], len(boxes))
    query, hit = _lookup(hashes[:, 0], folder, "crops", bits)
    rows, protected, cut = query, hit // len(eval_boxes), eval_boxes[hit % len(eval_boxes)]
    is_part = np.ones(len(rows), bool)
    query, hit = _lookup(hashes[:, 1:].ravel(), folder, "wholes", bits)
    crop = query % (hashes.shape[1] - 1) + 1
    rows, protected = np.concatenate([rows, query // (hashes.shape[1] - 1)]), np.concatenate([protected, hit])
    cut = np.concatenate([cut, boxes[crop]])
    is_part = np.concatenate([is_part, np.zeros(len(query), bool)])
    order = np.lexsort((~is_part, protected, rows))
    order = order[starts_of_runs(rows[order], protected[order], is_part[order])]
    rows, protected, cut, is_part = rows[order], protected[order], cut[order], is_part[order]
    same = np.zeros(len(rows), bool)
    for start in range(0, len(rows), _CONFIRMED_AT_ONCE):
        some = slice(start, start + _CONFIRMED_AT_ONCE)
        ours = decoded(table["thumbnail"].take(pa.array(rows[some])))
        theirs = decoded(_thumbnails(folder).take(pa.array(protected[some])))
        ours_is_part = is_part[some, None, None, None]
        same[some] = pixel_match.same_picture(
            np.where(ours_is_part, ours, theirs),
            np.where(ours_is_part, theirs, ours),
            cut[some],
            tolerance,
        )
    rows, protected = rows[same], protected[same]
    first = starts_of_runs(rows)
    return rows[first], protected[first]


def _lookup(queries: np.ndarray, folder: Path, name: str, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of queries and of indexed hashes that are within `bits` of each other: the closest hashes first."""
    keys = np.load(folder / f"{name}.npy", mmap_mode="r")
    width = window_bits(len(keys))
    found = [np.zeros((3, 0), np.int64)]
    for band in range(BANDS):
        sorted_keys = np.load(folder / f"{name}-{band}-keys.npy", mmap_mode="r")
        order = np.load(folder / f"{name}-{band}-order.npy", mmap_mode="r")
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            some = queries[start : start + _QUERIES_AT_ONCE]
            keyed = windows(some, band, width)
            low, high = np.searchsorted(sorted_keys, keyed, "left"), np.searchsorted(sorted_keys, keyed, "right")
            counts = high - low
            query = np.repeat(np.arange(len(some)), counts)
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            hit = order[np.repeat(low, counts) + within]
            distance = np.bitwise_count(some[query] ^ keys[hit])
            near = distance <= bits
            found.append(np.stack([query[near] + start, distance[near], hit[near]]))
    query, distance, hit = np.concatenate(found, axis=1)
    order = np.lexsort((hit, distance, query))
    query, hit = query[order], hit[order]
    new = starts_of_runs(query, hit)
    return query[new], hit[new]


@functools.lru_cache(1)
def _thumbnails(folder: Path) -> pa.ChunkedArray:
    return pq.read_table(folder / "thumbnails.parquet")["thumbnail"]


def _save(path: Path, array: np.ndarray) -> None:
    with new_file(path) as partial, partial.open("wb") as file:
        np.save(file, array)
