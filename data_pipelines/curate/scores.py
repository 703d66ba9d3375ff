"""How well captions match their images according to a model, and what is decided by it: shares and concept balance.

    score = zimg . ztxt                       cosine of a pair's embeddings
    top share of a language                   the score that this share of its pairs reaches, exactly: a radix select
    balance (MetaCLIP, arXiv 2309.16671)      p = min(1, sum over the concepts of a caption of cap / max(count, cap))

A concept is matched as whole words (as single characters in scripts without spaces). A caption that names none is dropped.

A quantile of a corpus does not need a sort: two histograms of 65536 bins, of the upper and then of the lower half of the
bits of the scores, find the k-th largest float exactly, in memory that does not grow with the corpus.
"""

import functools
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
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
from data_pipelines.samples.patches import Patches
from data_pipelines.samples.pixels import Pixels
from data_pipelines.sources.blocks import InOrder
from data_pipelines.sources.opening import open_with_any_column

SCORE_STEP = 0.02  # width of a bin in the report's histogram
_BATCH = 256
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SPACELESS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_HALF = 16


class Scorer(Protocol):
    """A two-tower model. Embeddings are float32 [n, e] of unit length; `fingerprint` identifies the weights.

    `pixels` makes of an image what `embed_images` takes n of: {"image": uint8 [n, h, w, 3]}, or {"patches", "grid"}.
    """

    pixels: Pixels | Patches
    fingerprint: str

    def embed_images(self, images: Mapping[str, np.ndarray]) -> np.ndarray: ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray: ...


def embed_images(
    scorer: Scorer, table: Path, shard: str, max_pixels: int, image: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds the decodable images of a scanned shard. -> row numbers int64 [n], float32 [n, e]"""
    rows, embeddings = [np.zeros(0, np.int64)], []
    for indexes, images in _images(scorer, table, shard, max_pixels, image):
        rows.append(indexes)
        embeddings.append(scorer.embed_images(images))
    return np.concatenate(rows), np.concatenate(embeddings) if embeddings else np.zeros((0, 0), np.float32)


def decodable(table: Path) -> np.ndarray:
    """The rows of a scan whose image can be decoded. -> int64 [n]"""
    no_image = frozenset(NO_IMAGE)
    reasons = pq.read_table(table, columns=["reasons"])["reasons"].to_pylist()
    return np.array([row for row, faults in enumerate(reasons) if not no_image.intersection(faults)], np.int64)


def _images(
    scorer: Scorer, table: Path, shard: str, max_pixels: int, image: str | None
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Batches of (row numbers [n], images as the scorer takes them); all batches of a shard but the last have the same size."""
    rows = decodable(table).tolist()
    if not rows:
        return
    source = InOrder(open_with_any_column(shard, image=image, fields=()))

    def load(row: int) -> dict[str, np.ndarray]:
        decoded = image_ops.decode_pixels(source[row].image, max_pixels=max_pixels)
        return scorer.pixels.pack(scorer.pixels.draw(decoded))

    with ThreadPoolExecutor() as threads:
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            made = list(threads.map(load, some))
            yield np.array(some), {name: np.stack([own[name] for own in made]) for name in made[0]}


def scores_path(work: Work, shard: int) -> Path:
    """The file with the scores of a shard."""
    return work.folder.parent / "scores" / work.layout.tables[shard].name


def read_scores(work: Work, shard: int, indexes: pa.ChunkedArray | None = None) -> np.ndarray | None:
    """The scores of all rows of a shard, or of the given ones; None without a model."""
    if not work.scored:
        return None
    scores = pq.read_table(scores_path(work, shard), columns=["score"])["score"].to_numpy()
    return scores if indexes is None else scores[indexes.to_numpy()]


def score_label(score: float) -> str:
    """The lower edge of the report's bin that a score falls into."""
    return f"{math.floor(score / SCORE_STEP) * SCORE_STEP:.2f}"


def sortable(scores: np.ndarray) -> np.ndarray:
    """Keys in the same order as the scores. float32 -> uint32"""
    bits = scores.astype(np.float32).view(np.uint32)
    return np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))


def unsortable(key: int) -> float:
    """The float32 whose `sortable` key this is."""
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


def upper_histogram(scores: np.ndarray) -> np.ndarray:
    """Counts by the upper half of the key. -> int64 [65536]"""
    return np.bincount(sortable(scores) >> _HALF, minlength=1 << _HALF)


def lower_histogram(scores: np.ndarray, upper: int) -> np.ndarray:
    """Counts by the lower half of the key, of scores whose upper half is `upper`. -> int64 [65536]"""
    keys = sortable(scores)
    return np.bincount(keys[keys >> _HALF == upper] & ((1 << _HALF) - 1), minlength=1 << _HALF)


def bin_of(histogram: np.ndarray, k: int) -> tuple[int, int]:
    """The bin of the k-th largest entry, k from 1, and its rank within that bin."""
    above = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(above, k))
    return len(histogram) - 1 - place, k - int(above[place - 1] if place else 0)


def read_concepts(path: str) -> tuple[dict[str, int], int]:
    """Reads concepts: a text file with one per line, or a JSON list as MetaCLIP's. -> {concept: number}, the longest in words

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is neither UTF-8 text nor a JSON list of strings, or it holds no concept.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"concepts {path!r}: no such file; write one with a concept per line")
    return _parse_concepts(path, Path(path).stat().st_mtime_ns)


@functools.lru_cache(1)
def _parse_concepts(path: str, modified_ns: int) -> tuple[dict[str, int], int]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        entries = json.loads(text) if text.lstrip().startswith(("[", "{")) else list(io.StringIO(text))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise UserError(
            f"concepts {path!r}: {error}; write UTF-8 text with a concept per line, or a JSON list of strings"
        ) from None
    if not isinstance(entries, list):
        raise UserError(f"concepts {path!r} is a JSON object; write one concept per line, or a JSON list of strings")
    split = [tuple(words_of(entry)) for entry in entries if isinstance(entry, str)]
    concepts = {" ".join(words): number for number, words in enumerate(dict.fromkeys(filter(None, split)))}
    if not concepts:
        raise UserError(f"concepts {path!r} names no concept; write one per line, or a JSON list of strings")
    return concepts, max(len(words) for words in split)


def words_of(text: str) -> list[str]:
    """The lower-cased words of a text; in scripts without spaces between words, its characters."""
    words = []
    for word in _WORD.findall(text.lower()):
        words += [part for part in _SPACELESS.sub(r" \g<0> ", word).split()] if _SPACELESS.search(word) else [word]
    return words


def match_concepts(caption: str, concepts: dict[str, int], longest: int) -> list[int]:
    """The numbers of the concepts that a caption names, each once, ascending."""
    words = words_of(caption)
    found = {}
    for start in range(len(words)):
        for end in range(start + 1, min(start + longest, len(words)) + 1):
            number = concepts.get(" ".join(words[start:end]))
            if number is not None:
                found[number] = None
    return sorted(found)


def keep_in_balance(matched: list[int], counts: np.ndarray, cap: int, draw: float) -> bool:
    """Whether balancing keeps a caption. matched: its concepts; counts: of each concept; draw: uniform in [0, 1)."""
    return draw < sum(cap / max(int(counts[number]), cap) for number in matched)


def uniform_of(*parts: str) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return xxhash.xxh3_64_intdigest("\0".join(parts).encode("utf-8", "surrogatepass")) / 2**64
