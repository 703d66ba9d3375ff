"""The kept image that is closest to each evaluation image, so that a reader sees whether leaks are out: DIR/closest.parquet.

    hashes     of every evaluation image, the `_OF_GROUP` kept images of a group whose hashes differ in the fewest bits
    choose     the `_COMPARED` of them all that differ in the fewest, in the groups where they lie
    compare    their thumbnails, as leaks are confirmed: the image at the least distance (see `pixel_match`) remains

Unlike the search for leaks this one passes over no kept image and knows no threshold: a bit costs so little that every hash is
compared with every other. It compares whole images only, and the pixels of few: where 8 images of a group, or 16 in all, have
hashes as close as a copy's, the copy can be missed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.curate import leaks
from data_pipelines.curate.image_hashes import CROPS
from data_pipelines.curate.layout import (
    MIN_HASHED_PX,
    Stage,
    Work,
    number_in_run,
    read_images,
    read_rows,
    starts_of_runs,
)
from data_pipelines.curate.manifest import JoinTask
from data_pipelines.curate.pixel_match import compare_thumbnails, distances
from data_pipelines.curate.scan import hashes_of
from data_pipelines.curate.shuffle import Shuffle
from data_pipelines.curate.tables import write_table

CLOSEST_FILE = "closest.parquet"
SHOWN = 12  # of an evaluation shard
_OF_GROUP, _COMPARED = 8, 16
_COMPARED_AT_ONCE = 1 << 22
_DECIMALS = 3  # of a distance: the last bits of a matrix product differ between machines

# One row per evaluation image. bits: in which the hashes of the two images differ, of 63; distance: 1 is the most that a leak
# has. The thumbnails, JPEGs of 64 x 64, are those of the closest `SHOWN` of every evaluation shard.
CLOSEST_SCHEMA = pa.schema(
    [
        ("eval_shard", pa.string()),
        ("eval_index", pa.int32()),
        ("eval_key", pa.string()),
        ("shard", pa.string()),
        ("index", pa.int32()),
        ("key", pa.string()),
        ("bits", pa.uint8()),
        ("distance", pa.float32()),
        ("eval_thumbnail", pa.binary()),
        ("thumbnail", pa.binary()),
    ]
)
_CANDIDATE = pa.schema([("image", pa.int32()), ("shard", pa.int32()), ("index", pa.int32()), ("bits", pa.uint8())])


def by_image(work: Work) -> Shuffle:
    """Candidates by evaluation image."""
    return work.to_buckets("closest", rows=work.groups * _OF_GROUP * len(leaks.read_index(work).pairs))


def by_group(work: Work) -> Shuffle:
    """Candidates by their own group."""
    return work.to_groups("closest-candidates", map_tasks=by_image(work).buckets)


def find_close(join: JoinTask, group: int) -> None:
    """Finds, for every evaluation image, the kept images of a group whose hashes are close."""
    work, wholes = join.work, leaks.read_index(join.work).wholes
    hashes, places = [np.zeros(0, np.uint64)], [np.zeros((0, 2), np.int32)]
    for shard in work.layout.members(group):
        table = read_images(work.layout.tables[shard], ["hashes"], min_side_px=MIN_HASHED_PX)
        kept = pq.read_table(join.final(shard), columns=["keep"])["keep"].to_numpy()
        table = table.filter(pa.array(kept[table["index"].to_numpy()], pa.bool_()))
        hashes.append(hashes_of(table["hashes"], len(CROPS))[:, 0])
        index = table["index"].to_numpy()
        places.append(np.stack([np.full(len(index), shard, np.int32), index], axis=1))
    image, row, bits = _closest(wholes, np.concatenate(hashes))
    shard, index = np.concatenate(places)[row].T
    shuffle = by_image(work)
    table = pa.table({"image": image, "shard": shard, "index": index, "bits": bits}, _CANDIDATE)
    shuffle.write(group, table, image.astype(np.int64) * shuffle.buckets // max(1, len(wholes)))


def choose(join: JoinTask, bucket: int) -> None:
    """Chooses the candidates of some evaluation images that are compared by pixels."""
    rows = by_image(join.work).read(bucket)
    order = np.lexsort([rows[name].to_numpy() for name in ("index", "shard", "bits", "image")])
    few = number_in_run(starts_of_runs(rows["image"].to_numpy()[order])) < _COMPARED
    rows = rows.take(pa.array(order[few]))
    by_group(join.work).write(bucket, rows, join.work.group_of(rows["shard"].to_numpy()))


def compare(join: JoinTask, group: int) -> Path:
    """Compares the candidates of a group by pixels. -> a file with the closest of each evaluation image"""
    work, rows, index = join.work, by_group(join.work).read(group), leaks.read_index(join.work)
    found = read_rows(work, rows["shard"].to_numpy(), rows["index"].to_numpy(), ("thumbnail", "key"))
    pair = np.arange(len(rows)), rows["image"].to_numpy()
    cut, is_part = np.zeros((len(rows), 4), np.float32), np.ones(len(rows), bool)
    settings = (cut, is_part, leaks.tolerance(work.config))
    apart = compare_thumbnails(distances, found["thumbnail"], index.thumbnails, pair, *settings)
    columns = {"distance": np.round(apart, _DECIMALS), "thumbnail": found["thumbnail"], "key": found["key"]}
    for name, values in columns.items():
        rows = rows.append_column(name, pa.array(values) if isinstance(values, np.ndarray) else values)
    path = work.folder / "closest-compared" / f"{group:06d}.parquet"
    write_table(path, _first_of_each(rows))
    return path


def gather(join: JoinTask, paths: Sequence[Path], scans: Sequence[Path]) -> pa.Table:
    """The rows of `CLOSEST_SCHEMA`. paths: what `compare` returned; scans: of the evaluation shards."""
    index, work = leaks.read_index(join.work), join.work
    columns = ["image", "shard", "index", "bits", "distance", "key"]
    rows = _first_of_each(pa.concat_tables([pq.read_table(path, columns=columns) for path in paths]))
    eval_shard, eval_index = index.pairs[rows["image"].to_numpy()].T
    order = np.lexsort((rows["distance"].to_numpy(), eval_shard))
    shown = np.sort(order[number_in_run(starts_of_runs(eval_shard[order])) < SHOWN])
    thumbnails = np.full(len(rows), None, object)
    groups = work.group_of(rows["shard"].to_numpy())[shown]
    for group in np.unique(groups).tolist():
        table = pq.read_table(paths[group], columns=["image", "thumbnail"])
        here = shown[groups == group]
        places = np.searchsorted(table["image"].to_numpy(), rows["image"].to_numpy()[here])
        thumbnails[here] = table["thumbnail"].take(pa.array(places)).to_pylist()
    eval_thumbnails = np.full(len(rows), None, object)
    eval_thumbnails[shown] = index.thumbnails.take(rows["image"].take(pa.array(shown))).to_pylist()
    eval_keys = [pq.read_table(path, columns=["key"])["key"].to_pylist() for path in scans]
    return pa.table(
        {
            "eval_shard": [join.protected[shard] for shard in eval_shard],
            "eval_index": eval_index,
            "eval_key": [eval_keys[shard][row] for shard, row in zip(eval_shard, eval_index, strict=True)],
            "shard": [work.layout.shards[shard] for shard in rows["shard"].to_pylist()],
            **{name: rows[name] for name in ("index", "key", "bits", "distance")},
            "eval_thumbnail": eval_thumbnails,
            "thumbnail": thumbnails,
        },
        CLOSEST_SCHEMA,
    )


def read_closest(folder: Path) -> list[dict]:
    """The rows of the closest.parquet in a folder; none where there is no such file, or another one."""
    try:
        return pq.read_table(folder / CLOSEST_FILE).cast(CLOSEST_SCHEMA).to_pylist()
    except (OSError, ValueError, pa.ArrowException):
        return []


STAGES = (
    Stage("closest: hashes", find_close),
    Stage("closest: choose", choose, by_image),
    Stage("closest: compare", compare),
)


def _closest(wholes: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `_OF_GROUP` hashes that differ least from each of `wholes`, of equally close ones the first.

    uint64 [m], uint64 [n] -> the number of a whole, the number of a hash, the bits that differ: [m * min(n, _OF_GROUP)] each
    """
    count = min(_OF_GROUP, len(hashes))
    found = [np.zeros(0, np.uint64)]
    step = max(1, _COMPARED_AT_ONCE // max(1, len(hashes)))
    for start in range(0, len(wholes) if count else 0, step):
        bits = np.bitwise_count(wholes[start : start + step, None] ^ hashes).astype(np.uint64)
        key = bits << np.uint64(32) | np.arange(len(hashes), dtype=np.uint64)
        found.append(np.partition(key, count - 1, axis=1)[:, :count].ravel())
    keys = np.concatenate(found)
    image = np.repeat(np.arange(len(wholes)), count)
    return image, (keys & np.uint64(0xFFFFFFFF)).astype(np.int64), (keys >> np.uint64(32)).astype(np.uint8)


def _first_of_each(rows: pa.Table) -> pa.Table:
    """The closest of the candidates of each evaluation image, by `image`."""
    keys = ("image", "distance", "bits", "shard", "index")
    order = np.lexsort([rows[name].to_numpy() for name in reversed(keys)])
    return rows.take(pa.array(order[starts_of_runs(rows["image"].to_numpy()[order])]))
