"""From a place in the stream to numpy arrays: the part that runs in threads and worker processes.

Batch k of process p holds the positions k * B + p, k * B + p + P, …: whatever the number of processes,
workers and threads, step k trains on the same pairs, drawn and cropped alike, since every random choice is a
function of (seed, position).

A pair that cannot be decoded is replaced by another of its source, drawn from (seed, position), and counted
under the reason why the original failed. The counts travel with the batch, so they are exact for what was
handed out.

Where the pictures' embeddings are known (image_embeddings.py), a sample has these instead and no picture is decoded: the
same pairs, captions and substitutes, since a picture that is broken is known to be.

The trap: the replacement may be broken as well; after MAX_TRIES the source is not noisy but unusable, and
that stops.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipelines import augment, image_ops, text_ops
from data_pipelines.counter_rng import Draws, Rng
from data_pipelines.errors import UserError
from data_pipelines.image_embeddings import ImageEmbeddings
from data_pipelines.order.mixture import Mixture
from data_pipelines.records import Pair, Source
from data_pipelines.samples import noise
from data_pipelines.sources.blocks import Block, BlockCache
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
    noise: noise.NoiseConfig | None


class Place(NamedTuple):
    """A record of a source and, where these are shuffled by blocks, its block and the count of the source there."""

    source: int
    record: int
    block: Block | None = None
    count: int = 0


@dataclass(frozen=True)
class BatchSource:
    """The local batches of one process from batch `start` on, as Grain's random-access source.

    batch_pairs is global; this process takes every `process_count`-th position from `process_index` on, or of a shuffle by
    blocks those that lie together in storage. embeddings: one per source, or none at all. open_blocks: one per source where
    these are shuffled by blocks.

    parts: in how many the batches of such a process come, each of blocks of its own: index k is part k % parts of batch
    k // parts, and has the "rows" of it. So every worker, who makes every such part, reads what no other does.
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
    embeddings: tuple[ImageEmbeddings, ...] = ()
    open_blocks: tuple[BlockCache, ...] = ()
    parts: int = 1

    def __len__(self) -> int:
        return ENDLESS_BATCHES

    def __getitem__(self, index: int) -> dict:
        """image: uint8 [bl, h, w, 3] or zimg: float32 [bl, e], text: int32 [bl, l], key: list[str], replaced: {reason: n}."""
        number, part = divmod(index, self.parts)
        every = self._positions(number)
        positions = self._own(every)
        if self.order.blocks is None:
            places = self._places(positions)
        else:
            rows, places = self._block_places(positions, part)
            positions = positions[rows]
            self._open_blocks(number, part, places)
        batch = self._embedded(positions, places) if self.embeddings else self._pictured(positions, places)
        if self.spec.noise is not None:
            self._corrupt(batch, positions, every, self.spec.noise)
        return batch if self.parts == 1 else batch | {"rows": rows}

    def _positions(self, batch: int) -> range:
        """Of a global batch."""
        first = (self.start + batch) * self.batch_pairs
        return range(first, first + self.batch_pairs)

    def _own(self, every: range) -> np.ndarray:
        """The positions of a global batch that are this process's."""
        if self.order.blocks is None:
            return np.arange(every.start + self.process_index, every.stop, self.process_count)
        positions, share = np.array(every), len(every) // self.process_count
        sources, records = self.order.locate(positions)
        by_place = positions[np.lexsort((records, sources))]
        return by_place[self.process_index * share : (self.process_index + 1) * share]

    def _places(self, positions: np.ndarray) -> list["Place"]:
        return list(map(Place, *map(np.ndarray.tolist, self.order.locate(positions))))

    def _block_places(self, positions: np.ndarray, part: int) -> tuple[np.ndarray, list["Place"]]:
        """Which of these positions are of a part, int64 [n], and their places."""
        made: dict[tuple[int, int, int, int], Block] = {}
        rows, places = [], []
        located = self.order.locate_blocks(positions, readers=self.parts)
        for row, (source, record, first, end, until, reader, count) in enumerate(located):
            if reader != part:
                continue
            block = made.get((source, first, end, until))
            if block is None:
                block = made[source, first, end, until] = self.sources[source].block(first, end, until=until)
            rows.append(row)
            places.append(Place(source, record, block, count))
        return np.array(rows, np.int64), places

    def _open_blocks(self, batch: int, part: int, places: Sequence["Place"]) -> None:
        """Lets go of blocks that are over; has those of this batch read side by side, and then those of a stretch later."""
        for source, cache in enumerate(self.open_blocks):
            cache.advance(min((place.count for place in places if place.source == source), default=0))
        if not any(source.is_remote for source in self.sources):
            return
        stretch = self.order.blocks.block_pairs * self.order.blocks.open_blocks
        later = self._own(self._positions(batch + -(-stretch // self.batch_pairs)))
        _, ahead = self._block_places(later, part)
        for source, block in dict.fromkeys((place.source, place.block) for place in (*places, *ahead)):
            with contextlib.suppress(OSError):  # told when its pairs are read
                self.sources[source].fetch_ahead(block, self.open_blocks[source])

    def _embedded(self, positions: np.ndarray, places: Sequence["Place"]) -> dict:
        zimg = np.empty((len(positions), self.embeddings[0].width), np.float32)
        texts = np.empty((len(positions), self.spec.text_length), np.int32)
        keys, replaced = [], collections.Counter()
        for row, (position, place) in enumerate(zip(positions.tolist(), places, strict=True)):
            (zimg[row], texts[row], key), reason = self._sample_or_substitute(position, place)
            keys.append(key)
            if reason:
                replaced[reason] += 1
        return {"zimg": zimg, "text": texts, "key": keys, "replaced": dict(replaced)}

    def _pictured(self, positions: np.ndarray, places: Sequence["Place"]) -> dict:
        images = np.empty((len(positions), *self.spec.image_size_px, 3), np.uint8)
        texts = np.empty((len(positions), self.spec.text_length), np.int32)
        gains, flips = np.empty((len(positions), 3), np.float32), np.empty(len(positions), bool)
        keys, replaced = [], collections.Counter()
        for row, (position, place) in enumerate(zip(positions.tolist(), places, strict=True)):
            sample, reason = self._sample_or_substitute(position, place)
            images[row], texts[row], gains[row], flips[row], key = sample
            keys.append(key)
            if reason:
                replaced[reason] += 1
        images = augment.apply_flip(augment.apply_gain(images, gains), flips)
        return {"image": images, "text": texts, "key": keys, "replaced": dict(replaced)}

    def _corrupt(self, batch: dict, positions: np.ndarray, every: range, config: noise.NoiseConfig) -> None:
        """Pictures and texts of a batch, corrupted in place."""
        seed, length = self.spec.seed, self.spec.text_length
        shown = noise.text_positions(config, every, seed=seed)[positions - every.start]
        moved = np.flatnonzero(shown != positions)
        for row, position, place in zip(moved, shown[moved].tolist(), self._places(shown[moved]), strict=True):
            batch["text"][row], _ = self._sample_or_substitute(position, place, sample=self._caption)
        vocab_size, eos_id = self.tokenizer.vocab_size, self.tokenizer.eos_id
        for row in np.flatnonzero(noise.noisy_texts(config, positions, seed=seed)):
            tokens = noise.random_tokens(int(positions[row]), length, vocab_size=vocab_size, eos_id=eos_id, seed=seed)
            batch["text"][row] = tokens
        for row in np.flatnonzero(noise.noisy_images(config, positions, seed=seed)):
            batch["image"][row] = noise.random_picture(int(positions[row]), self.spec.image_size_px, seed=seed)

    def _sample_or_substitute(
        self, position: int, place: "Place", *, sample: Callable | None = None
    ) -> tuple[tuple, str | None]:
        """The sample for a position, and why it is a substitute (None: it is not)."""
        substitutes = Draws(self.spec.seed, _SUBSTITUTE_STREAM, position)
        sample, first_reason = sample or (self._embedded_sample if self.embeddings else self._sample), None
        for _ in range(MAX_TRIES):
            try:
                return sample(position, place), first_reason
            except BrokenPair as error:
                first_reason = first_reason or error.reason
            place = Place(place.source, int(substitutes.random() * len(self.sources[place.source])))
        raise UserError(
            f"{MAX_TRIES} pairs drawn from source {place.source} cannot be used, the first for {first_reason!r}; "
            f"check its shards, and that they have one of captions={tuple(self.spec.captions[place.source])}"
        )

    def _sample(self, position: int, place: "Place") -> tuple[np.ndarray, np.ndarray, tuple, bool, str]:
        rng = Draws(self.spec.seed, _SAMPLE_STREAM, position)
        pair, picture = self.cache.get(place.source, place.record) or self._decoded(place)
        caption = choose_caption(pair, self.spec.captions[place.source], rng)
        tokens = self.tokenizer.encode(caption, self.spec.text_length)
        config = self.spec.augment
        if config is None:
            return image_ops.resize(picture, self.spec.image_size_px), tokens, (1.0, 1.0, 1.0), False, pair.key
        box = augment.draw_box(config, picture.shape[1::-1], rng)
        image = image_ops.resize(picture, self.spec.image_size_px, box=box)
        return image, tokens, augment.draw_gain(config, rng), augment.draw_flip(config, rng), pair.key

    def _embedded_sample(self, position: int, place: "Place") -> tuple[np.ndarray, np.ndarray, str]:
        zimg = self.embeddings[place.source].get(place.record)
        if isinstance(zimg, str):
            raise BrokenPair(zimg)
        pair, _ = self.cache.get(place.source, place.record) or self._undecoded(place)
        rng = Draws(self.spec.seed, _SAMPLE_STREAM, position)
        caption = choose_caption(pair, self.spec.captions[place.source], rng)
        return zimg, self.tokenizer.encode(caption, self.spec.text_length), pair.key

    def _caption(self, position: int, place: "Place") -> np.ndarray:
        """What `_sample` shows as text at this position, whatever the picture is worth."""
        pair, _ = self.cache.get(place.source, place.record) or (self._read(place), None)
        rng = Draws(self.spec.seed, _SAMPLE_STREAM, position)
        return self.tokenizer.encode(choose_caption(pair, self.spec.captions[place.source], rng), self.spec.text_length)

    def _undecoded(self, place: "Place") -> tuple[Pair, None]:
        pair = self._read(place)
        self.cache.add(place.source, place.record, pair, None)
        return pair, None

    def _decoded(self, place: "Place") -> tuple[Pair, np.ndarray]:
        pair = self._read(place)
        picture = decode_picture(pair, max_pixels=self.spec.max_image_pixels)
        self.cache.add(place.source, place.record, pair, picture)
        return pair, picture

    def _read(self, place: "Place") -> Pair:
        source = self.sources[place.source]
        if place.block is None:
            return read_pair(source, place.record)
        return read_pair(source, place.record, block=place.block, kept=self.open_blocks[place.source])


@dataclass(frozen=True)
class PartPictures:
    """The pictures of some parts of a source, `rows` at a time, as Grain's random-access source; every part gives equally many
    batches, the last of them short or empty.
    """

    source: Source
    embeddings: ImageEmbeddings
    parts: tuple[int, ...]
    rows: int
    image_size_px: tuple[int, int]
    max_image_pixels: int

    @property
    def batches(self) -> int:
        """Of one part."""
        return -(-self.embeddings.part_pairs // self.rows)

    def __len__(self) -> int:
        return len(self.parts) * self.batches

    def __getitem__(self, index: int) -> dict:
        """image: uint8 [n, h, w, 3], n <= rows, broken: {record: reason}."""
        part, batch = divmod(index, self.batches)
        records = self.embeddings.records(self.parts[part])[batch * self.rows : (batch + 1) * self.rows]
        images, broken = np.zeros((len(records), *self.image_size_px, 3), np.uint8), {}
        for row, record in enumerate(records):
            try:
                picture = decode_picture(read_pair(self.source, record), max_pixels=self.max_image_pixels)
                images[row] = image_ops.resize(picture, self.image_size_px)
            except BrokenPair as error:
                broken[record] = error.reason
        return {"image": images, "broken": broken}


class PictureCache:
    """Decoded pictures with their texts, or the texts alone, kept while there is room; nothing is thrown out.

    A small set is read and decoded once instead of once an epoch, which halves the work per pair; of a large
    one, the first pairs stay and the rest costs nothing. Each worker process fills its own.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self._kept: dict[tuple[int, int], tuple[Pair, np.ndarray | None]] = {}
        self._used_bytes = 0

    def __reduce__(self):
        return PictureCache, (self.limit_bytes,)

    def get(self, source: int, record: int) -> tuple[Pair, np.ndarray | None] | None:
        return self._kept.get((source, record))

    def add(self, source: int, record: int, pair: Pair, picture: np.ndarray | None) -> None:
        needed_bytes = len(pair.image or b"")  # The file stands for its texts' size.
        needed_bytes += 0 if picture is None else picture.nbytes
        if (source, record) not in self._kept and self._used_bytes + needed_bytes <= self.limit_bytes:
            self._used_bytes += needed_bytes
            self._kept[source, record] = dataclasses.replace(pair, image=None), picture


def read_pair(source: Source, record: int, *, block: Block | None = None, kept: BlockCache | None = None) -> Pair:
    """A pair, read with its block where that is given. Raises BrokenPair("unreadable") when the storage fails for this pair."""
    try:
        return source[record] if block is None else source.in_block(record, block, kept)
    except OSError as error:
        raise BrokenPair("unreadable") from error


def choose_caption(pair: Pair, spec: text_ops.CaptionSpec, rng: Rng) -> str:
    """Raises BrokenPair: "missing_text" and "empty_text", or what kept the texts from being read."""
    try:
        return text_ops.draw_caption(pair.fields, spec, rng)
    except text_ops.CaptionError as error:
        raise BrokenPair(pair.problems[0] if pair.problems else error.reason) from error


def decode_picture(pair: Pair, *, max_pixels: int) -> np.ndarray:
    """The decoded picture, uint8 [h, w, 3]. Raises BrokenPair: "missing_image" or the reason of the `DecodeError`."""
    if pair.image is None:
        raise BrokenPair("missing_image")
    try:
        return image_ops.decode_pixels(pair.image, max_pixels=max_pixels)
    except image_ops.DecodeError as error:
        raise BrokenPair(error.reason) from error
