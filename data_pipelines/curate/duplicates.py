"""Copies of a picture within the corpus: the same bytes, the same pixels, or nearly.

Every pair has a rank (`layout.ranks`, ties go to the earlier place), and it is a copy when a confirmed look-alike ranks
higher. No chains are followed: of A ~ B ~ C with A and C unlike, both stay if B ranks last.

Near copies are found with several hash tables (multi-index hashing, Norouzi et al. 2012, but approximate): `BANDS`
windows of a 63-bit hash are looked up exactly, the whole hashes of rows that share a window are compared, and those
within `duplicate_bits` on their thumbnails. The whole picture of one pair is compared with crops of the other, so a copy that
was cut is found. Windows widen with log2 of the corpus, so that a bucket stays as full as it was.

A picture is compared with the better ones of a window only, and of those with a few: the `_NEAREST` and the `_BEST`. So
whatever looks like a hundred thousand others costs as much as any other picture, and the best of them stays: it alone
meets no better one. Pixels are compared with the best first, and no more once one is confirmed.

Stages, each a map over files (`exchange`):

    exact     rows by content  ->  the best of each content
    windows   what is left, by window  ->  candidates by the group of the lesser copy
    request   candidates  ->  which thumbnails are needed, each once, by the group where they lie
    attach    thumbnails  ->  by the group that asked
    confirm   thumbnails compared  ->  verdicts by the group of the lesser copy

The trap: of exact copies only the best takes part in the search for near ones, and of rows with one hash the best
`_OF_ONE_HASH` are looked at: a picture that is everywhere would otherwise be all that a window holds.
"""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_pipelines.counter_rng import mix_array
from data_pipelines.curate import pictures, pixel_match
from data_pipelines.curate.layout import LEAST_HASHED_PX, Work, ranks, read_pictures, starts_of_runs, verdicts
from data_pipelines.curate.scan import hashes_of
from data_pipelines.curate.scores import read_scores
from data_pipelines.curate.shuffle import Exchange

BANDS, HASH_BITS = 8, 63
_CONTENT_RULES = ("duplicate_bytes", "duplicate_pixels")
_MEETINGS = 4096  # rows of one window that any other is compared with, the best
_HEAD = 256  # of them first; where `_BEST` of those are very close that is enough
_VERY_CLOSE, _FAR = 3, 255  # bits
_OF_ONE_HASH = 32
_BEST, _NEAREST = 8, 24  # candidates of a picture: the best of those that are close, and the closest
_COMPARED_AT_ONCE = 1 << 20
_FOUND_AT_ONCE = 1 << 20
_CONFIRMED_AT_ONCE = 2048


def exact_exchange(work: Work) -> Exchange:
    """Rows by content, two a pair: its bytes and its pixels."""
    return work.by_key("exact", rows=2 * work.pairs)


def exact_verdicts(work: Work) -> Exchange:
    """Exact copies, by group."""
    return work.to_groups("exact-verdicts", sources=exact_exchange(work).buckets)


def windows_exchange(work: Work) -> Exchange:
    """Rows by window of a hash: `BANDS` for every crop of a pair."""
    return work.by_key("windows", rows=work.pairs * BANDS * len(pictures.CROPS))


def candidates_exchange(work: Work) -> Exchange:
    """Pairs of look-alikes, by the group of the lesser."""
    return work.to_groups("candidates", sources=windows_exchange(work).buckets)


def requests_exchange(work: Work) -> Exchange:
    """The better ones of them, by their own group."""
    return work.to_groups("requests", sources=work.groups)


def thumbnails_exchange(work: Work) -> Exchange:
    """Their thumbnails, by the group that asked."""
    return work.to_groups("thumbnails", sources=work.groups)


def near_verdicts(work: Work) -> Exchange:
    """Near copies, by group."""
    return work.to_groups("near-verdicts", sources=work.groups)


