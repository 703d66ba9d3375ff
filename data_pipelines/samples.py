"""From a place in the stream to numpy arrays: the part that runs in threads and worker processes.

Batch k of process p holds the positions k * B + p, k * B + p + P, …: whatever the number of processes,
workers and threads, step k trains on the same pairs, drawn and cropped alike, since every random choice is a
function of (seed, position).

A pair that cannot be decoded is replaced by another of its source, drawn from (seed, position), and counted
under the reason why the original failed. The counts travel with the batch, so they are exact for what was
handed out.

The trap: the replacement may be broken as well; after MAX_TRIES the source is not noisy but unusable, and
that stops.
"""

import collections
import dataclasses
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipelines import augment, image_ops, text_ops
from data_pipelines.draws import Draws, Rng
from data_pipelines.mixture import Mixture
from data_pipelines.records import Pair, Source
from data_pipelines.tokenizers import SentencePieceTokenizer

MAX_TRIES = 100
ENDLESS_BATCHES = 1 << 40
_SAMPLE_STREAM, _SUBSTITUTE_STREAM = 2, 3


class BrokenPair(ValueError):
    """A pair that cannot become a sample; `reason` is the word to count it under."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class SampleSpec:
    """What a sample looks like. image_size_px: (h, w); captions: one spec per source."""

    image_size_px: tuple[int, int]
    text_length: int
    captions: tuple[text_ops.CaptionSpec, ...]
    augment: augment.AugmentConfig | None
    max_image_pixels: int
    seed: int


@dataclass(frozen=True)
class BatchSource:
    """The local batches of one process from batch `start` on, as Grain's random-access source.

    batch_pairs is global; this process takes every `process_count`-th position from `process_index` on.
    """

    sources: tuple[Source, ...]
    order: Mixture
    spec: SampleSpec
    cache: "PictureCache"
    tokenizer: SentencePieceTokenizer
    batch_pairs: int
    process_index: int
    process_count: int
    start: int

    def __len__(self) -> int:
        return ENDLESS_BATCHES

    def __getitem__(self, index: int) -> dict:
        """image: uint8 [bl, h, w, 3], text: int32 [bl, l], key: list[str], replaced: {reason: n}."""
        first = (self.start + index) * self.batch_pairs
        positions = np.arange(first + self.process_index, first + self.batch_pairs, self.process_count)
        images = np.empty((len(positions), *self.spec.image_size_px, 3), np.uint8)
        texts = np.empty((len(positions), self.spec.text_length), np.int32)
        gains, flips = np.empty((len(positions), 3), np.float32), np.empty(len(positions), bool)
        keys, replaced = [], collections.Counter()
        for row, (position, source, record) in enumerate(
            zip(positions.tolist(), *self._locate(positions), strict=True)
        ):
            sample, reason = self._sample_or_substitute(position, source, record)
            images[row], texts[row], gains[row], flips[row], key = sample
            keys.append(key)
            if reason:
                replaced[reason] += 1
        images = augment.apply_flip(augment.apply_gain(images, gains), flips)
        return {"image": images, "text": texts, "key": keys, "replaced": dict(replaced)}

    def _locate(self, positions: np.ndarray) -> tuple[list[int], list[int]]:
        sources, records = self.order.locate(positions)
        return sources.tolist(), records.tolist()

    def _sample_or_substitute(self, position: int, source: int, record: int) -> tuple[tuple, str | None]:
        """The sample for a position, and why it is a substitute (None: it is not)."""
        substitutes = Draws(self.spec.seed, _SUBSTITUTE_STREAM, position)
        first_reason = None
        for _ in range(MAX_TRIES):
            try:
                return self._sample(position, source, record), first_reason
            except BrokenPair as error:
                first_reason = first_reason or error.reason
            record = int(substitutes.random() * len(self.sources[source]))
        raise ValueError(
            f"{MAX_TRIES} pairs drawn from source {source} cannot be used, the first for {first_reason!r}; "
            f"check its shards, and that they have one of captions={tuple(self.spec.captions[source])}"
        )

    def _sample(self, position: int, source: int, record: int) -> tuple[np.ndarray, np.ndarray, tuple, bool, str]:
        rng = Draws(self.spec.seed, _SAMPLE_STREAM, position)
        pair, picture = self.cache.get(source, record) or self._decoded(source, record)
        caption = choose_caption(pair, self.spec.captions[source], rng)
        tokens = self.tokenizer.encode(caption, self.spec.text_length)
        config = self.spec.augment
        if config is None:
            return image_ops.resize(picture, self.spec.image_size_px), tokens, (1.0, 1.0, 1.0), False, pair.key
        box = augment.draw_box(config, picture.size, rng)
        image = image_ops.resize(picture, self.spec.image_size_px, box=box)
        return image, tokens, augment.draw_gain(config, rng), augment.draw_flip(config, rng), pair.key

    def _decoded(self, source: int, record: int) -> tuple[Pair, Image.Image]:
        pair = read_pair(self.sources[source], record)
        picture = decode_picture(pair, max_pixels=self.spec.max_image_pixels)
        self.cache.add(source, record, pair, picture)
        return pair, picture


class PictureCache:
    """Decoded pictures with their texts, kept while there is room; nothing is thrown out.

    A small set is read and decoded once instead of once an epoch, which halves the work per pair; of a large
    one, the first pairs stay and the rest costs nothing. Each worker process fills its own.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self._kept: dict[tuple[int, int], tuple[Pair, Image.Image]] = {}
        self._used_bytes = 0

    def __reduce__(self):
        return PictureCache, (self.limit_bytes,)

    def get(self, source: int, record: int) -> tuple[Pair, Image.Image] | None:
        return self._kept.get((source, record))

    def add(self, source: int, record: int, pair: Pair, picture: Image.Image) -> None:
        needed_bytes = 4 * picture.width * picture.height + len(pair.image)  # The file stands for its texts' size.
        if (source, record) not in self._kept and self._used_bytes + needed_bytes <= self.limit_bytes:
            self._used_bytes += needed_bytes
            self._kept[source, record] = dataclasses.replace(pair, image=None), picture


def read_pair(source: Source, record: int) -> Pair:
    """Raises BrokenPair("unreadable") when the storage fails for this pair."""
    try:
        return source[record]
    except OSError as error:
        raise BrokenPair("unreadable") from error


def choose_caption(pair: Pair, spec: text_ops.CaptionSpec, rng: Rng) -> str:
    """Raises BrokenPair: "missing_text" and "empty_text", or what kept the texts from being read."""
    try:
        return text_ops.draw_caption(pair.fields, spec, rng)
    except text_ops.CaptionError as error:
        raise BrokenPair(pair.problems[0] if pair.problems else error.reason) from error


def decode_picture(pair: Pair, *, max_pixels: int) -> Image.Image:
    """The decoded RGB picture. Raises BrokenPair: "missing_image" or the reason of the `DecodeError`."""
    if pair.image is None:
        raise BrokenPair("missing_image")
    try:
        return image_ops.decode_image(pair.image, max_pixels=max_pixels)
    except image_ops.DecodeError as error:
        raise BrokenPair(error.reason) from error
