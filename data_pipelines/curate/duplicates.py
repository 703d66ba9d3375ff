"""Copies of a picture within the corpus: the same bytes, the same pixels, or nearly.

Every pair has a rank (`layout.ranks`, ties go to the earlier place), and it is a copy when a confirmed look-alike ranks
higher. No chains are followed: of A ~ B ~ C with A and C unlike, both stay if B ranks last.

Near copies are found with several hash tables (multi-index hashing, Norouzi et al. 2012, but approximate): `BANDS`
windows of a 63-bit hash are looked up exactly, rows that share a window are compared in full, and those within
`duplicate_bits` on their thumbnails. The whole picture of one pair is compared with 16 crops of the other, so a copy that
was cut is found. Windows widen with log2 of the corpus, so that a bucket stays as full as it was.

Stages, each a map over files (`exchange`):

    exact     rows by content  ->  the best of each content
    windows   what is left, by window  ->  candidates
    attach    candidates by the group of one pair, its thumbnail joined  ->  by the group of the other
    confirm   thumbnails compared  ->  verdicts by the group of the lesser copy

The trap: of exact copies only the best takes part in the search for near ones. A picture that is everywhere (a blank,
"image not available") would otherwise meet itself n^2 times.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_pipelines.curate import confirm, pictures
from data_pipelines.curate.exchange import Exchange
from data_pipelines.curate.layout import LEAST_HASHED_PX, Work, ranks, read_pictures, starts_of_runs, verdicts
from data_pipelines.curate.scan import hashes_of
from data_pipelines.curate.scores import read_scores
from data_pipelines.draws import mix_array

BANDS, HASH_BITS = 8, 63
_CONTENT_RULES = ("duplicate_bytes", "duplicate_pixels")
_MEETINGS = 4096  # rows of one window that are compared with each other, the best first
_COMPARED_AT_ONCE = 1 << 22
_CONFIRMED_AT_ONCE = 2048
_CANDIDATE_KEYS = ("first_shard", "first_index", "second_shard", "second_index", "bits", "first_is_part", "crop")


def exact_exchange(work: Work) -> Exchange:
    """Rows by content, two a pair: its bytes and its pixels."""
    return work.by_key("exact", rows=2 * work.pairs)


def exact_verdicts(work: Work) -> Exchange:
    """Exact copies, by group."""
    return work.to_groups("exact-verdicts", sources=exact_exchange(work).buckets)


def windows_exchange(work: Work) -> Exchange:
    """Rows by window of a hash: `BANDS` for every crop of a pair."""
    return work.by_key("windows", rows=work.pairs * BANDS * len(pictures.crop_boxes(pictures.CROPS)))


def candidates_exchange(work: Work) -> Exchange:
    """Pairs of look-alikes, by the group of the first."""
    return work.to_groups("candidates", sources=windows_exchange(work).buckets)


def attached_exchange(work: Work) -> Exchange:
    """The same with the first one's thumbnail, by the group of the second."""
    return work.to_groups("attached", sources=work.groups)


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
    bits = window_bits(work.pairs * len(pictures.crop_boxes(pictures.CROPS)))
    columns = []
    for shard in work.layout.members(group):
        table = read_pictures(
            work.layout.tables[shard], ["hashes", "caption", "reasons"], least_side_px=LEAST_HASHED_PX
        )
        kept = ~np.isin(table["index"].to_numpy(), copies["index"][copies["shard"] == shard])
        table = table.filter(pa.array(kept))
        hashes = hashes_of(table["hashes"], len(pictures.crop_boxes(pictures.CROPS)))
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
    """Stage "windows", reduce: pairs of pictures, one whole, whose hashes are close."""
    work, bucket = task
    rows = _columns(windows_exchange(work).gather(bucket))
    order = np.lexsort((rows["crop"], rows["index"], rows["shard"], ~rows["rank"], rows["window"]))
    rows = {name: values[order] for name, values in rows.items()}
    starts = np.flatnonzero(starts_of_runs(rows["window"])).tolist()
    identity = rows["shard"].astype(np.int64) << 32 | rows["index"]
    parts, wholes, distances = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.uint8)]
    for start, end in itertools.pairwise([*starts, len(order)]):
        if identity[start] == identity[end - 1]:  # sorted by pair: only one of them here
            continue
        for part, whole, distance in _close(
            rows["hash"], rows["crop"], identity, start, end, work.config.duplicate_bits
        ):
            parts.append(part)
            wholes.append(whole)
            distances.append(distance)
    part, whole, distance = np.concatenate(parts), np.concatenate(wholes), np.concatenate(distances)
    table = _candidates(rows, identity, part, whole, distance)
    candidates_exchange(work).scatter(bucket, table, work.group_of(table["first_shard"].to_numpy()))