def scatter_contents(task: tuple[Work, int]) -> None:
    """Stage "exact", map: every picture's bytes and pixels as keys."""
    work, group = task
    columns: list[dict[str, np.ndarray]] = []
    for shard in work.layout.members(group):
        table = read_pictures(work.layout.tables[shard], ["sha256", "caption", "reasons"])
        with_caption = _caption_hashes(table) if work.config.duplicates == "pair" else np.zeros(len(table), np.uint64)
        contents = (
            b"".join(bytes.fromhex(digest)[:16] for digest in table["sha256"].to_pylist()),
            b"".join(table["pixel_hash"].to_pylist()),
        )
        for kind, content in enumerate(contents):
            halves = np.frombuffer(content, np.uint64).reshape(-1, 2)
            row = {"kind": np.full(len(table), kind, np.uint8), "a": halves[:, 0] ^ with_caption, "b": halves[:, 1]}
            columns.append(row | _identity(table, shard, ranks(table, read_scores(work, shard, table["index"]))))
    table = _stack(columns)
    exchange = exact_exchange(work)
    exchange.scatter(group, table, (table["a"].to_numpy() % np.uint64(exchange.buckets)).astype(np.int64))


def judge_contents(task: tuple[Work, int]) -> None:
    """Stage "exact", reduce: of each content the best stays."""
    work, bucket = task
    rows = _columns(exact_exchange(work).gather(bucket))
    order = np.lexsort((rows["index"], rows["shard"], ~rows["rank"], rows["b"], rows["a"], rows["kind"]))
    rows = {name: values[order] for name, values in rows.items()}
    first = starts_of_runs(rows["kind"], rows["a"], rows["b"])
    best = np.flatnonzero(first)[np.cumsum(first) - 1]
    lost = np.flatnonzero(~first)
    found = {"shard": rows["shard"][lost], "index": rows["index"][lost], "of_rank": rows["rank"][best[lost]]}
    found |= {"of_shard": rows["shard"][best[lost]], "of_index": rows["index"][best[lost]]}
    table = verdicts(found, [_CONTENT_RULES[kind] for kind in rows["kind"][lost].tolist()])
    exact_verdicts(work).scatter(bucket, table, work.group_of(found["shard"]))


def scatter_windows(task: tuple[Work, int]) -> None:
    """Stage "windows", map: every hash of every picture that is the best of its content."""
    work, group = task
    copies = _columns(exact_verdicts(work).gather(group).select(["shard", "index"]))
    bits = window_bits(work.pairs * len(pictures.CROPS))
    columns = []
    for shard in work.layout.members(group):
        table = read_pictures(
            work.layout.tables[shard], ["hashes", "caption", "reasons"], least_side_px=LEAST_HASHED_PX
        )
        kept = ~np.isin(table["index"].to_numpy(), copies["index"][copies["shard"] == shard])
        table = table.filter(pa.array(kept))
        hashes = hashes_of(table["hashes"], len(pictures.CROPS))
        salt = _caption_hashes(table)[:, None] if work.config.duplicates == "pair" else np.uint64(0)
        pair = _identity(table, shard, ranks(table, read_scores(work, shard, table["index"])))
        pair = {name: np.repeat(values, hashes.shape[1]) for name, values in pair.items()}
        crop = np.tile(np.arange(hashes.shape[1], dtype=np.uint8), len(hashes))
        for band in range(BANDS):
            window = mix_array(windows(hashes, band, bits) + (np.uint64(band) << np.uint64(40)) ^ salt)
            columns.append({"window": window.ravel(), "hash": hashes.ravel(), "crop": crop} | pair)
    table = _stack(columns)
    exchange = windows_exchange(work)
    exchange.scatter(group, table, (table["window"].to_numpy() % np.uint64(exchange.buckets)).astype(np.int64))


