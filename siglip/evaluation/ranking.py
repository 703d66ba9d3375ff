"""The rank of the right candidate, and what happens when scores are equal.

The first of equal scores wins, as in numpy's argmax and stable sort, in CLIP_benchmark and in open_clip. `tied` says which
queries were decided so between candidates that ought to differ: equal texts have equal scores, and that is no fault of the
encoder. An encoder that maps everything to one point gets chance and is tied everywhere.
"""

from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from siglip.array_types import Bool, Float, Int
from siglip.errors import UserError

_ROWS = 4096  # queries per block of the score matrix


def rank_right_candidates(
    queries: Float[np.ndarray, "q e"],
    candidates: Float[np.ndarray, "c e"],
    query_ids: Int[np.ndarray, " q"],
    candidate_ids: Int[np.ndarray, " c"],
    *,
    texts: Sequence[Hashable] | None = None,
) -> tuple[Int[np.ndarray, " q"], Bool[np.ndarray, " q"]]:
    """For each query the rank, from 1, of its best candidate with the same id, and whether a tie decided it.

    Args:
        texts: of the candidates; those of equal text do not count as tied. None: all differ.

    Raises:
        UserError: if an embedding is not finite.
    """
    if not (np.isfinite(queries).all() and np.isfinite(candidates).all()):
        raise UserError("some embeddings are not finite; the model has diverged or its file is damaged")
    # Equal candidates must score exactly alike, and a matrix product may round a column differently at another place.
    column = _number(row.tobytes() for row in candidates)
    distinct = candidates[np.unique(column, return_index=True)[1]]
    index = np.arange(len(candidates))
    text = index if texts is None else _number(texts)
    ranks, tied = np.empty(len(queries), np.int64), np.empty(len(queries), bool)
    for start in range(0, len(queries), _ROWS):
        block = slice(start, start + _ROWS)
        scores = queries[block] @ distinct.T
        scores = scores if len(distinct) == len(candidates) else scores[:, column]
        right = query_ids[block, None] == candidate_ids[None, :]
        best = np.argmax(np.where(right, scores, -np.inf), axis=1)[:, None]
        score = np.take_along_axis(scores, best, axis=1)
        equal = ~right & (scores == score)
        ranks[block] = 1 + np.sum(~right & (scores > score) | equal & (index < best), axis=1)
        tied[block] = np.any(equal & (text != text[best]), axis=1)
    return ranks, tied


def _number(items: Iterable[Hashable]) -> Int[np.ndarray, " c"]:
    """0, 1, … in the order of the first appearance; equal items have one number."""
    seen: dict[Hashable, int] = {}
    return np.asarray([seen.setdefault(item, len(seen)) for item in items])
