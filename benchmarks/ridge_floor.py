"""A baseline without a network: kernel ridge regression from hand-made image features to character n-grams.

Image x -> colour layout, colour and edge histogram; text y -> hashed words and n-grams. With the RBF kernel K of the training
images and its row k(x),

    W(x) = k(x) (K + penalty I)^-1,    score(x, y) = cos(W(x) (Y - m), y - m),    m = mean(Y).

Width and penalty are chosen by cross-validation inside the training shards; the held-out shards are scored once.

The trap: splits must follow the families of ideas, or skin tones of one emoji are on both sides.

    cd data_pipelines/sample
    python ../../benchmarks/ridge_floor.py --train 'emoji-*.parquet' --manifest curated-emoji/manifest.parquet \
        --heldout unseen-style.parquet unseen-ideas.parquet --out floor.json
"""

import argparse
import io
import json
import pathlib
import re
import zlib

import numpy as np
from PIL import Image

from data_pipelines.sample.ideas import family
from data_pipelines.sources.kept_pairs import KeptPairs
from data_pipelines.sources.opening import open_source

TEXT_BINS = 8192
GRID = [(width, penalty) for width in (0.1, 0.2, 0.4) for penalty in (0.1, 0.3)]
FOLDS = 3


def read_pairs(pattern, manifest=None):
    """The pairs of every shard that `pattern` matches and the manifest keeps: (image blocks, fields)."""
    source = open_source(pattern)
    source = source if manifest is None else KeptPairs(source, manifest)
    pairs = map(source.__getitem__, range(len(source)))
    return [(image_features(pair.image), {"group": family(pair.fields["idea"])} | pair.fields) for pair in pairs]


def image_features(image):
    """Colour layout [192], colour histogram [64] and edge histogram [128] of one encoded image."""
    rgb = np.asarray(Image.open(io.BytesIO(image)).convert("RGB").resize((64, 64)), float) / 255
    r, g, b = np.moveaxis(rgb.reshape(8, 8, 8, 8, 3).mean((1, 3)), -1, 0)
    layout = np.stack([(r + g + b) / 3, r - g, (r + g) / 2 - b]).ravel()
    colour = np.minimum((rgb * 4).astype(int), 3) @ (16, 4, 1)
    histogram = np.sqrt(np.bincount(colour.ravel(), minlength=64) / colour.size)
    dy, dx = np.gradient(rgb.mean(-1))
    bins = np.add.outer(np.arange(64) // 16 * 4, np.arange(64) // 16) * 8  # 4 x 4 cells of 8 directions
    bins += (np.arctan2(dy, dx) / np.pi % 1 * 8).astype(int) % 8
    return layout, histogram, np.sqrt(np.bincount(bins.ravel(), np.hypot(dy, dx).ravel(), minlength=128))


def text_of(pairs, keywords=False):
    """Hashed words (weight 2) and character 3- to 5-grams of English captions. -> unit rows [n, TEXT_BINS]"""
    counts = np.zeros((len(pairs), TEXT_BINS), np.float32)
    for row, (_, fields) in zip(counts, pairs, strict=True):
        text = fields["captions"]["en"] + " " + (fields.get("keywords") or "") * keywords
        for word in (f"<{word}>" for word in re.findall(r"\w+", text.lower())):
            grams = [word[i : i + n] for n in (3, 4, 5) for i in range(len(word) - n + 1)]
            for gram, weight in [("=" + word, 2.0)] + [(gram, len(grams) ** -0.5) for gram in grams]:
                row[zlib.crc32(gram.encode()) % TEXT_BINS] += weight
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def standardise(pairs, moments=None):
    """Image blocks, standardised and divided by the root of their size. -> [n, d], and the moments"""
    blocks = [np.stack(block) for block in zip(*(pair[0] for pair in pairs), strict=True)]
    moments = moments or [(a.mean(0), a.std(0) + 0.3 * a.std(0).mean()) for a in blocks]
    scaled = [(a - m) / s / len(m) ** 0.5 for a, (m, s) in zip(blocks, moments, strict=True)]
    return np.hstack(scaled), moments


def scores(x, y, x_test, y_test, grid):
    """Yields the cosines [test images, test texts] for every (width, penalty) of the grid."""
    y, y_test = y - y.mean(0), y_test - y.mean(0)
    gram, cross, lengths = y @ y.T, y @ y_test.T, np.linalg.norm(y_test, axis=1)
    within, across = ((np.square(a).sum(1)[:, None] + np.square(x).sum(1) - 2 * a @ x.T) for a in (x, x_test))
    for width, penalty in grid:
        scale = width * within.mean()
        kernel = np.exp(-within / scale) + penalty * np.eye(len(x))
        weights = np.linalg.solve(kernel, np.exp(-across / scale).T).T
        yield weights @ cross / np.sqrt((weights @ gram * weights).sum(1))[:, None] / lengths


def retrieval(matrix):
    """{"text", "image": {metric: value}} of a score matrix [images, texts] whose diagonal is right; ties count as misses."""
    diagonal = np.diag(matrix)
    ranks = {"text": (matrix >= diagonal[:, None]).sum(1), "image": (matrix >= diagonal).sum(0)}
    return {
        side: {f"{side}_retrieval_recall@{k}": float((rank <= k).mean()) for k in (1, 5, 10)}
        | {f"{side}_retrieval_median_rank": float(np.median(rank))}
        for side, rank in ranks.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="glob of training shards")
    parser.add_argument("--manifest", help="of the training shards: the pairs that it keeps")
    parser.add_argument("--heldout", required=True, nargs="+", help="held-out shards, each a set of its own")
    parser.add_argument("--out", type=pathlib.Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    train = read_pairs(args.train, args.manifest)
    (x, moments), name = standardise(train), text_of(train)
    fold = np.array([zlib.crc32(f["group"].encode()) % FOLDS for _, f in train])
    y, mean = text_of(train, keywords=True), np.zeros(len(GRID))
    for a, b in ((fold != k, fold == k) for k in range(FOLDS)):
        tables = map(retrieval, scores(x[a], y[a], x[b], name[b], GRID))
        mean += [sum(rows[f"{side}_retrieval_recall@10"] for side, rows in t.items()) / 2 / FOLDS for t in tables]
    best, results = GRID[int(mean.argmax())], []
    print(f"cross-validated: R@10 {mean.max():.3f} of unseen ideas at width {best[0]}, penalty {best[1]}")
    print(f"{'':18}{'looks for':12}{'R@1':>6}{'R@5':>7}{'R@10':>7}{'median':>8}")
    for path in args.heldout:
        heldout, label = read_pairs(path), pathlib.Path(path).stem
        x_test, y_test = standardise(heldout, moments)[0], text_of(heldout)
        table = retrieval(next(scores(x, y, x_test, y_test, [best])))
        for side, row in table.items():
            print(f"{label:18}{side:12}" + "{:6.3f}{:7.3f}{:7.3f}{:8.1f}".format(*row.values()))
        results.append({
            "dataset": label, "model": "ridge on colours and edges", "pretrained": "", "task": "zeroshot_retrieval",
            "language": "en", "metrics": table["text"] | table["image"],
        })  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
