"""From a batch number to the pairs of it that this process reads, and how: one by one, or neighbours together.

    everywhere      process p of P has the positions k B + p, k B + p + P, … of batch k
    block by block  it has those whose pairs lie together in storage; each of its workers reads blocks that no other does

Whatever the number of processes, workers and threads, batch k is of the same pairs.
"""

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipelines.order.mixture import Mixture
from data_pipelines.order.permutation import BlockShuffle
from data_pipelines.records import Pair, Source
from data_pipelines.samples.pairs import read_pair
from data_pipelines.sources.blocks import Block, BlockCache

_PLANNED_BATCHES = 4


class Place(NamedTuple):
    """A row of a local batch: its position in the stream, its record of a source, and the block that is read with it, if any."""

    row: int
    position: int
    source: int
    record: int
    block: Block | None = None


@dataclass(frozen=True)
class Reader:
    """Reads the pairs of one process, from batch `start` on.

    Attributes:
      sources: what to read.
      mixture: the order.
      batch_pairs: pairs in a global batch.
      process_index, process_count: which slice of each batch.
      start: the batch that is number 0 here.
      block_caches: one per source where these are shuffled by blocks.
    """

    sources: tuple[Source, ...]
    mixture: Mixture
    batch_pairs: int
    process_index: int
    process_count: int
    start: int
    block_caches: tuple[BlockCache, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "_lock", threading.Lock())
        object.__setattr__(self, "_planned", lru_cache(_PLANNED_BATCHES)(self._plan))

    def __reduce__(self):
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def rows(self) -> int:
        """Of a local batch."""
        return self.batch_pairs // self.process_count

    def places(self, batch: int, part: int, parts: int) -> Sequence[Place]:
        """The places of one of `parts` shares of a local batch; has their blocks read ahead."""
        with self._lock:  # Threads that fill one batch plan it once.
            return self._planned(batch, part, parts)

    def locate(self, positions: np.ndarray) -> list[tuple[int, int]]:
        """The source and the record at some positions of the stream. positions: int64 [n]."""
        return list(zip(*map(np.ndarray.tolist, self.mixture.locate(positions)), strict=True))

    def read(self, place: Place) -> Pair:
        """Raises BrokenPair("unreadable") when storage fails for this pair."""
        kept = None if place.block is None else self.block_caches[place.source]
        return read_pair(self.sources[place.source], place.record, block=place.block, kept=kept)

    def close(self) -> None:
        """Forgets what was read of blocks."""
        for cache in self.block_caches:
            cache.clear()

    def _plan(self, batch: int, part: int, parts: int) -> list[Place]:
        if self.mixture.blocks is not None:
            return self._plan_blocks(batch, part, parts)
        rows = range(part * self.rows // parts, (part + 1) * self.rows // parts)
        first = (self.start + batch) * self.batch_pairs + self.process_index
        positions = first + np.array(rows, np.int64) * self.process_count
        columns = positions, *self.mixture.locate(positions)
        return list(map(Place, rows, *map(np.ndarray.tolist, columns)))

    def _plan_blocks(self, batch: int, part: int, parts: int) -> list[Place]:
        places, counts = self._in_blocks(batch, part, parts)
        for source, cache in enumerate(self.block_caches):
            here = [count for place, count in zip(places, counts, strict=True) if place.source == source]
            cache.advance(min(here, default=0))
        if any(source.is_remote for source in self.sources):
            # What this batch needs is fetched side by side, and then what the stream needs a stretch later.
            stretch = self.mixture.blocks.block_pairs * self.mixture.blocks.open_blocks
            ahead, _ = self._in_blocks(batch + -(-stretch // self.batch_pairs), part, parts)
            for source, block in dict.fromkeys((place.source, place.block) for place in (*places, *ahead)):
                with contextlib.suppress(OSError):  # told when its pairs are read
                    self.sources[source].fetch_ahead(block, self.block_caches[source])
        return places

    def _in_blocks(self, batch: int, part: int, parts: int) -> tuple[list[Place], list[int]]:
        """The places of a share, with their blocks, and at which count of its source each comes."""
        positions = np.arange(self.batch_pairs) + (self.start + batch) * self.batch_pairs
        sources, records = self.mixture.locate(positions)
        by_place = positions[np.lexsort((records, sources))]
        own = by_place[self.process_index * self.rows : (self.process_index + 1) * self.rows]
        made: dict[tuple[int, int, int, int], Block] = {}
        places, counts = [], []
        for row, found in enumerate(self.mixture.locate_blocks(own, readers=parts)):
            if found.reader != part:
                continue
            bounds = found.source, found.first, found.end, found.until
            if bounds not in made:
                made[bounds] = self.sources[found.source].block(found.first, found.end, until=found.until)
            places.append(Place(row, int(own[row]), found.source, found.record, made[bounds]))
            counts.append(found.count)
        return places, counts


def make_block_caches(
    sources: Sequence[Source],
    named: Sequence[tuple[str, float]],
    blocks: BlockShuffle | None,
    *,
    block_bytes: int,
    readers: int,
) -> tuple[BlockCache, ...]:
    """One for each source, by its weight; () without blocks.

    Args:
      named: the shards and the weight of each source; readers: processes that share a stretch.
    """
    total = sum(weight for _, weight in named)
    if blocks is None:
        return ()
    limits = [int(block_bytes * weight / total) for _, weight in named]
    for source, limit, (shards, _) in zip(sources, limits, named, strict=True):
        stretch = min(blocks.block_pairs * blocks.open_blocks, len(source))
        needed = int(stretch * source.pair_bytes) // readers
        if source.is_remote and needed > limit:
            warnings.warn(
                f"{stretch} pairs of {shards!r} are mixed at a time, about {needed} bytes in each process, and its share "
                f"of data.block_bytes={block_bytes} is {limit}: of what exceeds it each pair is a request of its own; "
                f"raise data.block_bytes or lower data.shuffle_blocks.open_blocks={blocks.open_blocks}",
                stacklevel=3,
            )
    return tuple(map(BlockCache, limits))
