"""Long reads: a shuffle by blocks costs few requests, the same pairs, a stated memory, and outlives a bad server."""

import collections
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.loader import DataConfig
from data_pipelines.order import permutation
from data_pipelines.order.mixture import SourceConfig
from data_pipelines.order.permutation import BlockShuffle
from data_pipelines.records import ShardLost
from data_pipelines.sources import blocks, remote
from data_pipelines.sources.blocks import Block, BlockCache, InOrder
from data_pipelines.sources.kept_pairs import KeptPairs
from data_pipelines.sources.opening import open_source
from data_pipelines.sources.webdataset import TarSource
from tests.data_pipelines import http_server
from tests.data_pipelines.http_server import serving
from tests.data_pipelines.shards import SPIECE, write_pairs, write_tar
from tests.data_pipelines.streams import assert_same, config_of, take

PAIRS = 240
BLOCKS = BlockShuffle(block_pairs=40, open_blocks=3)
BATCHES = 30  # one epoch of 8 pairs each


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(blocks, "GAP_BYTES", 1 << 12)
    served = tmp_path / "served"
    served.mkdir()
    for number in range(2):
        tar = write_pairs(served / f"{number:05d}.tar", PAIRS // 2, first=PAIRS // 2 * number)
        rows = [{"image": p.image, "key": p.key, "txt": p.fields["txt"]} for p in TarSource(tar)]
        pq.write_table(pa.Table.from_pylist(rows), served / f"rows-{number:05d}.parquet", row_group_size=10)
    with serving(served) as server:
        yield server


def streamed(server, pattern="*.tar", batches=BATCHES, **changes):
    """An epoch of a stream by blocks, and the byte ranges that were asked for."""
    config = config_of(f"{server.url}/{pattern}", shuffle_blocks=BLOCKS, cache_bytes=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_source(f"{server.url}/{pattern}")  # Makes the index.
        found, loader = take(replace(config, **changes), batches)
    return found, [asked for _, asked in server.requests if asked not in (None, "bytes=0-0")]  # listings, sizes


def local(server, pattern="*.tar", batches=BATCHES):
    return take(config_of(server.folder / pattern, shuffle_blocks=BLOCKS, cache_bytes=0), batches)[0]


@pytest.mark.parametrize("pattern, most", [("*.tar", 24), ("*.parquet", 80)])
def test_a_stream_by_blocks_is_the_local_one_in_few_requests(server, pattern, most):
    expected = local(server, pattern)
    open_source(f"{server.url}/{pattern}")
    server.requests.clear()
    found, asked = streamed(server, pattern)
    assert_same(found, expected)
    assert len(asked) <= most  # 6 blocks, or 24 groups with two at the cuts of each block, and as much again ahead
    server.requests.clear()
    found, asked = streamed(server, "*.tar", block_bytes=0)
    assert_same(found, local(server))
    assert len(asked) >= PAIRS


@pytest.mark.slow
def test_workers_read_blocks_of_their_own(server):
    expected = local(server, batches=25)
    open_source(f"{server.url}/*.tar")
    server.requests.clear()
    found, asked = streamed(server, batches=25, workers=2, prefetch=2)
    assert_same(found, expected)
    assert len(set(asked)) <= 32  # Two cuts of each of 6 blocks of two epochs, some of them in two shards …
    asked = [request for request in server.requests if request[1] not in (None, "bytes=0-0")]
    assert set(collections.Counter(asked).values()) == {1}  # … and no piece is asked for by both.


def test_what_finds_no_room_is_read_pair_by_pair(server):
    one_block = int(TarSource(str(server.folder / "00000.tar")).pair_bytes * 40)
    with pytest.warns(UserWarning, match="120 pairs of .* are mixed at a time, about .* raise data.block_bytes"):
        take(config_of(f"{server.url}/*.tar", shuffle_blocks=BLOCKS, block_bytes=one_block), 1)
    server.requests.clear()
    found, asked = streamed(server, block_bytes=one_block + 4096)
    assert_same(found, local(server))
    sizes = [int(last) - int(first) + 1 for first, last in (text[6:].split("-") for text in asked)]
    assert 10 < sum(size < 8000 for size in sizes) < PAIRS and max(sizes) > 8000
    assert sum(sizes) < 2.5 * PAIRS / 40 * one_block


@pytest.mark.parametrize("fault", [http_server.refuse(503), http_server.drop, http_server.stall(1)])
def test_faults_in_long_reads_cost_no_pair(server, monkeypatch, fault):
    monkeypatch.setattr(remote, "STALL_S", 0.4)
    expected = local(server)
    open_source(f"{server.url}/*.tar")
    server.faults = [fault] + [None, fault] * 3
    found, _ = streamed(server)
    assert_same(found, expected)
    assert not server.faults


def test_a_manifest_and_blocks(server):
    source = open_source(f"{server.url}/*.tar")
    columns = {
        "shard": [source.paths[source.locate(index)[0]] for index in range(PAIRS)],
        "index": [source.locate(index)[1] for index in range(PAIRS)],
        "key": [pair.key for pair in source],
        "keep": [index % 7 not in (2, 3) for index in range(PAIRS)],
    }
    pq.write_table(pa.table(columns), server.folder / "manifest.parquet")
    kept = KeptPairs(source, server.folder / "manifest.parquet")
    cache = BlockCache(1 << 20)
    for first, end in ((0, 1), (3, 90), (100, len(kept))):
        block = kept.block(first, end, until=1)
        assert [kept.in_block(index, block, cache).key for index in range(first, end)] == [
            kept[index].key for index in range(first, end)
        ]
        assert block.rows.tolist() == [index for index in range(PAIRS) if columns["keep"][index]][first:end]
    config = SourceConfig(f"{server.url}/*.tar", manifest=str(server.folder / "manifest.parquet"))
    here = replace(config, shards=str(server.folder / "*.tar"))
    streams = [take(DataConfig((one,), SPIECE, shuffle_blocks=BLOCKS), 20)[0] for one in (config, here)]
    assert_same(*streams)


def test_members_that_lie_apart_or_are_few_come_in_long_reads(server):
    image = b"picture" * 100
    members = [(f"{number:03d}.jpg", image) for number in range(40)]
    members += [
        (f"{number:03d}.{part}", f"{number} {part}".encode()) for number in range(40) for part in ("txt", "2.txt")
    ]
    members += [("900.1.txt", b"no picture"), ("900.2.txt", b"at all"), ("901.json", b"{}")]
    write_tar(server.folder / "apart.tar", members)
    source = open_source(f"{server.url}/apart.tar")
    server.requests.clear()
    assert list(source) == list(open_source(server.folder / "apart.tar")) and len(source) == 42
    assert len(server.requests) == 1


def test_pairs_in_order_come_in_long_reads(server):
    for pattern in ("*.tar", "*.parquet"):
        source = open_source(f"{server.url}/{pattern}")
        server.requests.clear()
        pairs = InOrder(source)
        assert [pairs[index] for index in range(len(source))] == list(open_source(f"{server.folder}/{pattern}"))
        asked = [asked for _, asked in server.requests]
        assert len(asked) <= (2 if pattern == "*.tar" else 2 + 24)  # footers and groups
    with pytest.raises(IndexError):
        pairs[PAIRS]


@pytest.mark.parametrize("size, cuts", [(1, 1), (7, 1), (100, 1), (1000, 1), (1000, 4), (1013, 3), (96, 2)])
def test_the_blocks_of_an_epoch_cover_it_once(size, cuts):
    shuffle, keys = BlockShuffle(block_pairs=32, open_blocks=3), np.full(size, 7, np.uint64)
    places = np.arange(size)
    records = permutation.shuffle(places, size, keys, blocks=shuffle)
    first, end, number = permutation.block_bounds(places, size, keys, blocks=shuffle, cuts=cuts)
    assert (first <= records).all() and (records < end).all() and (end - first <= -(-32 // cuts)).all()
    ranges = sorted(set(zip(first.tolist(), end.tolist(), strict=True)))
    assert ranges[0][0] == 0 and ranges[-1][1] == size
    assert all(one[1] == other[0] for one, other in zip(ranges, ranges[1:], strict=False))
    for stretch in range(size // 96):
        here = places // 96 == stretch
        assert len(set(zip(first[here], end[here], strict=True))) in (3 * cuts, 3 * cuts + 1)  # one goes round the end
        assert max(np.bincount(number[here])) <= -(-32 // cuts) and number.max() < 3 * cuts


def test_threads_that_want_one_piece_share_its_read():
    cache, fetched, barrier = BlockCache(100), [], threading.Barrier(6)

    def fetch():
        fetched.append(1)
        time.sleep(0.05)
        return b"data"

    def get(_):
        barrier.wait()
        return cache.get("a", fetch, nbytes=10, until=1)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(get, range(6))) == [b"data"] * 6
    assert len(fetched) == 1 and cache.used_bytes == 10


def test_memory_stays_within_the_limit_and_what_is_over_goes_first():
    cache = BlockCache(100)
    got = lambda key, until: cache.get(key, lambda: key, nbytes=40, until=until)  # noqa: E731
    assert [got("a", 10), got("b", 20), got("c", 20)] == ["a", "b", None] and cache.used_bytes == 80
    cache.fetch_ahead("d", lambda: "d", nbytes=40, until=20)
    cache.advance(10)
    assert got("a", 10) == "a"  # over, but still there: a batch that is behind may want it
    assert got("c", 20) == "c" and cache.used_bytes == 80
    assert got("a", 10) is None and got("b", 20) == "b"
    cache.clear()
    assert cache.used_bytes == 0 and got("a", 10) == "a"


def test_pieces_are_fetched_ahead_side_by_side():
    cache, running, most, barrier = BlockCache(1000), [], [], threading.Barrier(8)

    def fetch():
        running.append(1)
        most.append(len(running))
        barrier.wait(60)  # nobody passes before eight are here
        running.pop()
        return b"data"

    for key in range(16):
        cache.fetch_ahead(key, fetch, nbytes=10, until=1)
    assert all(cache.get(key, fetch, nbytes=10, until=1) == b"data" for key in range(16))
    assert len(most) == 16 and max(most) <= 9


def test_without_threads_nothing_is_fetched_ahead(monkeypatch):
    cache, fetched = BlockCache(1000), []

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for key in range(20):
            cache.fetch_ahead(key, lambda: fetched.append(1), nbytes=10, until=1)
    assert not fetched and cache.get(0, lambda: b"data", nbytes=10, until=1) == b"data"
    begun = threading.Event()
    cache.fetch_ahead("more", begun.set, nbytes=10, until=1)
    assert begun.wait(60)


def test_a_read_that_fails_is_no_room_and_a_lost_shard_stops():
    cache = BlockCache(1000)

    def fail(error):
        raise error

    assert cache.get("a", lambda: fail(remote.RemoteError("down")), nbytes=1, until=1) is None
    assert cache.get("a", lambda: b"", nbytes=1, until=1) is None  # not tried long again
    with pytest.raises(ShardLost):
        cache.get("b", lambda: fail(ShardLost("gone")), nbytes=1, until=1)


def test_pieces_are_cut_and_gaps_joined(monkeypatch):
    monkeypatch.setattr(blocks, "PIECE_BYTES", 100)
    monkeypatch.setattr(blocks, "GAP_BYTES", 10)
    found = blocks.pieces(np.array([[200, 30], [0, 40], [45, 40], [90, 30], [241, 5], [300, 500]]))
    assert found.tolist() == [[0, 85], [90, 120], [200, 230], [241, 246], [300, 800]]
    assert blocks.piece_of(found, 50, 35) == (0, 85) and blocks.piece_of(found, 300, 500) == (300, 800)
    assert blocks.piece_of(found, 50, 36) is None and blocks.piece_of(found, 235, 1) is None
    assert blocks.piece_of(blocks.pieces(np.zeros((0, 2), np.int64)), 0, 1) is None
    assert Block(1, 2, 3) == Block(1, 2, 3, np.arange(2))