def meet_in_windows(task: tuple[Work, int]) -> None:
    """Stage "windows", reduce: of every picture the better ones whose hashes are close, one of the two whole."""
    work, bucket = task
    rows = _columns(windows_exchange(work).gather(bucket))
    order = np.lexsort((rows["crop"], rows["index"], rows["shard"], ~rows["rank"], rows["window"]))
    rows = {name: values[order] for name, values in rows.items()}
    starts = np.flatnonzero(starts_of_runs(rows["window"])).tolist()
    rows["identity"] = rows["shard"].astype(np.int64) << 32 | rows["index"]
    found, tables = [np.zeros((3, 0), np.int64)], []
    for start, end in itertools.pairwise([*starts, len(order)]):
        if rows["identity"][start] == rows["identity"][end - 1]:  # sorted by pair: only one of them here
            continue
        here = np.arange(start, end)
        is_whole = rows["crop"][here] == 0
        found += _better(rows, here[is_whole], here, work.config.duplicate_bits)
        found += _better(rows, here[~is_whole], here[is_whole], work.config.duplicate_bits)
        if sum(part.shape[1] for part in found) > _FOUND_AT_ONCE:
            tables.append(_candidates(rows, *np.concatenate(found, axis=1)))
            found = found[:1]
    table = _chosen(pa.concat_tables([*tables, _candidates(rows, *np.concatenate(found, axis=1))]))
    candidates_exchange(work).scatter(bucket, table, work.group_of(table["shard"].to_numpy()))


def request_thumbnails(task: tuple[Work, int]) -> None:
    """Stage "request": the better pictures that those of a group are to be compared with, each once."""
    work, group = task
    rows = _columns(_chosen(candidates_exchange(work).gather(group)))
    order = np.lexsort((rows["of_index"], rows["of_shard"]))
    order = order[starts_of_runs(rows["of_shard"][order], rows["of_index"][order])]
    wanted = {"shard": rows["of_shard"][order], "index": rows["of_index"][order]}
    wanted["by"] = np.full(len(order), group, np.int64)
    requests_exchange(work).scatter(group, pa.table(wanted), work.group_of(wanted["shard"]))


def attach_thumbnails(task: tuple[Work, int]) -> None:
    """Stage "attach": the thumbnails that other groups asked for."""
    work, group = task
    table = requests_exchange(work).gather(group)
    shown = _shown(work, table["shard"].to_numpy(), table["index"].to_numpy())
    thumbnails_exchange(work).scatter(group, shown, table["by"].to_numpy())


def confirm_candidates(task: tuple[Work, int]) -> None:
    """Stage "confirm": pixels decide. A picture is compared with its candidates, the best first, until one is the same."""
    work, group = task
    rows = _columns(_chosen(candidates_exchange(work).gather(group)))
    first = starts_of_runs(rows["shard"], rows["index"])
    picture = np.cumsum(first) - 1
    ours = _shown(work, rows["shard"][first], rows["index"][first])
    theirs = thumbnails_exchange(work).gather(group)
    place = _places(theirs, rows["of_shard"], rows["of_index"])
    turn = _number_in_run(first)
    of = np.full(len(ours), -1)
    for this in range(_BEST + _NEAREST):
        now = np.flatnonzero((turn == this) & (of[picture] < 0))
        for start in range(0, len(now), _CONFIRMED_AT_ONCE):
            some = now[start : start + _CONFIRMED_AT_ONCE]
            same = _confirm(work, rows, some, ours.take(pa.array(picture[some])), theirs.take(pa.array(place[some])))
            of[picture[some[same]]] = some[same]
    found = {name: rows[name][of[of >= 0]] for name in ("shard", "index", "of_shard", "of_index", "of_rank")}
    near_verdicts(work).scatter(group, verdicts(found, "near_duplicate"), work.group_of(found["shard"]))


def window_bits(hashes: int) -> int:
    """Width of a window, so that about 256 of so many hashes share one by chance; 8 at least."""
    return min(max(8, int(np.ceil(np.log2(max(hashes, 1)))) - 8), 32)


