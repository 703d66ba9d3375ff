"""The rank of the right candidate, and what happens when scores are equal; both ways in one pass over the score matrix.

    rank of a query = 1 + number of wrong candidates that score more than its best right one

The scores of the right pairs come first; then tiles of the matrix are computed on the devices, and each tile adds the candidates
that win to its rows and to its columns. The matrix is never held: 100 000 x 100 000 scores take no more memory than one tile.

The first of equal scores wins, as in numpy's argmax and stable sort, in CLIP_benchmark and in open_clip. `tied` says which
queries were decided so between candidates that ought to differ: equal texts have equal scores, and that is not the fault of the
encoder. An encoder that maps everything to one point gets chance and is tied everywhere.

The trap: a matrix product may round a column differently at another place, so that equal candidates do not score alike. Those
equal to the best right one are therefore left out of the tiles and counted by their places.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from siglip.array_types import Array, Bool, Float, Int
from siglip.errors import UserError
from siglip.parallel.collectives import gather_rows

_TILE = (4096, 2048)  # rows and columns of the score matrix at a time
_MIN_TILE = 64  # small sets share a few shapes: each is compiled
_CHUNK = 64  # candidates that are counted in int8, which is four to eight times as fast on a CPU
_PAIRS = 1 << 16
_NOTHING = -1


class Ranks(NamedTuple):
    """Of each query.

    Attributes:
        ranks: from 1, of its best right candidate; 0 where it has none.
        tied: whether a tie decided it.
    """

    ranks: Int[np.ndarray, " q"]
    tied: Bool[np.ndarray, " q"]


class _Side(NamedTuple):
    """Rows or columns, as candidates (place, id, group of equal vectors, text) and as queries (best right candidate)."""

    place: Int[Array, " n"]
    id: Int[Array, " n"]
    group: Int[Array, " n"]
    text: Int[Array, " n"]
    best: Int[Array, " n"]
    best_score: Float[Array, " n"]
    best_group: Int[Array, " n"]
    best_text: Int[Array, " n"]


def rank_right_candidates(
    queries: Float[np.ndarray, "q e"],
    candidates: Float[np.ndarray, "c e"],
    query_ids: Int[np.ndarray, " q"],
    candidate_ids: Int[np.ndarray, " c"],
    *,
    texts: Sequence[Hashable] | None = None,
) -> Ranks:
    """For each query the rank, from 1, of its best candidate with the same id, and whether a tie decided it.

    Args:
        texts: of the candidates; those of equal text do not count as tied. None: all differ.

    Raises:
        UserError: if an embedding is not finite.
    """
    return rank_both_ways(queries, candidates, query_ids, candidate_ids, column_texts=texts)[0]


def rank_both_ways(
    rows: Float[np.ndarray, "n e"],
    columns: Float[np.ndarray, "m e"],
    row_ids: Int[np.ndarray, " n"],
    column_ids: Int[np.ndarray, " m"],
    *,
    column_texts: Sequence[Hashable] | None = None,
) -> tuple[Ranks, Ranks]:
    """Each row's search among the columns, and each column's among the rows; what has the same id is right.

    All processes call it with the same arguments and get the same; they share the work.

    Args:
        column_texts: those of equal text do not count as tied. None: all differ.

    Raises:
        UserError: if an embedding is not finite.
    """
    if not (np.isfinite(rows).all() and np.isfinite(columns).all()):
        raise UserError("some embeddings are not finite; the model has diverged or its file is damaged")
    rows, columns = np.asarray(rows, np.float32), np.asarray(columns, np.float32)
    row, column = _pairs_of_one_id(row_ids, column_ids)
    parts = range(0, len(row), _PAIRS)
    scores = [np.einsum("pe,pe->p", rows[row[p : p + _PAIRS]], columns[column[p : p + _PAIRS]]) for p in parts]
    score = np.concatenate([np.zeros(0, np.float32), *scores])
    row_groups, column_groups = (_number(vector.tobytes() for vector in side) for side in (rows, columns))
    row_texts, column_texts = (
        np.arange(len(rows)),
        _number(range(len(columns)) if column_texts is None else column_texts),
    )
    row_side, row_ranks = _side(row, column, score, row_ids, row_groups, row_texts, column_groups, column_texts)
    column_side, column_ranks = _side(
        column, row, score, column_ids, column_groups, column_texts, row_groups, row_texts
    )
    for ranks, (wins, tied) in zip(
        (row_ranks, column_ranks), _count(rows, columns, row_side, column_side), strict=True
    ):
        ranks.ranks[:] = np.where(ranks.ranks > 0, ranks.ranks + wins, 0)
        ranks.tied[:] |= (tied > 0) & (ranks.ranks > 0)
    return row_ranks, column_ranks


def _pairs_of_one_id(
    row_ids: Int[np.ndarray, " n"], column_ids: Int[np.ndarray, " m"]
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    order = np.argsort(column_ids, kind="stable")
    first, last = (np.searchsorted(column_ids[order], row_ids, side) for side in ("left", "right"))
    row = np.repeat(np.arange(len(row_ids)), last - first)
    within = np.arange(len(row)) - np.repeat(np.cumsum(last - first) - (last - first), last - first)
    return row, order[np.repeat(first, last - first) + within]


def _side(
    query: Int[np.ndarray, " p"],
    candidate: Int[np.ndarray, " p"],
    score: Float[np.ndarray, " p"],
    ids: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    texts: Int[np.ndarray, " n"],
    candidate_groups: Int[np.ndarray, " m"],
    candidate_texts: Int[np.ndarray, " m"],
) -> tuple[_Side, Ranks]:
    """One side of the matrix, given the right pairs; and its ranks as far as vectors equal to the best right one decide them."""
    count, group = len(ids), candidate_groups
    order = np.lexsort((candidate, -score, query))
    first = order[np.unique(query[order], return_index=True)[1]]
    best_score, best_group = np.full(count, np.inf, np.float32), np.full(count, _NOTHING)
    best_score[query[first]], best_group[query[first]] = score[first], group[candidate[first]]
    best = np.full(count, len(group))
    alike = group[candidate] == best_group[query]
    np.minimum.at(best, query[alike], candidate[alike])  # vectors of one group score alike: the first of them
    found = query[first]
    best_text = np.full(count, _NOTHING)
    best_text[found] = candidate_texts[best[found]]
    # Those of its group that come before it, none of them right, win; the others of another text are tied with it.
    in_order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    place_in_group = np.empty(len(group), np.int64)
    place_in_group[in_order] = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    _, kind, same_text = np.unique(np.stack([group, candidate_texts]), axis=1, return_inverse=True, return_counts=True)
    right = np.bincount(query[alike & (candidate_texts[candidate] != best_text[query])], minlength=count)
    ranks, tied = np.zeros(count, np.int64), np.zeros(count, bool)
    ranks[found] = 1 + place_in_group[best[found]]
    tied[found] = sizes[best_group[found]] - same_text[kind.reshape(-1)[best[found]]] - right[found] > 0
    return _Side(np.arange(count), ids, groups, texts, best, best_score, best_group, best_text), Ranks(ranks, tied)


def _count(
    rows: np.ndarray, columns: np.ndarray, row_side: _Side, column_side: _Side
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(wins, ties) of each row and of each column: tiles on every device of this process, blocks of rows shared by all."""
    tile_rows, tile_columns = (
        min(limit, max(_MIN_TILE, 1 << (count - 1).bit_length()))
        for limit, count in zip(_TILE, (len(rows), len(columns)), strict=True)
    )
    devices = jax.local_devices()
    tiles = -(-len(columns) // tile_columns)

    def padded(array: np.ndarray, count: int, fill: float) -> np.ndarray:
        return np.pad(array, [(0, count - len(array)), *[(0, 0)] * (array.ndim - 1)], constant_values=fill)

    def filled(z: np.ndarray, side: _Side, count: int) -> tuple[np.ndarray, _Side]:
        values = [
            padded(value if value.dtype == np.float32 else value.astype(np.int32), count, _NOTHING) for value in side
        ]
        return padded(z, count, 0), _Side(*values)

    tiled = jax.tree.map(
        lambda array: array.reshape(tiles, tile_columns, *array.shape[1:]),
        filled(columns, column_side, tiles * tile_columns),
    )
    on_device = {}
    of_rows = np.zeros((2, len(rows)), np.int32)
    of_columns = np.zeros((2, tiles * tile_columns), np.int32)
    starts = range(0, len(rows), tile_rows)[jax.process_index() :: jax.process_count()]
    for turn in range(0, len(starts), len(devices)):
        waiting = []
        for start, device in zip(starts[turn : turn + len(devices)], devices, strict=False):
            if device not in on_device:
                on_device[device] = jax.device_put(tiled, device)
            block = slice(start, start + tile_rows)
            own = filled(rows[block], _Side(*(value[block] for value in row_side)), tile_rows)
            waiting.append((block, _count_block(jax.device_put(own, device), on_device[device])))
        for block, (row_counts, column_counts) in waiting:
            of_rows[:, block] = np.asarray(row_counts)[:, : len(rows[block])]
            of_columns += np.asarray(column_counts)
    of_rows, of_columns = (gather_rows(counts[None]).sum(axis=0) for counts in (of_rows, of_columns))
    return tuple(of_rows), tuple(of_columns[:, : len(columns)])


@jax.jit
def _count_block(
    block: tuple[Float[Array, "r e"], _Side], tiles: tuple[Float[Array, "t c e"], _Side]
) -> tuple[Int[Array, "2 r"], Int[Array, "2 tc"]]:
    """(wins, ties) of a block of rows and of all columns among each other, tile by tile."""
    rows, row_side = block

    def tile(of_rows, columns_and_side):
        columns, column_side = columns_and_side
        scores = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
        there = (row_side.place >= 0)[:, None] & (column_side.place >= 0)[None]
        scores = jnp.where(there & (row_side.id[:, None] != column_side.id[None]), scores, -jnp.inf)
        of_rows += _wins_and_ties(scores, row_side, column_side, axis=1)
        return of_rows, _wins_and_ties(scores, column_side, row_side, axis=0)

    of_rows, of_columns = jax.lax.scan(tile, jnp.zeros((2, len(rows)), jnp.int32), tiles)
    return of_rows, of_columns.transpose(1, 0, 2).reshape(2, -1)


def _wins_and_ties(scores: Float[Array, "r c"], query: _Side, candidate: _Side, *, axis: int) -> Int[Array, "2 q"]:
    """Counts of each query; its candidates lie along `axis`."""
    query = _Side(*(jnp.expand_dims(value, axis) for value in query))
    candidate = _Side(*(jnp.expand_dims(value, 1 - axis) for value in candidate))
    asked = candidate.group != query.best_group
    more, equal = scores > query.best_score, scores == query.best_score
    wins = asked & (more | equal & (candidate.place < query.best))
    ties = asked & equal & (candidate.text != query.best_text)
    return jnp.stack([_count_true(wins, axis), _count_true(ties, axis)])


def _count_true(mask: Bool[Array, "r c"], axis: int) -> Int[Array, " q"]:
    rows, columns = mask.shape
    chunked = (rows, columns // _CHUNK, _CHUNK) if axis == 1 else (rows // _CHUNK, _CHUNK, columns)
    return mask.astype(jnp.int8).reshape(chunked).sum(axis=1, dtype=jnp.int8).sum(axis=axis, dtype=jnp.int32)


def _number(items: Iterable[Hashable]) -> Int[np.ndarray, " c"]:
    """0, 1, … in the order of the first appearance; equal items have one number."""
    seen: dict[Hashable, int] = {}
    return np.fromiter((seen.setdefault(item, len(seen)) for item in items), np.int64)
