"""Duplicate images within the corpus: the same bytes, the same pixels, or nearly the same (near-duplicates).

Every pair has a rank (`layout.ranks`; ties go to the earlier pair), and a pair is a duplicate if a confirmed match ranks
higher. Chains are not followed: of A ~ B ~ C with A and C unlike, both stay if B ranks last.

Near-duplicates are found by locality-sensitive hashing, as in multi-index hashing (Norouzi et al. 2012) but approximate:
pairs that agree in one of `BANDS` bands of a 63-bit perceptual hash meet in a bucket, their whole hashes are compared, and
those within `duplicate_bits` become candidates, which are compared by the pixels of their thumbnails. The whole image of one
pair is compared with crops of the other, so a cropped copy is found. A band has log2(corpus) bits and a constant, so a
bucket stays as full as it was.

An image is compared only with those of its bucket that rank higher, and by pixels with few of them, the `_BEST` and the
`_NEAREST`. So an image that looks like a hundred thousand others costs no more than any other, and the best of them stays:
it alone meets none that ranks higher. Pixels are compared with the best first, until one is confirmed.

    contents     pairs by content    ->  exact duplicates: all but the best of each content
    bands        the rest, by band   ->  candidates, in the group of the lower-ranked pair
    request      candidates          ->  the thumbnails that a group needs, each once, in the group where they lie
    attach       those thumbnails    ->  in the group that asked for them
    confirm      pixels compared     ->  near-duplicates, in the group of the lower-ranked pair

The trap: an image that is everywhere would fill a bucket. So only the best of exact duplicates is looked up, and of pairs
with equal hashes only the best `_OF_ONE_HASH` are compared with.
"""

import itertools

import numpy as np
import pyarrow as pa
import xxhash

from data_pipelines.counter_rng import mix_array
from data_pipelines.curate import image_hashes
from data_pipelines.curate.layout import (
    MIN_HASHED_PX,
    Stage,
    Work,
    number_in_run,
    ranks,
    read_images,
    read_rows,
    starts_of_runs,
    verdict_table,
)
from data_pipelines.curate.pixel_match import Tolerance, same_thumbnails
from data_pipelines.curate.scan import hashes_of
from data_pipelines.curate.scores import read_scores
from data_pipelines.curate.shuffle import Shuffle

BANDS, HASH_BITS = 8, 63
_CONTENT_RULES = ("duplicate_bytes", "duplicate_pixels")
_MAX_COMPARED = 4096  # rows of one bucket that any other is compared with, the best
_HEAD = 256  # those compared with first; where `_BEST` of them are very close that is enough
_VERY_CLOSE, _FAR = 3, 255  # bits
_OF_ONE_HASH = 32
_BEST, _NEAREST = 8, 24  # candidates of an image: the best of those that are close, and the closest
_COMPARED_AT_ONCE = 1 << 20
_FOUND_AT_ONCE = 1 << 20


def by_content(work: Work) -> Shuffle:
    """Pairs by content, two rows each: the bytes and the pixels."""
    return work.to_buckets("contents", rows=2 * work.pairs)


def exact_verdicts(work: Work) -> Shuffle:
    """Exact duplicates, by group."""
    return work.to_groups("exact-verdicts", map_tasks=by_content(work).buckets)


def by_band(work: Work) -> Shuffle:
    """Pairs by band of a hash: `BANDS` rows for every crop of a pair."""
    return work.to_buckets("bands", rows=work.pairs * BANDS * len(image_hashes.CROPS))


def candidates(work: Work) -> Shuffle:
    """Candidates, by the group of the lower-ranked pair. Columns: see `_candidate_table`."""
    return work.to_groups("candidates", map_tasks=by_band(work).buckets)


def requests(work: Work) -> Shuffle:
    """The higher-ranked pairs of candidates, by their own group, with the group that asks."""
    return work.to_groups("requests")


def thumbnails(work: Work) -> Shuffle:
    """Their thumbnails, by the group that asked."""
    return work.to_groups("thumbnails")


def near_verdicts(work: Work) -> Shuffle:
    """Near-duplicates, by group."""
    return work.to_groups("near-verdicts")


