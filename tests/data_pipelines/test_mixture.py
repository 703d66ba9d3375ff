"""The order: permutations, blocks, epochs, shares, and weights that change."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.counter_rng import Draws, hash_ints
from data_pipelines.order.mixture import Mixture, SourceConfig
from data_pipelines.order.permutation import BlockShuffle, permute, shuffle


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    mapped = permute(np.arange(size), size, np.full(size, key, np.uint64))
    assert (np.sort(mapped) == np.arange(size)).all()


def test_permute_reaches_far():
    size = 10**11 + 3
    mapped = permute(np.arange(1000), size, np.full(1000, 5, np.uint64))
    assert len(set(mapped.tolist())) == 1000 and mapped.min() >= 0 and mapped.max() < size
    assert abs(mapped.mean() / size - 0.5) < 0.05


def test_permutations_look_random():
    size, epochs = 101, 5000
    keys = np.arange(epochs, dtype=np.uint64).repeat(size) * np.uint64(0x9E3779B97F4A7C15)
    mapped = permute(np.tile(np.arange(size), epochs), size, keys).reshape(epochs, size)
    expected = epochs / size
    for place in range(size):  # Each number comes at each place, and after each other one, about equally often.
        counts = np.bincount(mapped[:, place], minlength=size)
        assert ((counts - expected) ** 2 / expected).sum() < 170  # chi-square, 100 degrees: p = 1e-5
    steps = np.bincount(((mapped[:, 1:] - mapped[:, :-1]) % size).ravel(), minlength=size)[1:]
    expected = epochs * (size - 1) / (size - 1)
    assert ((steps - expected) ** 2 / expected).sum() < 170


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32), st.integers(0, 5))
def test_each_epoch_holds_every_pair_once_in_a_new_order(size, seed, epoch):
    order = Mixture((size,), (1.0,), seed)
    sources, records = order.locate(np.arange(epoch * size, (epoch + 1) * size))
    assert (sources == 0).all() and (np.sort(records) == np.arange(size)).all()
    if size > 20:
        assert (order.locate(np.arange((epoch + 1) * size, (epoch + 2) * size))[1] != records).any()


weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(0, 2**40), st.integers(1, 3000))
def test_weights_hold_over_any_window(weights, start, window):
    order = Mixture((7,) * len(weights), tuple(weights), seed=0)
    sources, _ = order.locate(np.arange(start, start + window))
    counts = np.bincount(sources, minlength=len(weights))
    expected = window * np.array(weights) / sum(weights)
    assert np.abs(counts - expected).max() <= len(weights) + window * 2**-18


@settings(max_examples=30, deadline=None)
@given(weights, st.integers(0, 3))
def test_each_source_has_its_own_epochs(weights, seed):
    sizes = tuple(3 + 2 * n for n in range(len(weights)))
    order = Mixture(sizes, tuple(weights), seed)
    sources, records = order.locate(np.arange(500))
    for source, size in enumerate(sizes):
        mine = records[sources == source]
        for epoch in range(len(mine) // size):
            assert (np.sort(mine[epoch * size : (epoch + 1) * size]) == np.arange(size)).all()


def test_any_batch_of_positions_gives_what_a_replay_gives():
    order = Mixture((5, 11, 3), (1.0, 2.5, 0.3), seed=3)
    replay = [order.locate(np.array([position])) for position in range(300)]
    sources, records = order.locate(np.arange(300))
    assert [(int(s[0]), int(r[0])) for s, r in replay] == list(zip(sources.tolist(), records.tolist(), strict=True))


def test_seeds_and_sources_are_shuffled_apart():
    orders = [Mixture((50, 50), (1.0, 1.0), seed).locate(np.arange(100)) for seed in (0, 1)]
    shuffles = [tuple(records[sources == source]) for sources, records in orders for source in (0, 1)]
    assert len(set(shuffles)) == 4


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_nonsense_weights(weight):
    with pytest.raises(ValueError, match="must be positive"):
        SourceConfig("a.tar", weight=weight)
    with pytest.raises(ValueError, match="under a millionth"):
        Mixture((1, 1), (1e-9, 1.0), 0)


def test_draws_are_uniform_and_apart():
    drawn = np.array([[rng.random() for _ in range(4)] for rng in (Draws(0, 1, position) for position in range(5000))])
    assert drawn.min() >= 0 and drawn.max() < 1
    assert np.abs(drawn.mean(0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.06
    assert hash_ints(1, 2) != hash_ints(2, 1)


blocks = st.builds(BlockShuffle, st.integers(1, 40), st.integers(1, 9))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 800), st.integers(0, 2**64 - 1), blocks)
def test_a_shuffle_by_blocks_holds_every_pair_once(size, key, blocks):
    records = shuffle(np.arange(size), size, np.full(size, key, np.uint64), blocks=blocks)
    assert (np.sort(records) == np.arange(size)).all()
    one_by_one = [shuffle(np.array([p]), size, np.array([key], np.uint64), blocks=blocks)[0] for p in range(0, size, 7)]
    assert records[::7].tolist() == one_by_one


def test_a_stretch_of_a_shuffle_by_blocks_reads_few_blocks():
    size, blocks = 100_000, BlockShuffle(block_pairs=100, open_blocks=10)
    key = np.uint64(hash_ints(3))
    records = shuffle(np.arange(size), size, np.full(size, key), blocks=blocks)
    for start in range(0, size, 1000):
        stretch = np.sort(records[start : start + 1000])
        assert (np.diff(stretch) > 1).sum() <= 10  # ten runs of a hundred neighbours, one of them around the end
    firsts = records[::1000] // 100
    assert len(set(firsts.tolist())) > 90 and np.abs(np.corrcoef(firsts, np.arange(100))[0, 1]) < 0.3


def test_the_cuts_between_blocks_move_from_epoch_to_epoch():
    order = Mixture((1000,), (1.0,), 0, BlockShuffle(100, 1))
    starts = []
    for epoch in range(5):
        records = order.locate(np.arange(epoch * 1000, epoch * 1000 + 100))[1]
        starts.append(int(np.sort(records)[0]) % 100)
    assert len(set(starts)) > 1


@settings(max_examples=40, deadline=None)
@given(weights, st.data(), st.one_of(st.none(), blocks))
def test_changed_weights_go_on_where_each_source_is(weights, data, blocks):
    sizes = tuple(5 + 3 * n for n in range(len(weights)))
    order, position = Mixture(sizes, tuple(weights), 1, blocks), 0
    seen = [[] for _ in sizes]
    for _ in range(4):
        pairs = data.draw(st.integers(0, 200))
        sources, records = order.locate(np.arange(position, position + pairs))
        for source, record in zip(sources.tolist(), records.tolist(), strict=True):
            seen[source].append(record)
        position += pairs
        assert order.counts_before(position) == tuple(map(len, seen))
        changed = data.draw(st.lists(st.floats(0.01, 100), min_size=len(weights), max_size=len(weights)))
        order = order.reweighted(changed, position=position)
    alone = [Mixture(sizes, tuple(weights), 1, blocks).locate(np.arange(100_000)) for _ in (0,)][0]
    for source, size in enumerate(sizes):
        for epoch in range(len(seen[source]) // size):
            assert sorted(seen[source][epoch * size : (epoch + 1) * size]) == list(range(size))
        unchanged = alone[1][alone[0] == source][: len(seen[source])].tolist()
        assert seen[source][: len(unchanged)] == unchanged  # The order within a source knows nothing of weights.


def test_any_place_of_a_billion_pairs_takes_milliseconds():
    size = 10**9
    for order in (Mixture((size, size), (1.0, 0.3), 0), Mixture((size, size), (1.0, 0.3), 0, BlockShuffle())):
        start = time.thread_time()
        positions = 7 * 10**10 + np.arange(1024)
        sources, records = order.locate(positions)
        order.counts_before(7 * 10**10)
        assert time.thread_time() - start < 0.1
        assert records.max() < size and len(set(zip(sources.tolist(), records.tolist(), strict=True))) == 1024


@pytest.mark.parametrize("field", ["block_pairs", "open_blocks"])
def test_nonsense_blocks(field):
    with pytest.raises(ValueError, match=f"data.shuffle_blocks.{field}=0 must be at least 1"):
        BlockShuffle(**{field: 0})
