"""The stages that need a model: a score for every pair, and the pairs that are close to an evaluation image.

    embed_protected   the images of one evaluation shard -> their embeddings, a file
    score_group       the shards of one group -> their scores, files that are kept, and their leaks

    score            zimg . ztxt, NaN without an image
    similarity       max over evaluation images of zimg . zeval

Tasks carry the scorer. If they go to other processes it is pickled, and must be able to load itself from its description.

The trap: the last digits of a matrix product depend on how many threads share it. So a batch never holds pairs of two shards,
and the product only proposes which evaluation images may be closest; how close they are is summed in a fixed order.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_pipelines.atomic import new_file
from data_pipelines.curate import leaks, scores
from data_pipelines.curate.layout import Work
from data_pipelines.curate.shuffle import Shuffle
from data_pipelines.curate.tables import read_metadata, write_table

_COMPARED_AT_ONCE = 256
_ROUNDING = 1e-4  # more than the rounding error of a cosine summed from thousands of float32 products


@dataclass(frozen=True)
class Scoring:
    """What the model is to score. protected: the evaluation shards; tables: their scans."""

    work: Work
    scorer: scores.Scorer
    protected: tuple[str, ...]
    tables: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        return self.work.folder / "embedded"


def embedding_verdicts(work: Work) -> Shuffle:
    """Pairs that show an evaluation image, found by embedding, by group."""
    return work.to_groups("embedding-leaks")


def embed_protected(scoring: Scoring, number: int) -> None:
    """Embeds the images of one evaluation shard."""
    limit, column = scoring.work.config.max_image_pixels, scoring.work.config.image_column
    rows, zimg = scores.embed_images(scoring.scorer, scoring.tables[number], scoring.protected[number], limit, column)
    with new_file(scoring.folder / f"{number:06d}.npz") as partial, partial.open("wb") as file:
        np.savez(file, rows=rows, zimg=zimg)


def score_group(scoring: Scoring, group: int) -> None:
    """Scores the shards of one group, unless valid scores are there already, and finds their leaks."""
    work = scoring.work
    protected = _read_protected(scoring.folder, scoring.tables)
    tables = []
    for shard in work.layout.members(group):
        _score_shard(scoring, shard, protected)
        tables.append(leaks.embedding_leaks(work, shard, protected.pairs, protected.thumbnails))
    table = pa.concat_tables(tables)
    embedding_verdicts(work).write(group, table, np.full(len(table), group))


def closest(zimg: np.ndarray, against: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of `against` closest to each row, and their cosine; the same bits for any number of threads.

    zimg: float32 [n, e]; against: float32 [m, e], m > 0 -> int32 [n], the first of equally close rows; float32 [n]
    """
    found, similarity = np.zeros(len(zimg), np.int32), np.zeros(len(zimg), np.float32)
    for start in range(0, len(zimg), _COMPARED_AT_ONCE):
        some = zimg[start : start + _COMPARED_AT_ONCE]
        roughly = some @ against.T
        near = roughly >= roughly.max(1, keepdims=True) - _ROUNDING
        for row, embedding in enumerate(some):
            candidates = np.flatnonzero(near[row])
            exactly = np.einsum("me,e->m", against[candidates], embedding)
            best = exactly.argmax()
            found[start + row], similarity[start + row] = candidates[best], exactly[best]
    return found, similarity


@dataclass(frozen=True)
class _Protected:
    """The embedded evaluation images. pairs: int32 [m, 2], shard and index; embeddings: float32 [m, e]; digest: of them all."""

    pairs: np.ndarray
    thumbnails: pa.ChunkedArray
    embeddings: np.ndarray
    digest: str


def _score_shard(scoring: Scoring, shard: int, protected: _Protected) -> None:
    """Writes one row per pair: its score, its closest evaluation image, and the cosine to that (similarity)."""
    work, scorer = scoring.work, scoring.scorer
    table, out = work.layout.tables[shard], scores.scores_path(work, shard)
    rows = scores.decodable(table)  # may differ between scans of a shard: storage may fail once
    digest = json.dumps(
        [read_metadata(table)["digest"], scorer.fingerprint, protected.digest, xxhash.xxh3_64_hexdigest(rows)]
    )
    if read_metadata(out).get("digest") == digest:
        return
    captions = pq.read_table(table, columns=["caption"])["caption"].to_pylist()
    score, similarity = np.full((2, len(captions)), np.nan, np.float32)
    number = np.full(len(captions), -1, np.int32)
    limit, column = work.config.max_image_pixels, work.config.image_column
    rows, zimg = scores.embed_images(scorer, table, work.layout.shards[shard], limit, column)
    if len(rows):
        score[rows] = np.einsum("be,be->b", zimg, scorer.embed_texts([captions[row] for row in rows.tolist()]))
    if len(rows) and len(protected.pairs):
        number[rows], similarity[rows] = closest(zimg, protected.embeddings)
    columns = {"score": score, "similarity": similarity, "closest": number}
    write_table(out, pa.table(columns).replace_schema_metadata({"digest": digest}))


@functools.lru_cache(1)  # every run has another folder
def _read_protected(folder: Path, tables: tuple[Path, ...]) -> _Protected:
    pairs, embedded, thumbnails = [np.zeros((0, 2), np.int32)], [], []
    for number, table in enumerate(tables):
        with np.load(folder / f"{number:06d}.npz") as arrays:
            rows, zimg = arrays["rows"], arrays["zimg"]
        if len(rows):
            pairs.append(np.stack([np.full(len(rows), number, np.int32), rows.astype(np.int32)], axis=1))
            embedded.append(zimg)
            thumbnails += pq.read_table(table, columns=["thumbnail"])["thumbnail"].take(pa.array(rows)).chunks
    embeddings = np.concatenate(embedded) if embedded else np.zeros((0, 0), np.float32)
    digest = hashlib.sha256(embeddings.tobytes()).hexdigest()
    return _Protected(np.concatenate(pairs), pa.chunked_array(thumbnails, pa.binary()), embeddings, digest)
