"""Images of evaluation sets within the corpus, rescaled, re-encoded or cropped: found by hash and by embedding.

An evaluation set is small, so it is hashed under more crops (`EVAL_CROPS`), its bands are kept sorted on disk and mapped
into the memory of every worker, and each corpus image looks itself up. Matches are confirmed by the pixels of thumbnails,
as near-duplicates are but with more tolerance: a missed leak spoils a result, a pair too many costs one pair. The reverse,
an evaluation image that is a crop of the corpus image, is looked up with the corpus image's own crops. If there is a model,
it proposes the closest evaluation image of each pair, and thumbnails decide on that as well.

The trap: a cosine of 0.95 means the same image to one model and the same kind of image to another.

The index grows with the evaluation sets and not with the corpus: a hundred thousand images take 0.8 GB.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.atomic import new_file
from data_pipelines.curate import image_hashes
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.duplicates import BANDS, band_bits, band_of
from data_pipelines.curate.layout import MIN_HASHED_PX, Stage, Work, read_images, starts_of_runs, verdict_table
from data_pipelines.curate.pixel_match import Tolerance, same_thumbnails
from data_pipelines.curate.scan import hashes_of
from data_pipelines.curate.scores import scores_path
from data_pipelines.curate.shuffle import Shuffle

_QUERIES_AT_ONCE = 256
_SPOT_SHARE = 0.03  # a watermark


class Index(NamedTuple):
    """The images of evaluation sets. pairs: int32 [m, 2], shard and index; wholes: uint64 [m], hashes; thumbnails: [m]."""

    pairs: np.ndarray
    wholes: np.ndarray
    thumbnails: pa.ChunkedArray


def hash_verdicts(work: Work) -> Shuffle:
    """Pairs that show an evaluation image, found by hash, by group."""
    return work.to_groups("leaks")


def build_index(work: Work, scans: list[Path]) -> None:
    """Writes the index of evaluation sets. scans: made with `EVAL_CROPS`."""
    folder, crops = _index_folder(work), len(image_hashes.EVAL_CROPS)
    hashes, pairs, thumbnails = [np.zeros((0, crops), np.uint64)], [np.zeros((0, 2), np.int32)], []
    for number, path in enumerate(scans):
        table = read_images(path, ["hashes", "thumbnail"], min_side_px=MIN_HASHED_PX)
        hashes.append(hashes_of(table["hashes"], crops))
        index = table["index"].to_numpy()
        pairs.append(np.stack([np.full(len(index), number, np.int32), index], axis=1))
        thumbnails += table["thumbnail"].to_pylist()
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "pairs.npy", np.concatenate(pairs))
    pq.write_table(pa.table({"thumbnail": pa.array(thumbnails, pa.binary())}), folder / "thumbnails.parquet")
    every = np.concatenate(hashes)
    for name, keys in (("crops", every.ravel()), ("wholes", every[:, 0])):
        _save(folder / f"{name}.npy", keys)
        for band in range(BANDS):
            bands = band_of(keys, band, band_bits(len(keys)))
            order = np.argsort(bands, kind="stable")
            _save(folder / f"{name}-{band}-order.npy", order)
            _save(folder / f"{name}-{band}-keys.npy", bands[order])


def read_index(work: Work) -> Index:
    """What `build_index` wrote."""
    pairs, wholes = (np.load(_index_folder(work) / f"{name}.npy", mmap_mode="r") for name in ("pairs", "wholes"))
    return Index(pairs, wholes, _read_thumbnails(_index_folder(work)))


def find_leaks(work: Work, group: int) -> None:
    """Finds the leaks among the images of one group by hash."""
    pairs = np.load(_index_folder(work) / "pairs.npy", mmap_mode="r")
    tables = []
    for shard in work.layout.members(group):
        table = read_images(work.layout.tables[shard], ["hashes", "thumbnail"], min_side_px=MIN_HASHED_PX)
        rows, protected = _confirmed(work, table)
        tables.append(_verdicts(shard, table["index"].to_numpy()[rows], pairs[protected], "eval_leak"))
    table = pa.concat_tables(tables)
    hash_verdicts(work).write(group, table, np.full(len(table), group))


STAGES = (Stage("leaks", find_leaks),)


def embedding_leaks(work: Work, shard: int, pairs: np.ndarray, thumbnails: pa.ChunkedArray) -> pa.Table:
    """The leaks of one shard by embedding: pairs whose closest evaluation image is close and looks the same.

    Args:
      pairs: int32 [m, 2], shard and index of each embedded evaluation image.
      thumbnails: [m], their thumbnails.
    """
    table = pq.read_table(scores_path(work, shard), columns=["similarity", "closest"])
    rows = np.flatnonzero(np.nan_to_num(table["similarity"].to_numpy(), nan=-1.0) > work.config.leak_similarity)
    closest = table["closest"].to_numpy()[rows]
    ours = pq.read_table(work.layout.tables[shard], columns=["thumbnail"])["thumbnail"] if len(rows) else None
    cut, is_part = np.zeros((len(rows), 4), np.float32), np.ones(len(rows), bool)
    same = same_thumbnails(ours, thumbnails, (rows, closest), cut, is_part, tolerance(work.config))
    return _verdicts(shard, rows[same].astype(np.int32), pairs[closest[same]], "eval_leak_embedding")


def tolerance(config: CurateConfig) -> Tolerance:
    """How much a pair may differ from an evaluation image that it shows."""
    return Tolerance(config.leak_error, config.leak_spot, spot_share=_SPOT_SHARE, grey=True)


def _index_folder(work: Work) -> Path:
    return work.folder / "protected"


def _verdicts(shard: int, indexes: np.ndarray, pairs: np.ndarray, rule: str) -> pa.Table:
    found = {"shard": np.full(len(indexes), shard, np.int32), "index": indexes}
    return verdict_table(found | {"of_shard": pairs[:, 0], "of_index": pairs[:, 1]}, rule)


def _confirmed(work: Work, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a table that show an evaluation image, and which: the first of several. -> int [n] each"""
    folder, bits = _index_folder(work), work.config.duplicate_bits
    boxes, eval_boxes = (np.array(crops, np.float32) for crops in (image_hashes.CROPS, image_hashes.EVAL_CROPS))
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
    ours, theirs = table["thumbnail"], _read_thumbnails(folder)
    same = same_thumbnails(ours, theirs, (rows, protected), cut, is_part, tolerance(work.config))
    rows, protected = rows[same], protected[same]
    first = starts_of_runs(rows)
    return rows[first], protected[first]


def _lookup(queries: np.ndarray, folder: Path, name: str, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of queries and of indexed hashes within `bits` of each other, by query, the closest first."""
    keys = np.load(folder / f"{name}.npy", mmap_mode="r")
    width = band_bits(len(keys))
    found = [np.zeros((3, 0), np.int64)]
    for band in range(BANDS):
        sorted_keys = np.load(folder / f"{name}-{band}-keys.npy", mmap_mode="r")
        order = np.load(folder / f"{name}-{band}-order.npy", mmap_mode="r")
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            some = queries[start : start + _QUERIES_AT_ONCE]
            bands = band_of(some, band, width)
            low, high = (np.searchsorted(sorted_keys, bands, side) for side in ("left", "right"))
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
def _read_thumbnails(folder: Path) -> pa.ChunkedArray:
    return pq.read_table(folder / "thumbnails.parquet")["thumbnail"]


def _save(path: Path, array: np.ndarray) -> None:
    with new_file(path) as partial, partial.open("wb") as file:
        np.save(file, array)