def write_contents(work: Work, group: int) -> None:
    """Writes the bytes and the pixels of every image of a group as keys."""
    columns: list[dict[str, np.ndarray]] = []
    for shard in work.layout.members(group):
        table = read_images(work.layout.tables[shard], ["sha256", "caption", "reasons"])
        with_caption = _caption_hashes(table) if work.config.duplicates == "pair" else np.zeros(len(table), np.uint64)
        contents = (
            b"".join(bytes.fromhex(digest)[:16] for digest in table["sha256"].to_pylist()),
            b"".join(table["pixel_hash"].to_pylist()),
        )
        for kind, content in enumerate(contents):
            halves = np.frombuffer(content, np.uint64).reshape(-1, 2)
            row = {"kind": np.full(len(table), kind, np.uint8), "a": halves[:, 0] ^ with_caption, "b": halves[:, 1]}
            columns.append(row | _identity(work, shard, table))
    by_content(work).write_by_key(group, _stack(columns), "a")


def find_exact(work: Work, bucket: int) -> None:
    """Finds the exact duplicates in a bucket: all pairs of one content but the best."""
    rows = _columns(by_content(work).read(bucket))
    order = np.lexsort((rows["index"], rows["shard"], ~rows["rank"], rows["b"], rows["a"], rows["kind"]))
    rows = {name: values[order] for name, values in rows.items()}
    first = starts_of_runs(rows["kind"], rows["a"], rows["b"])
    best = np.flatnonzero(first)[np.cumsum(first) - 1]
    dropped = np.flatnonzero(~first)
    found = {name: rows[name][dropped] for name in ("shard", "index")}
    found |= {f"of_{name}": rows[name][best[dropped]] for name in ("shard", "index", "rank")}
    table = verdict_table(found, [_CONTENT_RULES[kind] for kind in rows["kind"][dropped].tolist()])
    exact_verdicts(work).write(bucket, table, work.group_of(found["shard"]))


def write_bands(work: Work, group: int) -> None:
    """Writes every band of every hash of the images of a group, without exact duplicates."""
    exact = _columns(exact_verdicts(work).read(group).select(["shard", "index"]))
    bits = band_bits(work.pairs * len(image_hashes.CROPS))
    columns = []
    for shard in work.layout.members(group):
        path = work.layout.tables[shard]
        table = read_images(path, ["hashes", "caption", "reasons"], min_side_px=MIN_HASHED_PX)
        table = table.filter(pa.array(~np.isin(table["index"].to_numpy(), exact["index"][exact["shard"] == shard])))
        hashes = hashes_of(table["hashes"], len(image_hashes.CROPS))
        salt = _caption_hashes(table)[:, None] if work.config.duplicates == "pair" else np.uint64(0)
        pair = {name: np.repeat(values, hashes.shape[1]) for name, values in _identity(work, shard, table).items()}
        crop = np.tile(np.arange(hashes.shape[1], dtype=np.uint8), len(hashes))
        for band in range(BANDS):
            key = mix_array(band_of(hashes, band, bits) + (np.uint64(band) << np.uint64(40)) ^ salt)
            columns.append({"band": key.ravel(), "hash": hashes.ravel(), "crop": crop} | pair)
    by_band(work).write_by_key(group, _stack(columns), "band")


def find_candidates(work: Work, bucket: int) -> None:
    """Finds, for every image in a bucket, the higher-ranked ones whose hashes are close; one of the two is uncropped."""
    rows = _columns(by_band(work).read(bucket))
    order = np.lexsort((rows["crop"], rows["index"], rows["shard"], ~rows["rank"], rows["band"]))
    rows = {name: values[order] for name, values in rows.items()}
    starts = np.flatnonzero(starts_of_runs(rows["band"])).tolist()
    rows["identity"] = rows["shard"].astype(np.int64) << 32 | rows["index"]
    found, tables = [np.zeros((3, 0), np.int64)], []
    for start, end in itertools.pairwise([*starts, len(order)]):
        if rows["identity"][start] == rows["identity"][end - 1]:  # sorted by pair: there is only one here
            continue
        here = np.arange(start, end)
        is_whole = rows["crop"][here] == 0
        found += _close_and_better(rows, here[is_whole], here, work.config.duplicate_bits)
        found += _close_and_better(rows, here[~is_whole], here[is_whole], work.config.duplicate_bits)
        if sum(part.shape[1] for part in found) > _FOUND_AT_ONCE:
            tables.append(_candidate_table(rows, *np.concatenate(found, axis=1)))
            found = found[:1]
    table = _choose(pa.concat_tables([*tables, _candidate_table(rows, *np.concatenate(found, axis=1))]))
    candidates(work).write(bucket, table, work.group_of(table["shard"].to_numpy()))