def windows(hashes: np.ndarray, band: int, bits: int) -> np.ndarray:
    """`bits` bits of every hash, from place band * 63 / 8 on, cyclic. uint64 [...] -> uint64 [...]."""
    shift = np.uint64(band * HASH_BITS // BANDS)
    turned = (hashes >> shift) | (hashes << (np.uint64(HASH_BITS) - shift))
    return turned & np.uint64((1 << bits) - 1)


def _better(rows: dict[str, np.ndarray], seekers: np.ndarray, among: np.ndarray, bits: int) -> list[np.ndarray]:
    """Of places in one window, the best first, the better ones within `bits`: int64 [3, n], seeker, better, distance.

    A seeker that is very close to `_BEST` of the first `_HEAD` is not compared with the rest.
    """
    hashes, identity = rows["hash"], rows["identity"]
    among = _few_of_each(hashes, among)
    found = []
    for head in (_HEAD, _MEETINGS):
        better, left = among[:head], [seekers[:0]]
        step = max(1, _COMPARED_AT_ONCE // max(1, len(better)))
        for start in range(0, len(seekers), step):
            some = seekers[start : start + step]
            distance = np.bitwise_count(hashes[some, None] ^ hashes[better])
            distance[(better >= some[:, None]) | (identity[better] == identity[some, None])] = _FAR
            is_done = np.count_nonzero(distance <= _VERY_CLOSE, axis=1) >= _BEST
            is_done |= head >= len(among)
            left.append(some[~is_done])
            distance[(distance > bits) | ~is_done[:, None]] = _FAR
            row, column = _best_and_nearest(distance)
            found.append(np.stack([some[row], better[column], distance[row, column].astype(np.int64)]))
        seekers = np.concatenate(left)
    return found


def _best_and_nearest(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of a matrix, its columns the best first, `_BEST` and `_NEAREST` of those that are not far. -> places."""
    close = distance < _FAR
    crowded = np.flatnonzero(np.count_nonzero(close, axis=1) > _BEST + _NEAREST)
    if len(crowded):
        columns = distance.shape[1]
        key = distance[crowded].astype(np.int32) * columns + np.arange(columns, dtype=np.int32)
        key[close[crowded] & (np.cumsum(close[crowded], axis=1) <= _BEST)] = -1
        least = np.partition(key, _BEST + _NEAREST - 1, axis=1)[:, [_BEST + _NEAREST - 1]]
        close[crowded] = key <= least
    return np.nonzero(close)


def _few_of_each(hashes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The first `_MEETINGS`, without those after the first `_OF_ONE_HASH` of the same hash."""
    order = np.argsort(hashes[places], kind="stable")
    order = order[_number_in_run(starts_of_runs(hashes[places[order]])) < _OF_ONE_HASH]
    return places[np.sort(order)[:_MEETINGS]]


def _candidates(rows: dict[str, np.ndarray], lesser: np.ndarray, better: np.ndarray, bits: np.ndarray) -> pa.Table:
    """A table of pairs from their places: the lesser picture, the better (`of_`), how far apart, which of them is cut how."""
    is_part = rows["crop"][lesser] == 0  # all of the lesser looks like a crop of the better one
    columns = {"bits": bits.astype(np.uint8), "is_part": is_part}
    columns["crop"] = rows["crop"][np.where(is_part, better, lesser)]
    for name in ("shard", "index"):
        columns |= {name: rows[name][lesser], f"of_{name}": rows[name][better]}
    return _chosen(pa.table(columns | {"of_rank": rows["rank"][better]}))


def _chosen(table: pa.Table) -> pa.Table:
    """Of every picture its `_BEST` and its `_NEAREST` candidates, the best first; of every pair the closest match."""
    rows = _columns(table)
    pair = [rows[name] for name in ("shard", "index", "of_shard", "of_index")]
    order = np.lexsort((rows["crop"], ~rows["is_part"], rows["bits"], *pair[:1:-1], ~rows["of_rank"], *pair[1::-1]))
    order = order[starts_of_runs(*(key[order] for key in pair))]
    wanted = np.zeros(len(rows["bits"]), bool)
    for few, keys in ((_BEST, ()), (_NEAREST, (rows["bits"][order],))):
        some = order[np.lexsort((*keys, rows["index"][order], rows["shard"][order]))]  # stable: then the best first
        wanted[some[_number_in_run(starts_of_runs(rows["shard"][some], rows["index"][some])) < few]] = True
    return table.take(pa.array(order[wanted[order]]))


def _confirm(
    work: Work, rows: dict[str, np.ndarray], some: np.ndarray, lesser: pa.Table, better: pa.Table
) -> np.ndarray:
    lesser_px, better_px = decoded(lesser["thumbnail"]), decoded(better["thumbnail"])
    is_part = rows["is_part"][some, None, None, None]
    return pixel_match.same_picture(
        np.where(is_part, lesser_px, better_px),
        np.where(is_part, better_px, lesser_px),
        np.array(pictures.CROPS, np.float32)[rows["crop"][some]],
        pixel_match.Tolerance(work.config.duplicate_error, work.config.duplicate_spot),
    )


def _shown(work: Work, shards: np.ndarray, indexes: np.ndarray) -> pa.Table:
    """Thumbnails of pictures, in their order: shard, index, thumbnail."""
    thumbnails: list[bytes | None] = [None] * len(shards)
    for shard in np.unique(shards).tolist():
        here = np.flatnonzero(shards == shard)
        column = pq.read_table(work.layout.tables[shard], columns=["thumbnail"])["thumbnail"]
        for row, data in zip(here.tolist(), column.take(pa.array(indexes[here])).to_pylist(), strict=True):
            thumbnails[row] = data
    return pa.table({"shard": shards, "index": indexes, "thumbnail": pa.array(thumbnails, pa.binary())})


def _places(shown: pa.Table, shards: np.ndarray, indexes: np.ndarray) -> np.ndarray:
    """Where in a table each picture is."""
    there = shown["shard"].to_numpy().astype(np.int64) << 32 | shown["index"].to_numpy()
    order = np.argsort(there)
    return order[np.searchsorted(there[order], shards.astype(np.int64) << 32 | indexes)]


def decoded(thumbnails: pa.ChunkedArray) -> np.ndarray:
    """uint8 [n, 64, 64, 3]; each file is decoded once."""
    files = thumbnails.combine_chunks().dictionary_encode()
    pixels = [pictures.read_thumbnail(data) for data in files.dictionary.to_pylist()]
    return np.stack(pixels)[files.indices.to_numpy()]


def _number_in_run(first: np.ndarray) -> np.ndarray:
    """How many rows of its run come before each, from where runs start. bool [n] -> int64 [n]."""
    return np.arange(len(first)) - np.flatnonzero(first)[np.cumsum(first) - 1]


def _identity(table: pa.Table, shard: int, rank: np.ndarray) -> dict[str, np.ndarray]:
    return {"shard": np.full(len(table), shard, np.int32), "index": table["index"].to_numpy(), "rank": rank}


def _caption_hashes(table: pa.Table) -> np.ndarray:
    captions = (caption.encode("utf-8", "surrogatepass") for caption in table["caption"].to_pylist())
    return np.fromiter((xxhash.xxh3_64_intdigest(caption.lower()) for caption in captions), np.uint64, len(table))


def _stack(columns: list[dict[str, np.ndarray]]) -> pa.Table:
    """One table of all; the parts are let go of column by column."""
    return pa.table({name: np.concatenate([rows.pop(name) for rows in columns]) for name in list(columns[0])})


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: table[name].to_numpy() for name in table.column_names}
