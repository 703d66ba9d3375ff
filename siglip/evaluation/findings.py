"""What a model makes of an evaluation set, beside its metrics: what the report shows. All of it is JSON.

    positives, negatives   histograms of logits = exp(t) * zimg @ ztxt.T + b, of matching and of other pairs
    reliability            predicted probability and observed share of matches, by bins of logits, at the set's own prior
    found, mistakes        what queries find, and the queries whose right image is furthest behind a wrong one

The scores are walked over in blocks of rows, so memory does not grow with images x texts. Images are told by their row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from siglip.array_types import Float, Int
from siglip.losses import prior_shift

TOP = 8
QUERIES, FEW_QUERIES = 16, 11  # eleven of the sample's unseen ideas have the eggplant, which visitors look for
_MISTAKES, _SIMILAR, _CLASSIFIED = 8, 24, 8
_BINS, _RELIABILITY_BINS = 60, 12
_BLOCK = 1 << 22  # scores


def retrieval_findings(
    zimg: Float[np.ndarray, "n e"],
    captions: Mapping[str, Sequence[Sequence[str]]],
    ztxt: Float[np.ndarray, "m e"],
    *,
    temperature: float,
    bias: float,
    batch_size: int,
) -> dict[str, Any]:
    """Of images and their captions by language; the first language is looked at in detail.

    Args:
        captions: language -> captions of each image. ztxt: embeddings of those of the first language, one after the other.
        temperature: exp(t). batch_size: pairs in a training batch, for the probabilities.
    """
    first = next(iter(captions))
    texts = [text for own in captions[first] for text in own]
    image_of_text = np.repeat(np.arange(len(zimg)), [len(own) for own in captions[first]])
    shift = prior_shift(min(len(texts) / (len(zimg) * len(texts)), 0.5), batch_size=batch_size)
    statistics = _walk(zimg, ztxt, image_of_text, temperature, bias, shift)
    some = np.unique(np.linspace(0, len(texts) - 1, min(_SIMILAR, len(texts))).astype(int))
    logits = temperature * zimg[image_of_text[some]] @ ztxt[some].T + bias
    return {
        "counts": counts_of(captions),
        "language": first,
        "histogram": statistics["histogram"],
        "reliability": statistics["reliability"],
        "similarity": {"texts": [texts[n] for n in some], "logits": np.round(logits, 2).tolist()},
        "mistakes": _mistakes(statistics, texts, image_of_text, shift),
    }


def counts_of(captions: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, dict[str, int]]:
    """By language, of the captions of each image: the images, those that have a caption, and the captions."""
    return {
        language: {"images": len(own), "described": sum(map(bool, own)), "texts": sum(map(len, own))}
        for language, own in captions.items()
    }


def _walk(zimg, ztxt, image_of_text, temperature: float, bias: float, shift: float) -> dict[str, Any]:
    low, high = bias - temperature, bias + temperature
    edges, coarse = np.linspace(low, high, _BINS + 1), np.linspace(low, high, _RELIABILITY_BINS + 1)
    positives, negatives = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
    sums = np.zeros((3, _RELIABILITY_BINS))  # pairs, matches, probabilities
    right, best_wrong = np.empty(len(ztxt)), np.full(len(ztxt), -np.inf)
    wrong = np.zeros(len(ztxt), np.int64)
    rows = max(1, _BLOCK // len(zimg))
    for start in range(0, len(ztxt), rows):
        block = slice(start, start + rows)
        logits = np.clip(temperature * ztxt[block] @ zimg.T + bias, low, high).astype(np.float64)
        matches = image_of_text[block, None] == np.arange(len(zimg))
        positives += np.histogram(logits[matches], edges)[0]
        negatives += np.histogram(logits[~matches], edges)[0]
        which = np.clip(np.digitize(logits.ravel(), coarse) - 1, 0, _RELIABILITY_BINS - 1)
        for row, weights in enumerate((None, matches.ravel(), _sigmoid(logits + shift).ravel())):
            sums[row] += np.bincount(which, weights, _RELIABILITY_BINS)
        right[block] = logits[matches]
        others = np.where(matches, -np.inf, logits)
        wrong[block], best_wrong[block] = others.argmax(axis=1), others.max(axis=1)
    pairs, matched, predicted = sums[:, sums[0] > 0]
    error = float(np.sum(np.abs(matched - predicted)) / pairs.sum())
    bins = [[p / n, m / n, int(n)] for n, m, p in zip(pairs, matched, predicted, strict=True)]
    return {
        "histogram": {"edges": edges.tolist(), "positives": positives.tolist(), "negatives": negatives.tolist()},
        "reliability": {"bins": bins, "error": error, "prior": float(matched.sum() / pairs.sum())},
        "right": right, "wrong": wrong, "best_wrong": best_wrong,
    }  # fmt: skip


def _mistakes(statistics, texts: Sequence[str], image_of_text: Int[np.ndarray, " m"], shift: float) -> list[dict]:
    """The queries whose right image is furthest behind a wrong one, one for each image."""
    behind = statistics["best_wrong"] - statistics["right"]
    found, seen = [], set()
    for n in np.argsort(-behind, kind="stable").tolist():
        if behind[n] <= 0 or len(found) == _MISTAKES:
            break
        if (row := int(image_of_text[n])) in seen:
            continue
        seen.add(row)
        p_right, p_wrong = (float(_sigmoid(statistics[name][n] + shift)) for name in ("right", "best_wrong"))
        wrong = int(statistics["wrong"][n])
        found.append({"text": texts[n], "right": row, "p_right": p_right, "wrong": wrong, "p_wrong": p_wrong})
    return found


def found_images(
    zimg: Float[np.ndarray, "n e"],
    captions: Mapping[str, Sequence[Sequence[str]]],
    embed_texts: Callable[[list[str]], Float[np.ndarray, "m e"]],
    *,
    queries: int,
) -> list[dict[str, Any]]:
    """What some queries spread over the set find: every other one in the first language, the rest in the others in turn."""
    (first, *others), asked = captions, []
    for n, row in enumerate(np.linspace(0, len(zimg) - 1, min(queries, len(zimg))).astype(int).tolist()):
        language = others[n // 2 % len(others)] if others and n % 2 else first
        if captions[language][row]:
            asked.append({"language": language, "text": captions[language][row][0], "right": row})
    asked.sort(key=lambda query: query["language"] != first)
    found = []
    for query, z in zip(asked, embed_texts([query["text"] for query in asked]), strict=True):
        order = np.argsort(-(zimg @ z), kind="stable").tolist()
        found.append(query | {"rank": order.index(query["right"]) + 1, "top": order[:TOP]})
    return found


def confusion(
    zimg: Float[np.ndarray, "n e"],
    weights: Float[np.ndarray, "k e"],
    labels: Int[np.ndarray, " n"],
    names: Sequence[str],
) -> dict[str, Any]:
    """Which class is taken for which: the whole matrix of up to 40 classes, and the pairs confused most often."""
    taken = np.argmax(zimg @ weights.T, axis=1)
    pairs, counts = np.unique(np.stack([labels, taken])[:, labels != taken], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:15]
    worst = [[names[pairs[0, n]], names[pairs[1, n]], int(counts[n])] for n in order]
    found = {"images": len(labels), "classes": len(names), "worst": worst}
    if len(names) <= 40:
        matrix = np.zeros((len(names), len(names)), int)
        np.add.at(matrix, (labels, taken), 1)
        found |= {"names": list(names), "matrix": matrix.tolist()}
    return found


def classified(
    zimg: Float[np.ndarray, "n e"],
    weights: Float[np.ndarray, "k e"],
    labels: Int[np.ndarray, " n"],
    names: Sequence[str],
    *,
    temperature: float,
) -> list[dict[str, Any]]:
    """A few images spread over the set, with the classes that come first and the softmax of their logits over all classes."""
    examples = []
    for row in np.linspace(0, len(zimg) - 1, min(_CLASSIFIED, len(zimg))).astype(int).tolist():
        logits = temperature * (weights @ zimg[row])
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        first = np.argsort(-logits, kind="stable")[:3].tolist()
        found = [[names[number], float(shares[number])] for number in first]
        examples.append({"image": row, "right": names[labels[row]], "classes": found})
    return examples


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))