def request_thumbnails(work: Work, group: int) -> None:
    """Requests the thumbnails that the images of a group are to be compared with, each once."""
    rows = _columns(_choose(candidates(work).read(group)))
    order = np.lexsort((rows["of_index"], rows["of_shard"]))
    order = order[starts_of_runs(rows["of_shard"][order], rows["of_index"][order])]
    wanted = {name: rows[f"of_{name}"][order] for name in ("shard", "index")}
    table = pa.table(wanted | {"by": np.full(len(order), group, np.int64)})
    requests(work).write(group, table, work.group_of(wanted["shard"]))


def attach_thumbnails(work: Work, group: int) -> None:
    """Reads the thumbnails that other groups requested."""
    table = requests(work).read(group)
    found = read_rows(work, table["shard"].to_numpy(), table["index"].to_numpy(), ["thumbnail"])
    thumbnails(work).write(group, found, table["by"].to_numpy())


def confirm_candidates(work: Work, group: int) -> None:
    """Compares every image of a group with its candidates by pixels, the best first, until one is the same."""
    rows = _columns(_choose(candidates(work).read(group)))
    first = starts_of_runs(rows["shard"], rows["index"])
    image = np.cumsum(first) - 1
    ours = read_rows(work, rows["shard"][first], rows["index"][first], ["thumbnail"])["thumbnail"]
    table = thumbnails(work).read(group)
    row_of, theirs = _find_rows(table, rows["of_shard"], rows["of_index"]), table["thumbnail"]
    cut, turn = np.array(image_hashes.CROPS, np.float32)[rows["crop"]], number_in_run(first)
    tolerance = Tolerance(work.config.duplicate_error, work.config.duplicate_spot)
    of = np.full(len(ours), -1)
    for this in range(_BEST + _NEAREST):
        now = np.flatnonzero((turn == this) & (of[image] < 0))
        same = same_thumbnails(ours, theirs, (image[now], row_of[now]), cut[now], rows["is_part"][now], tolerance)
        of[image[now[same]]] = now[same]
    found = {name: rows[name][of[of >= 0]] for name in ("shard", "index", "of_shard", "of_index", "of_rank")}
    near_verdicts(work).write(group, verdict_table(found, "near_duplicate"), work.group_of(found["shard"]))


STAGES = (
    Stage("duplicates: contents", write_contents),
    Stage("duplicates: exact", find_exact, by_content),
    Stage("duplicates: bands", write_bands),
    Stage("duplicates: candidates", find_candidates, by_band),
    Stage("duplicates: request", request_thumbnails),
    Stage("duplicates: attach", attach_thumbnails),
    Stage("duplicates: confirm", confirm_candidates),
)


def band_bits(hashes: int) -> int:
    """Width of a band such that about 256 of so many hashes share one by chance; between 8 and 32 bits."""
    return min(max(8, int(np.ceil(np.log2(max(hashes, 1)))) - 8), 32)


