"""Retrieval both ways: R@1, R@5, R@10 and the median rank, with one or several captions per picture.

`text_retrieval_*` starts from each picture and looks for its captions; `image_retrieval_*` starts from each caption and looks
for its picture. A query is a hit at k if *any* of its positives is among the k best (CLIP_benchmark's definition).

The trap: ties. An encoder that collapsed to one point scores every candidate alike; here every tie is counted against the
model, so that such an encoder gets 0 and not 1.
"""

from collections.abc import Sequence

import numpy as np

from siglip.array_types import Float, Int
from siglip.errors import UserError

RECALL_AT = (1, 5, 10)
_ROWS = 4096  # queries per block of the similarity matrix


def retrieval(
    zimg: Float[np.ndarray, "n e"], ztxt: Float[np.ndarray, "m e"], image_of_text: Int[np.ndarray, " m"]
) -> dict[str, float]:
    """Metrics of n pictures and m captions; caption j describes picture `image_of_text[j]`.

    Returns:
        {"text_retrieval_recall@k", "image_retrieval_recall@k" for k in 1, 5, 10, "…_median_rank"}; ranks count from 1.

    Raises:
        ValueError: if there is nothing to retrieve, a caption points to no picture, or an embedding is not finite.
    """
    if len(zimg) == 0 or len(ztxt) == 0:
        raise UserError(f"retrieval needs pictures and captions, got {len(zimg)} and {len(ztxt)}")
    if len(image_of_text) != len(ztxt) or image_of_text.min() < 0 or image_of_text.max() >= len(zimg):
        raise ValueError(f"image_of_text must name one of {len(zimg)} pictures for each of {len(ztxt)} captions")
    if not (np.isfinite(zimg).all() and np.isfinite(ztxt).all()):
        raise UserError("some embeddings are not finite; the model has diverged or its file is damaged")
    described = np.unique(image_of_text)  # a picture whose captions are all missing is a candidate, but no query
    image_ids = np.arange(len(zimg))
    return _summary("text", ranks_of_best_positive(zimg[described], ztxt, described, image_of_text)) | _summary(
        "image", ranks_of_best_positive(ztxt, zimg, image_of_text, image_ids)
    )


def ranks_of_best_positive(
    queries: Float[np.ndarray, "q e"],
    candidates: Float[np.ndarray, "c e"],
    query_ids: Int[np.ndarray, " q"],
    candidate_ids: Int[np.ndarray, " c"],
) -> Int[np.ndarray, " q"]:
    """For each query the rank, from 1, of its best candidate with the same id; wrong candidates win every tie."""
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), _ROWS):
        block = slice(start, start + _ROWS)
        scores = queries[block] @ candidates.T
        positive = query_ids[block, None] == candidate_ids[None, :]
        best = np.max(np.where(positive, scores, -np.inf), axis=1, keepdims=True)
        ranks[block] = 1 + np.sum(~positive & (scores >= best), axis=1)
    return ranks


def mean_of(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over several results, for instance one per language."""
    return {name: float(np.mean([result[name] for result in results])) for name in results[0]}


def _summary(side: str, ranks: Int[np.ndarray, " q"]) -> dict[str, float]:
    recalls = {f"{side}_retrieval_recall@{k}": float(np.mean(ranks <= k)) for k in RECALL_AT}
    return recalls | {f"{side}_retrieval_median_rank": float(np.median(ranks))}
