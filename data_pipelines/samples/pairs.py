"""A pair as the fields of a sample see it: read, and its image decoded once for all of them.

A field (pixels.py, tokens.py, …) makes one or more arrays of a sample. To add one, write its file and name it where the fields
are composed (`loader.py:default_fields`). The fields of a sample draw from one random stream in the order of the tuple that
they stand in: a field that is appended changes no draw of those before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_pipelines import image_ops
from data_pipelines.counter_rng import Rng
from data_pipelines.records import Pair, Source
from data_pipelines.sources.blocks import Block, BlockCache


class BrokenPair(ValueError):
    """A pair that cannot become a sample; `reason` is the word to count it under."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SamplePair:
    """A record of a source. pixels: its decoded image, uint8 [h, w, 3], where a field reads it; the rest as in `Pair`."""

    source: int
    record: int
    key: str
    fields: Mapping[str, object]
    problems: tuple[str, ...]
    pixels: np.ndarray | None = None


class Field(Protocol):
    """One kind of content of a sample; picklable, safe to call from several threads.

    Attributes:
      arrays: name -> (shape, dtype) of what it makes of one pair.
      reads_pixels: whether it needs the decoded image.
    """

    arrays: Mapping[str, tuple[tuple[int, ...], Any]]
    reads_pixels: bool

    def make(self, pair: SamplePair, rng: Rng) -> Mapping[str, Any]:
        """The arrays of one pair. Raises BrokenPair where the pair lacks what they are made of."""


@dataclass(frozen=True)
class ImageDecoder:
    """How images are decoded: none with more than `max_pixels`; large JPEGs reduced to no less than `min_size_px`, (h, w)."""

    max_pixels: int
    min_size_px: tuple[int, int] | None = None

    def decode(self, pair: Pair) -> np.ndarray:
        """uint8 [h, w, 3]. Raises BrokenPair: what kept the pair from being read, "missing_image", or why the image is bad."""
        if pair.image is None:
            raise BrokenPair(pair.problems[0] if pair.problems and not pair.fields else "missing_image")
        try:
            return image_ops.decode_pixels(pair.image, max_pixels=self.max_pixels, min_size_px=self.min_size_px)
        except image_ops.DecodeError as error:
            raise BrokenPair(error.reason) from error


class ImageCache:
    """Pairs with their decoded images, or the texts alone, kept while there is room; nothing is thrown out.

    A small set is read and decoded once instead of once an epoch, which halves the work per pair; of a large
    one, the first pairs stay and the rest costs nothing. Each worker process fills its own.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self._kept: dict[tuple[int, int], SamplePair] = {}
        self._used_bytes = 0

    def __reduce__(self):
        return ImageCache, (self.limit_bytes,)

    def get(self, source: int, record: int) -> SamplePair | None:
        return self._kept.get((source, record))

    def add(self, pair: SamplePair, *, file_bytes: int) -> None:
        """file_bytes: of the encoded image; they stand for the size of the texts."""
        place, needed_bytes = (pair.source, pair.record), file_bytes
        needed_bytes += 0 if pair.pixels is None else pair.pixels.nbytes
        if place not in self._kept and self._used_bytes + needed_bytes <= self.limit_bytes:
            self._used_bytes += needed_bytes
            self._kept[place] = pair


def read_pair(source: Source, record: int, *, block: Block | None = None, kept: BlockCache | None = None) -> Pair:
    """A pair, read with its block where that is given. Raises BrokenPair("unreadable") when the storage fails for this pair."""
    try:
        return source[record] if block is None else source.in_block(record, block, kept)
    except OSError as error:
        raise BrokenPair("unreadable") from error


def to_sample_pair(pair: Pair, source: int, record: int, decoder: ImageDecoder | None) -> SamplePair:
    """Decodes the image if there is a decoder. Raises BrokenPair as that does."""
    pixels = None if decoder is None else decoder.decode(pair)
    return SamplePair(source, record, pair.key, pair.fields, pair.problems, pixels)