def band_of(hashes: np.ndarray, band: int, bits: int) -> np.ndarray:
    """`bits` bits of every hash, from bit band * 63 / 8 on, cyclic. uint64 [...] -> uint64 [...]"""
    shift = np.uint64(band * HASH_BITS // BANDS)
    rotated = (hashes >> shift) | (hashes << (np.uint64(HASH_BITS) - shift))
    return rotated & np.uint64((1 << bits) - 1)


def _close_and_better(
    rows: dict[str, np.ndarray], queries: np.ndarray, among: np.ndarray, bits: int
) -> list[np.ndarray]:
    """The higher-ranked rows within `bits` of each query. -> arrays int64 [3, n]: query, better row, distance

    A query that is very close to `_BEST` of the first `_HEAD` rows is not compared with the rest.

    Args:
      queries, among: row numbers in one bucket, the best first.
    """
    hashes, identity = rows["hash"], rows["identity"]
    among = _few_of_each(hashes, among)
    found = []
    for head in (_HEAD, _MAX_COMPARED):
        better, left = among[:head], [queries[:0]]
        step = max(1, _COMPARED_AT_ONCE // max(1, len(better)))
        for start in range(0, len(queries), step):
            some = queries[start : start + step]
            distance = np.bitwise_count(hashes[some, None] ^ hashes[better])
            distance[(better >= some[:, None]) | (identity[better] == identity[some, None])] = _FAR
            is_done = np.count_nonzero(distance <= _VERY_CLOSE, axis=1) >= _BEST
            is_done |= head >= len(among)
            left.append(some[~is_done])
            distance[(distance > bits) | ~is_done[:, None]] = _FAR
            row, column = _best_and_nearest(distance)
            found.append(np.stack([some[row], better[column], distance[row, column].astype(np.int64)]))
        queries = np.concatenate(left)
    return found


def _best_and_nearest(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In each row of a matrix, the first `_BEST` and the `_NEAREST` columns that are not far. -> rows, columns"""
    close = distance < _FAR
    crowded = np.flatnonzero(np.count_nonzero(close, axis=1) > _BEST + _NEAREST)
    if len(crowded):
        columns = distance.shape[1]
        key = distance[crowded].astype(np.int32) * columns + np.arange(columns, dtype=np.int32)
        key[close[crowded] & (np.cumsum(close[crowded], axis=1) <= _BEST)] = -1
        last = np.partition(key, _BEST + _NEAREST - 1, axis=1)[:, [_BEST + _NEAREST - 1]]
        close[crowded] = key <= last
    return np.nonzero(close)


def _few_of_each(hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first `_MAX_COMPARED` rows, counting only the first `_OF_ONE_HASH` of equal hashes."""
    order = np.argsort(hashes[rows], kind="stable")
    order = order[number_in_run(starts_of_runs(hashes[rows[order]])) < _OF_ONE_HASH]
    return rows[np.sort(order)[:_MAX_COMPARED]]


def _candidate_table(rows: dict[str, np.ndarray], lower: np.ndarray, better: np.ndarray, bits: np.ndarray) -> pa.Table:
    """A table of candidates.

    Its columns: shard, index: the lower-ranked pair; of_shard, of_index, of_rank: the higher-ranked; bits: the distance of
    their hashes; is_part: whether the lower-ranked image looks like a crop of the other, or the reverse; crop: which crop.
    """
    is_part = rows["crop"][lower] == 0
    columns = {"bits": bits.astype(np.uint8), "is_part": is_part}
    columns["crop"] = rows["crop"][np.where(is_part, better, lower)]
    for name in ("shard", "index"):
        columns |= {name: rows[name][lower], f"of_{name}": rows[name][better]}
    return _choose(pa.table(columns | {"of_rank": rows["rank"][better]}))


def _choose(table: pa.Table) -> pa.Table:
    """Keeps the `_BEST` and the `_NEAREST` candidates of every image, the best first, each by its closest match."""
    rows = _columns(table)
    pair = [rows[name] for name in ("shard", "index", "of_shard", "of_index")]
    order = np.lexsort((rows["crop"], ~rows["is_part"], rows["bits"], *pair[:1:-1], ~rows["of_rank"], *pair[1::-1]))
    order = order[starts_of_runs(*(key[order] for key in pair))]
    wanted = np.zeros(len(rows["bits"]), bool)
    for few, keys in ((_BEST, ()), (_NEAREST, (rows["bits"][order],))):
        some = order[np.lexsort((*keys, rows["index"][order], rows["shard"][order]))]  # stable: then the best first
        wanted[some[number_in_run(starts_of_runs(rows["shard"][some], rows["index"][some])) < few]] = True
    return table.take(pa.array(order[wanted[order]]))


def _find_rows(table: pa.Table, shards: np.ndarray, indexes: np.ndarray) -> np.ndarray:
    """The row of each image in a table of `read_rows`."""
    keys = table["shard"].to_numpy().astype(np.int64) << 32 | table["index"].to_numpy()
    order = np.argsort(keys)
    return order[np.searchsorted(keys[order], shards.astype(np.int64) << 32 | indexes)]


def _identity(work: Work, shard: int, table: pa.Table) -> dict[str, np.ndarray]:
    rank = ranks(table, read_scores(work, shard, table["index"]))
    return {"shard": np.full(len(table), shard, np.int32), "index": table["index"].to_numpy(), "rank": rank}


def _caption_hashes(table: pa.Table) -> np.ndarray:
    captions = (caption.encode("utf-8", "surrogatepass") for caption in table["caption"].to_pylist())
    return np.fromiter((xxhash.xxh3_64_intdigest(caption.lower()) for caption in captions), np.uint64, len(table))


def _stack(columns: list[dict[str, np.ndarray]]) -> pa.Table:
    """One table of all; the parts are freed column by column."""
    return pa.table({name: np.concatenate([rows.pop(name) for rows in columns]) for name in list(columns[0])})


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: table[name].to_numpy() for name in table.column_names}