def attach_thumbnails(task: tuple[Work, int]) -> None:
    """Stage "attach": of every candidate the closest match only, with the first picture's thumbnail."""
    work, group = task
    table = _closest(candidates_exchange(work).gather(group))
    shards, indexes = table["first_shard"].to_numpy(), table["first_index"].to_numpy()
    thumbnails = [None] * len(table)
    for shard in np.unique(shards).tolist():
        rows = np.flatnonzero(shards == shard)
        for row, data in zip(rows.tolist(), _thumbnails(work, shard, indexes[rows]), strict=True):
            thumbnails[row] = data
    table = table.append_column("thumbnail", pa.array(thumbnails, pa.binary()))
    attached_exchange(work).scatter(group, table, work.group_of(table["second_shard"].to_numpy()))


def confirm_candidates(task: tuple[Work, int]) -> None:
    """Stage "confirm": pixels decide, and the lesser copy gets the verdict."""
    work, group = task
    table = attached_exchange(work).gather(group)
    shards, indexes = table["second_shard"].to_numpy(), table["second_index"].to_numpy()
    same = np.zeros(len(table), bool)
    for shard in np.unique(shards).tolist():
        rows = np.flatnonzero(shards == shard)
        seconds = _thumbnails(work, shard, indexes[rows])
        for start in range(0, len(rows), _CONFIRMED_AT_ONCE):
            some = slice(start, start + _CONFIRMED_AT_ONCE)
            same[rows[some]] = _confirm(work, table.take(pa.array(rows[some])), seconds[some])
    found = _columns(table.drop_columns(["thumbnail"]).filter(pa.array(same)))
    first_wins = found["first_rank"] >= found["second_rank"]  # "first" is the earlier place
    columns = {}
    for name in ("shard", "index", "rank"):
        first, second = found[f"first_{name}"], found[f"second_{name}"]
        columns[name] = np.where(first_wins, second, first)
        columns[f"of_{name}"] = np.where(first_wins, first, second)
    near_verdicts(work).scatter(group, verdicts(columns, "near_duplicate"), work.group_of(columns["shard"]))


def window_bits(hashes: int) -> int:
    """Width of a window, so that about 256 of so many hashes share one by chance; 8 at least."""
    return min(max(8, int(np.ceil(np.log2(max(hashes, 1)))) - 8), 32)


def windows(hashes: np.ndarray, band: int, bits: int) -> np.ndarray:
    """`bits` bits of every hash, from place band * 63 / 8 on, cyclic. uint64 [...] -> uint64 [...]."""
    shift = np.uint64(band * HASH_BITS // BANDS)
    turned = (hashes >> shift) | (hashes << (np.uint64(HASH_BITS) - shift))
    return turned & np.uint64((1 << bits) - 1)


def _close(
    hashes: np.ndarray, crops: np.ndarray, identity: np.ndarray, start: int, end: int, bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows (of a whole picture, of any) within `bits` of each other, of one window's rows."""
    rows = np.arange(start, min(end, start + _MEETINGS))
    wholes = rows[crops[rows] == 0]
    step = max(1, _COMPARED_AT_ONCE // len(rows))
    for some in range(0, len(wholes), step):
        queries = wholes[some : some + step]
        distance = np.bitwise_count(hashes[queries, None] ^ hashes[None, rows])
        part, other = np.nonzero((distance <= bits) & (identity[queries, None] != identity[None, rows]))
        yield queries[part], rows[other], distance[part, other]


def _candidates(rows: dict, identity: np.ndarray, part: np.ndarray, whole: np.ndarray, bits: np.ndarray) -> pa.Table:
    """Candidates with the earlier place first, so that both ways round are one."""
    is_part = identity[part] < identity[whole]
    columns = {"bits": bits, "first_is_part": is_part, "crop": rows["crop"][whole]}
    for name in ("shard", "index", "rank"):
        one, other = rows[name][part], rows[name][whole]
        columns[f"first_{name}"] = np.where(is_part, one, other)
        columns[f"second_{name}"] = np.where(is_part, other, one)
    return _closest(pa.table(columns))


def _closest(table: pa.Table) -> pa.Table:
    """One row for two pictures: the smallest distance."""
    keys = [table[name].to_numpy() for name in _CANDIDATE_KEYS]
    order = np.lexsort(keys[::-1])
    keys = [key[order] for key in keys]
    return table.take(pa.array(order[starts_of_runs(*keys[:4])]))


def _confirm(work: Work, table: pa.Table, seconds: list[bytes]) -> np.ndarray:
    first = np.stack([pictures.read_thumbnail(data) for data in table["thumbnail"].to_pylist()])
    second = np.stack([pictures.read_thumbnail(data) for data in seconds])
    first_is_part = table["first_is_part"].to_numpy()[:, None, None, None]
    return confirm.same_picture(
        np.where(first_is_part, first, second),
        np.where(first_is_part, second, first),
        pictures.crop_boxes(pictures.CROPS)[table["crop"].to_numpy()],
        max_error=work.config.duplicate_error,
        max_spot=work.config.duplicate_spot,
    )


def _thumbnails(work: Work, shard: int, indexes: np.ndarray) -> list[bytes]:
    column = pq.read_table(work.layout.tables[shard], columns=["thumbnail"])["thumbnail"]
    return column.take(pa.array(indexes)).to_pylist()


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
