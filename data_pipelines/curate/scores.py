"""How well captions match their pictures, as a model sees it, and what follows: shares, concepts.

    score = zimg . ztxt                       cosine of a pair's embeddings
    top share of a language                   the score that this share of its pairs reaches, exactly: a radix select
    balance (MetaCLIP, arXiv 2309.16671)      p = min(1, sum over the concepts of a caption of cap / max(count, cap))

A concept is matched as whole words (as single characters in scripts without spaces). A caption that names none goes.

The trap: a quantile of a corpus needs no sorting of it. Two histograms of 65536 bins, of the upper and then of the lower half
of the bits of the score, find the k-th largest float exactly, in memory that does not grow.
"""

import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_pipelines import image_ops
from data_pipelines.curate.config import NO_IMAGE
from data_pipelines.curate.layout import Work
from data_pipelines.errors import UserError
from data_pipelines.sources.blocks import InOrder
from data_pipelines.sources.opening import open_source

SCORE_STEP = 0.02  # of the histogram in the report
_BATCH = 256
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SPACELESS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_HALF = 16


class Scorer(Protocol):
    """A two-tower model. Embeddings are float32 [n, e] of length one; fingerprint identifies the weights."""

    image_size: tuple[int, int]
    fingerprint: str

    def embed_images(self, images: np.ndarray) -> np.ndarray: ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray: ...


def embed_pictures(scorer: Scorer, table: Path, shard: str, max_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the decodable pictures of a scanned shard: row numbers [n], float32 [n, e]."""
    rows, embeddings = [np.zeros(0, np.int64)], []
    for indexes, images in _images(scorer, table, shard, max_pixels):
        rows.append(indexes)
        embeddings.append(scorer.embed_images(images))
    return np.concatenate(rows), np.concatenate(embeddings) if embeddings else np.zeros((0, 0), np.float32)


def decodable(table: Path) -> np.ndarray:
    """The rows of a scan that have a picture. -> int64 [n]"""
    reasons = pq.read_table(table, columns=["reasons"])["reasons"].to_pylist()
    return np.array([row for row, faults in enumerate(reasons) if not NO_IMAGE.intersection(faults)], np.int64)


def _images(scorer: Scorer, table: Path, shard: str, max_pixels: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of (row numbers [n], uint8 [n, h, w, 3]); every batch but the last of a shard has the same size."""
    rows = decodable(table).tolist()
    if not rows:
        return
    source = InOrder(open_source(shard))

    def load(row: int) -> np.ndarray:
        picture = image_ops.decode_image(source[row].image, max_pixels=max_pixels)
        return image_ops.resize(picture, scorer.image_size)

    with ThreadPoolExecutor() as threads:
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            yield np.array(some), np.stack(list(threads.map(load, some)))


def scores_path(work: Work, shard: int) -> Path:
    """Where the scores of a shard lie."""
    return work.folder.parent / "scores" / work.layout.tables[shard].name


def read_scores(work: Work, shard: int, indexes: pa.ChunkedArray | None = None) -> np.ndarray | None:
    """Scores of some rows of a shard, or of all; None when there is no model."""
    if not work.scored:
        return None
    scores = pq.read_table(scores_path(work, shard), columns=["score"])["score"].to_numpy()
    return scores if indexes is None else scores[indexes.to_numpy()]


def score_label(score: float) -> str:
    """The lower edge of the class of scores, SCORE_STEP wide, that a score falls into."""
    return f"{math.floor(score / SCORE_STEP) * SCORE_STEP:.2f}"


def sortable(scores: np.ndarray) -> np.ndarray:
    """float32 -> uint32 in the same order."""
    bits = scores.astype(np.float32).view(np.uint32)
    return np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))


def unsortable(key: int) -> float:
    """The float32 that `sortable` made the key of."""
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


def upper_histogram(scores: np.ndarray) -> np.ndarray:
    """int64 [65536]"""
    return np.bincount(sortable(scores) >> _HALF, minlength=1 << _HALF)


def lower_histogram(scores: np.ndarray, upper: int) -> np.ndarray:
    """Of the scores whose upper half is `upper`. int64 [65536]"""
    keys = sortable(scores)
    return np.bincount(keys[keys >> _HALF == upper] & ((1 << _HALF) - 1), minlength=1 << _HALF)


def bin_of(histogram: np.ndarray, largest: int) -> tuple[int, int]:
    """The bin of the `largest`-th largest entry (from 1), and which largest it is within the bin."""
    above = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(above, largest))
    return len(histogram) - 1 - place, largest - int(above[place - 1] if place else 0)


def read_concepts(path: str) -> tuple[dict[str, int], int]:
    """Concept -> number, and the most words of one. A text file, one a line, or a JSON list as MetaCLIP's.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no text, no JSON list where it begins as one, or holds no concept.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"concepts {path!r}: no such file; write one, a concept a line")
    return _parse_concepts(path, Path(path).stat().st_mtime_ns)


@functools.lru_cache(1)
def _parse_concepts(path: str, modified_ns: int) -> tuple[dict[str, int], int]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        entries = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise UserError(
            f"concepts {path!r}: {error}; write UTF-8 text, a concept a line, or a JSON list of strings"
        ) from None
    split = [tuple(words_of(entry)) for entry in entries if isinstance(entry, str)]
    concepts = {" ".join(words): number for number, words in enumerate(dict.fromkeys(filter(None, split)))}
    if not concepts:
        raise UserError(f"concepts {path!r} names no concept; write one a line, or a JSON list of strings")
    return concepts, max(len(words) for words in split)


def words_of(text: str) -> list[str]:
    """Lower-cased words; single characters of scripts that do not space words."""
    words = []
    for word in _WORD.findall(text.lower()):
        words += [part for part in _SPACELESS.sub(r" \g<0> ", word).split()] if _SPACELESS.search(word) else [word]
    return words


def match_concepts(caption: str, concepts: dict[str, int], longest: int) -> list[int]:
    """The concepts that a caption names, each once, in order."""
    words = words_of(caption)
    found = {}
    for start in range(len(words)):
        for end in range(start + 1, min(start + longest, len(words)) + 1):
            number = concepts.get(" ".join(words[start:end]))
            if number is not None:
                found[number] = None
    return sorted(found)


def keep_in_balance(matched: list[int], counts: np.ndarray, cap: int, draw: float) -> bool:
    """Whether a caption stays. draw: uniform in [0, 1)."""
    return draw < sum(cap / max(int(counts[number]), cap) for number in matched)


def uniform_of(*parts: str) -> float:
    """A number in [0, 1) that only the content decides."""
    return xxhash.xxh3_64_intdigest("\0".join(parts).encode("utf-8", "surrogatepass")) / 2**64
